"""What is worked out from a learned tensor, a piece at a time."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import spikepatch
from spikepatch.plans.plan import (
    Fill,
    Plan,
    ScaleEmbedding,
)
from spikepatch.recipes.plan_of import element_std
from spikepatch.source.apart import equal
from spikepatch.source.checkpoint import read_checkpoint
from spikepatch.source.header import TensorEntry
from spikepatch.source.meta import build_meta
from spikepatch.source.pieces import loaded_pieces, pieces
from tests.architectures import tiny_model


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spikepatch.source.pieces.PIECE", 1000)


def stored(folder: Path, **tensors: torch.Tensor) -> list[TensorEntry]:
    save_file(tensors, folder / "model.safetensors")
    entries = read_checkpoint(folder).tensors
    return [entries[name] for name in tensors]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_std(tmp_path: Path, dtype: torch.dtype, mean: float) -> None:
    """Against numpy in longer floats; n sums in float64 are off by less than n eps, and a mean costs its square."""
    x = (mean + 0.02 * torch.randn(70, 331, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    exact = np.std(x.double().numpy().astype(np.longdouble), ddof=1)
    (entry,) = stored(tmp_path, x=x)

    assert element_std(pieces(entry), entry.shape) == pytest.approx(
        float(exact), rel=x.numel() * np.finfo(np.float64).eps
    )
    assert element_std(loaded_pieces(x.t().contiguous().t()), x.shape) == element_std(pieces(entry), entry.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_std_of_what_is_not_finite(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(2500, dtype=dtype)
    x[1700] = bad
    (entry,) = stored(tmp_path, x=x)
    assert not math.isfinite(element_std(pieces(entry), entry.shape))


def test_std_of_little(tmp_path: Path) -> None:
    one, equal = stored(tmp_path, one=torch.ones(1), equal=torch.full((9,), 0.1))
    assert math.isnan(element_std(pieces(one), one.shape))
    assert element_std(pieces(equal), equal.shape) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unused", [0.0, 1e-5])
def test_rows_that_no_token_uses(dtype: torch.dtype, unused: float, tmp_path: Path) -> None:
    """A quarter of zero rows would make the std smaller by sqrt(3/4)."""
    x = 0.02 * torch.randn(400, 37, generator=torch.Generator().manual_seed(0))
    table = x.clone()
    table[::4] *= unused
    (entry,) = stored(tmp_path, x=table.to(dtype))
    exact = np.std(x.reshape(100, 4, 37)[:, 1:].to(dtype).double().numpy(), ddof=1)
    others = np.std(x[:300].to(dtype).double().numpy(), ddof=1)

    assert element_std(pieces(entry), entry.shape) == pytest.approx(float(exact), rel=1e-11)
    (whole,) = stored(tmp_path, x=x.to(dtype))
    assert element_std(pieces(whole), whole.shape, range(300)) == pytest.approx(float(others), rel=1e-11)
    assert element_std(pieces(whole), whole.shape, []) == element_std(pieces(whole), whole.shape)


def test_a_factor_of_the_rows_that_tokens_use(gpt2_tokenizer: Path, tmp_path: Path) -> None:
    """The vocabulary is padded; and the rows that pad it, though large, belong to no token."""
    model: Any = tiny_model("gpt2", vocab_size=50304)
    with torch.no_grad():
        model.transformer.wte.weight[50257:] = 5.0
    shutil.copytree(gpt2_tokenizer, tmp_path / "source")
    model.save_pretrained(tmp_path / "source")
    (scaled,) = spikepatch.plan(str(tmp_path / "source"), reinit="none").select(ScaleEmbedding)
    rows = model.transformer.wte.weight[:50257].detach().double().numpy()

    assert scaled.factor == pytest.approx(1 / rows.std(ddof=1), rel=1e-9)


def test_equal(tmp_path: Path) -> None:
    x = torch.arange(3000.0)
    y = x.clone()
    y[2999] += 1
    entries = stored(tmp_path, a=x, b=x.clone(), c=y, d=x.clone().reshape(30, 100))
    assert [equal(entries[0], other) for other in entries] == [True, True, False, False]


def stds(plan: Plan) -> dict[str, float]:
    return {fill.parameter: fill.std for fill in plan.select(Fill)}


@pytest.mark.parametrize(
    ("layers", "width", "small", "residual"),
    [(24, 1024, 0.01976, 0.002853), (24, 2304, 0.01318, 0.001902), (40, 5120, 0.00884, 0.000988)],
)
def test_the_papers_stds(layers: int, width: int, small: float, residual: float) -> None:
    """The models of the paper at full size, on the meta device; its table gives four digits."""
    config = AutoConfig.for_model("gpt2", n_layer=layers, n_embd=width, n_head=16)
    config.architectures = ["GPT2LMHeadModel"]
    model = build_meta(AutoModelForCausalLM._model_mapping[type(config)], config, where="the paper")
    plan = spikepatch.plan(model, reinit="all")
    found = stds(plan)
    assert len(plan.sublayers) == 2 * layers
    assert found["transformer.wte.weight"] == pytest.approx(small, rel=6e-4)
    projections = {round(std, 12) for name, std in found.items() if "c_proj" in name}
    assert projections == {round(math.sqrt(2 / (5 * width)) / math.sqrt(2 * layers), 12)}
    assert projections.pop() == pytest.approx(residual, rel=6e-4)
    assert plan.select(ScaleEmbedding) == [ScaleEmbedding("transformer.wte", math.sqrt(width), per_width=True)]


def test_source_string_and_model_give_the_same_plan(tmp_path: Path) -> None:
    tiny_model("gpt2").config.save_pretrained(tmp_path)
    from_string = spikepatch.plan(str(tmp_path), "embed-ln", reinit="all", seed=5)
    from_model = spikepatch.plan(tiny_model("gpt2"), "embed-ln", reinit="all", seed=5)
    assert dataclasses.replace(from_string, source=from_model.source) == from_model
