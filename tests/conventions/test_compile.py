"""``torch.compile`` takes a patched model whole: no graph break at the embedding, the same logits and gradients."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import spikepatch
from tests.architectures import ids, tiny_config, tiny_model

pytestmark = pytest.mark.slow  # processes, trainings, or models at full size

CASES = [("gpt2", "scaled-embed"), ("gpt2", "embed-detach"), ("llama", "embed-ln")]

#: Sub-layers of the tiny models, and the longest sum in one of their products.
SUBLAYERS, LONGEST_SUM = 6, 256


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


def run(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of the loss with respect to every parameter."""
    logits = model(input_ids=tokens, use_cache=False).logits
    cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()  # type: ignore[no-untyped-call]
    gradients = {name.removeprefix("_orig_mod."): p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return {"logits": logits.detach(), **gradients}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """A compiler may sum in another order. A product's relative error is sqrt(length) eps then; there are three in each
    sub-layer and one in the head, and as many again on the way back.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bound = 2 * (3 * SUBLAYERS + 1) * math.sqrt(LONGEST_SUM) * torch.finfo(value.dtype).eps
        assert value.abs().max() > 0
        assert (found[name] - value).abs().max() <= bound * value.abs().max(), name


@pytest.mark.parametrize(("model_type", "recipe"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_one_graph(model_type: str, recipe: str, dtype: torch.dtype) -> None:
    model: Any = tiny_model(model_type).to(dtype)
    spikepatch.patch(model, recipe, reinit="all")
    tokens = ids(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    assert_same(run(compiled, tokens), run(model, tokens))


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), reason="inductor needs a C++ compiler"
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own use
def test_a_converted_folder_under_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    tiny_config("gpt2").save_pretrained(tmp_path / "source")
    out = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out").out
    model: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    tokens = ids(model)
    compiled = torch.compile(model, fullgraph=True)

    assert_same(run(compiled, tokens), run(model, tokens))
