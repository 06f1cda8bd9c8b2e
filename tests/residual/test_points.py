"""What is measured inside a model, against transformers' own hidden states and against the definition."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import spikepatch
from spikepatch.apply.folder.drift import drift_written
from spikepatch.residual.inspect import inspect
from spikepatch.residual.points import Point, Points, points_in, points_of, watching
from spikepatch.source.open import build_meta, open_source
from spikepatch.source.tokenizer import SAMPLE
from tests.architectures import ids, tiny_model
from tests.residual.maps import TYPES
from tests.residual.plain_gpt import GPT

EPS = torch.finfo(torch.float32).eps


def modules(points: Points) -> list[str]:
    return [point.module for point in points.streams]


@pytest.mark.parametrize(
    "model_type", ["gpt2", "llama", *(pytest.param(t, marks=pytest.mark.slow) for t in ("gpt_neox", "gemma2", "olmo2"))]
)
def test_one_size_of_the_stream(model_type: str, gpt2_tokenizer: Path, tmp_path: Path) -> None:
    """The drift of ``convert``, ``check``, its steps and what ``train`` watches: one number, as numpy has it.

    One token's vector is far larger than the others, and the vectors have a mean: so the std of all elements, the mean
    std and the mean RMS of the tokens are three numbers.
    """
    model: Any = tiny_model(model_type, vocab_size=50257, max_position_embeddings=512)
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    text.write_text(SAMPLE, encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(gpt2_tokenizer)(SAMPLE, return_tensors="pt").input_ids
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.add_(3 * table.std())
        table[ids[0, 0]] *= 100
    model.save_pretrained(folder)
    shutil.copytree(gpt2_tokenizer, folder, dirs_exist_ok=True)

    source = open_source(str(folder), weights=True)
    drift = drift_written(source, inspect(build_meta(source)), folder, source.model_class)
    report = spikepatch.check(str(folder), text=text, tokens=ids.shape[1], batch=1, steps=1, device="cpu")
    points, found = points_of(model), dict[str, torch.Tensor]()
    with watching(model, points, found), torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[:-1]
    watched = {point.layer: found[point.module].item() for point in reversed(points.streams)}

    rms = model_type not in {"gpt2", "gpt_neox"}
    arrays = [state[0].double().numpy() for state in states]
    sizes = [np.sqrt((x**2).mean(-1)).mean() if rms else x.std(-1).mean() for x in arrays]
    others = [x.std() for x in arrays] + [x.std(-1).mean() if rms else np.sqrt((x**2).mean(-1)).mean() for x in arrays]
    assert not isinstance(drift, str)
    assert len(sizes) == report.sublayers // len(report.layers[0].sublayers) == 3
    same = partial(pytest.approx, rel=64 * states[0][0].numel() ** 0.5 * EPS)
    assert drift[0].stream == drift[1].stream == same(sizes)
    assert [layer.sigma_in for layer in report.layers] == same(sizes)
    assert [watched[i] for i in range(3)] == same(sizes)
    assert report.steps[0].sigma_first == report.sigma_start == same(sizes[0])
    assert report.steps[0].sigma_last == same(report.sigma_end)
    assert report.initial_loss == report.steps[0].loss == same(drift[0].loss)
    assert all(abs(other / size - 1) > 1e-3 for other, size in zip(others, 2 * sizes, strict=True))


def test_layers_in_a_dict_of_modules() -> None:
    """Their list is an entry of it; the blocks are those of the list."""
    model = GPT()
    points = points_in(model, inspect(model, example_inputs={"idx": torch.arange(12)[None]}))
    assert points.layers == tuple(f"transformer.h.{layer}" for layer in range(3))
    assert [(p.module, p.layer) for p in points.streams[:3]] == [
        ("transformer.h.0.ln_1", 0), ("transformer.h.0.ln_2", 0), ("transformer.h.1.ln_1", 1),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_has_points(model_type: str) -> None:
    model = tiny_model(model_type).train()
    points = points_of(model)
    residual = inspect(model)
    assert len(points.layers) == residual.layers == 3
    assert points.width == residual.width == 64
    assert len(points.streams) in (3, 6)
    assert bool(points.notes) == (residual.placement == "branch-norm" and modules(points) == list(points.layers))
    found: dict[str, torch.Tensor] = {}
    with watching(model, points, found):
        model(ids(model))
    assert list(found) == modules(points)
    assert all(0 < value < 1e3 for value in found.values())
    before = dict(found)
    model(ids(model))
    assert found == before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "olmo2"])
def test_layers_inputs_are_hidden_states(model_type: str) -> None:
    """The first pre-norm of each layer, or the layer itself, reads what transformers calls a hidden state."""
    model = tiny_model(model_type)
    points = points_of(model)
    found: dict[str, torch.Tensor] = {}
    with watching(model, points, found), torch.no_grad():
        states = model(ids(model), output_hidden_states=True).hidden_states
    per_layer = len(points.streams) // len(points.layers)
    assert per_layer == (1 if model_type == "olmo2" else 2)
    for i, point in enumerate(points.streams[::per_layer]):
        state = states[i].double()
        size = state.std(-1, correction=0) if model_type == "gpt2" else state.square().mean(-1).sqrt()
        assert point.layer == i
        assert found[point.module].item() == pytest.approx(size.mean().item(), rel=state.numel() * EPS)


def test_branch_norms_alone_are_said() -> None:
    points = points_of(tiny_model("olmo2"))
    assert modules(points) == list(points.layers)
    assert "the layers' inputs" in points.notes[0]


def test_a_model_without_a_map_is_not_watched() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.linear(x)

    points = points_of(Plain())
    assert (points.streams, points.layers) == ((), ())
    assert points.notes[0].startswith("no layer is watched: ")


def test_of_a_module_called_twice_the_first_call_counts() -> None:
    model: Any = tiny_model("gpt2")
    points = dataclasses.replace(points_of(model), streams=(Point("transformer.ln_f", None, "layernorm"),))
    found: dict[str, torch.Tensor] = {}
    with watching(model, points, found), torch.no_grad():
        model.transformer.ln_f(torch.arange(64.0))
        model(ids(model))
    assert found["transformer.ln_f"] == torch.arange(64.0).std(correction=0)


def test_a_compiled_model_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code does not call hooks; so it is not run while they are there."""
    model = tiny_model("gpt2")
    points = points_of(model)
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*arguments: Any) -> Any:
            calls.append(1)
            return graph.forward(*arguments)

        return run

    model.compile(backend=backend)
    with torch.no_grad():
        model(ids(model), use_cache=False)
        compiled = len(calls)
        assert compiled
        found: dict[str, torch.Tensor] = {}
        with watching(model, points, found):
            model(ids(model), use_cache=False)
        assert len(found) == 6
        assert len(calls) == compiled
        model(ids(model), use_cache=False)
        assert len(calls) == 2 * compiled
