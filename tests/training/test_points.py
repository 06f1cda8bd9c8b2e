"""What is measured inside a model, against transformers' own hidden states and against the definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from spikepatch.residual.inspect import inspect
from spikepatch.training.points import gradient_norms, points_of, watching
from tests.architectures import ids, tiny_model
from tests.residual.maps import TYPES

EPS = torch.finfo(torch.float32).eps


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_has_points(model_type: str) -> None:
    model = tiny_model(model_type).train()
    points = points_of(model)
    residual = inspect(model)
    assert len(points.layers) == residual.layers == 3
    assert points.width == residual.width == 64
    assert len(points.streams) in (3, 6)
    assert bool(points.notes) == (residual.placement == "branch-norm" and points.streams == points.layers)
    found: dict[str, torch.Tensor] = {}
    with watching(model, points, found):
        model(ids(model))
    assert list(found) == list(points.streams)
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
    for i, name in enumerate(points.streams[::per_layer]):
        expected = states[i].double().std(-1, correction=0).mean().item()
        assert found[name].item() == pytest.approx(expected, rel=states[i].numel() * EPS)


def test_branch_norms_alone_are_said() -> None:
    points = points_of(tiny_model("olmo2"))
    assert points.streams == points.layers
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


def test_gradient_norms() -> None:
    model = tiny_model("gpt2")
    points = points_of(model)
    model(ids(model), labels=ids(model)).loss.backward()
    found = gradient_norms(model, points).tolist()
    expected = [
        sum(p.grad.double().square().sum().item() for p in model.get_submodule(path).parameters()) ** 0.5
        for path in points.layers
    ]
    assert len(expected) == 3
    assert found == pytest.approx(expected, rel=64 * 64 * EPS)


def test_of_a_module_called_twice_the_first_call_counts() -> None:
    model: Any = tiny_model("gpt2")
    points = dataclasses.replace(points_of(model), streams=("transformer.ln_f",))
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
