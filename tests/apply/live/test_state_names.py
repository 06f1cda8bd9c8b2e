"""Models whose ``state_dict`` has other names than their parameters: each edit is written, or the call is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import spikepatch
from spikepatch.plans.plan import Fill
from tests.architectures import tiny_model
from tests.residual.plain_gpt import GPT

EXAMPLE = {"idx": torch.arange(12)[None]}


def in_parts(name: str, axis: int, copy: bool) -> Callable[..., None]:
    """A hook that saves the matrix ``name`` in two parts."""

    def hook(module: Any, state: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
        whole = state.pop(f"{prefix}{name}.weight")
        for part, half in zip("ab", whole.chunk(2, axis), strict=True):
            state[f"{prefix}{name}_{part}.weight"] = half.clone() if copy else half

    return hook


def hooked(copy: bool, *, transformers: bool) -> tuple[Any, dict[str, Any], list[str]]:
    """A model, the options that ``patch`` needs for it, and the matrices that are saved in parts."""
    if transformers:
        model: Any = tiny_model("gpt2")
        parents, name, axis, options = [block.mlp for block in model.transformer.h], "c_fc", 1, {}
    else:
        model = GPT()
        parents, name, axis, options = _parents_of_linear(model), "", 0, {"example_inputs": EXAMPLE}
        name = next(child for child, module in parents[0].named_children() if isinstance(module, nn.Linear))
    for parent in parents:
        parent._register_state_dict_hook(in_parts(name, axis, copy))
    paths = {id(module): path for path, module in model.named_modules()}
    return model, options, [f"{paths[id(parent)]}.{name}.weight".lstrip(".") for parent in parents]


def _parents_of_linear(model: nn.Module) -> list[Any]:
    parents = [m for m in model.modules() if any(isinstance(c, nn.Linear) for c in m.children())]
    return [m for m in parents if type(m) is type(parents[0])]


@pytest.mark.parametrize("transformers", [False, True])
@pytest.mark.parametrize("reinit", ["all", "residual"])
def test_parts_are_written(transformers: bool, reinit: Any) -> None:
    model, options, matrices = hooked(copy=False, transformers=transformers)
    assert not set(matrices) & set(model.state_dict())
    before = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    plan = spikepatch.plan(model, "vanilla", reinit=reinit, **options)
    spikepatch.patch(model, plan)
    changed = {name for name, p in model.named_parameters(remove_duplicate=False) if not torch.equal(p, before[name])}

    assert plan.written <= changed
    assert reinit != "all" or set(matrices) <= changed
    for fill in plan.select(Fill):
        parameter = model.get_parameter(fill.parameter)
        assert float(parameter.detach().std()) == pytest.approx(fill.std, rel=0.1)


@pytest.mark.parametrize("transformers", [False, True])
def test_copies_are_refused(transformers: bool) -> None:
    model, options, matrices = hooked(copy=True, transformers=transformers)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(spikepatch.Refused, match="stored as something else than they are") as caught:
        spikepatch.patch(model, "scaled-embed", reinit="all", **options)

    assert any(
        name in caught.value.where or f"{name.removesuffix('.weight')}_a" in caught.value.where for name in matrices
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not hasattr(model, "_spikepatch_plan")


def test_an_edit_that_is_not_carried_out_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    plan = spikepatch.plan(model, "vanilla", reinit="all")
    left_out = plan.select(Fill)[0]
    monkeypatch.setattr("spikepatch.apply.live.patch.layout", lambda twin: _without(twin, left_out.parameter))
    with pytest.raises(spikepatch.Refused, match="stored as something else"):
        spikepatch.patch(model, plan)


def _without(twin: nn.Module, name: str) -> tuple[Any, ...]:
    from spikepatch.source.layout import layout

    return tuple(target for target in layout(twin) if target.owner != name)
