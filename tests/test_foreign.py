"""Models as other people write them: proven or refused as is true, and patched with nothing changed in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import spikepatch
from spikepatch.recipes.plan_of import Mapped, plan_on
from spikepatch.recipes.request import parse_request
from tests.foreign import MODELS, D, Decoder, T

#: In the default suite; the others are slow.
SAMPLE = frozenset(("one plus w", "own table", "one-hot", "closure", "reset by a parent", "own config", "a mode"))
BY_NAME = [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in MODELS]


def made(name: str, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name].make()


def inside(model: Any) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # type: ignore[no-any-return]


def test_there_are_many() -> None:
    assert len(MODELS) >= 50
    assert MODELS.keys() > SAMPLE


@pytest.mark.parametrize("name", BY_NAME)
def test_foreign(name: str) -> None:
    """The map is proven, with this many sub-layers. What the recipe does not draw is what the code makes of it:
    constants have the same bits though they were learned since, random values the same range. A large shortcut is made,
    and the stream starts at sqrt(2/5); or what is said is true.
    """
    case, model = MODELS[name], made(name)
    if case.leak:
        with pytest.raises(spikepatch.Refused, match=case.leak):
            spikepatch.plan(model, "vanilla", reinit="all", example_inputs=case.example)
        return
    residual = spikepatch.inspect(model, example_inputs=case.example)
    assert residual.proven, residual.leaks
    assert (residual.sublayers, residual.width, residual.conditions) == (case.sublayers, 32, ())

    def plan(recipe: str) -> Any:
        mapped = Mapped(inside(model), residual, example=case.example)
        return plan_on(mapped, parse_request(recipe, reinit="all"))

    if case.unscaled:
        with pytest.raises(spikepatch.Refused, match=case.unscaled):
            plan("scaled-embed")
    else:
        scaled = made(name)
        spikepatch.patch(scaled, plan("scaled-embed"))
        size = float(scaled.wte(torch.arange(48)).detach().std())
        assert abs(size / 0.4**0.5 - 1) < 6 / (2 * 48 * 32) ** 0.5
        with torch.no_grad():
            scaled(**case.example)
    before, after = _patched(name, plan("vanilla"))
    assert len(before) + len(plan("vanilla").written) >= len(list(model.parameters()))
    other = dict(inside(made(name, seed=1)).named_parameters())
    for parameter, old in before.items():
        if torch.equal(old, other[parameter]):
            assert torch.equal(after[parameter], old), parameter
        else:
            assert old.min() - old.std() < after[parameter].mean() < old.max() + old.std(), parameter
            assert not torch.equal(after[parameter], old), parameter


def _patched(name: str, plan: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the plan does not draw: as the model was built, and after it was learned, and patched."""
    model = made(name)
    parameters = {n: p for n, p in inside(model).named_parameters() if n not in plan.written}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    with torch.no_grad():
        for p in parameters.values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)), alpha=0.01)
    assert spikepatch.patch(model, plan) is model
    return before, {n: p.detach() for n, p in parameters.items()}


def test_a_learned_factor_that_is_divided_out() -> None:
    """What a remedy says is done: the stream starts at sqrt(2/5)."""
    model, ids = made("a learned share"), torch.arange(48)
    example = MODELS["a learned share"].example
    spikepatch.patch(model, "scaled-embed", reinit="all", replace=True, example_inputs=example)
    size = float(model.start(ids[None]).detach().std())
    assert abs(size / 0.4**0.5 - 1) < 6 / (2 * 48 * 32) ** 0.5


@pytest.mark.parametrize("name", ["attention by blocks", "added through a view"])
def test_what_is_added_in_place_has_no_factor(name: str) -> None:
    """Not that of the buffer before, though both are in one memory."""
    residual = spikepatch.inspect(made(name), example_inputs=MODELS[name].example)
    assert {p.multiplier for p in residual.residual_projections} == {1.0}


@pytest.mark.parametrize("name", ["own config", "a mode", "loss alone", "last logits alone", "added through a view"])
def test_check(name: str) -> None:
    report = spikepatch.check(made(name), recipes=["scaled-embed"], example_inputs=MODELS[name].example)
    assert report.sublayers == MODELS[name].sublayers
    assert report.models[0].verdict == "stable"


class Rows(Decoder):
    """Its constructor keeps its argument to itself."""

    def __init__(self, base: float = 100.0, *, persistent: bool = False) -> None:
        super().__init__()
        angles = torch.arange(T)[:, None] * base ** (-torch.arange(D) / D)
        self.register_buffer("pe", angles.cos(), persistent=persistent)

    def start(self, ids: torch.Tensor) -> torch.Tensor:
        return super().start(ids) + self.pe  # type: ignore[operator]


class Kept(Rows):
    """And this one does not."""

    def __init__(self, base: float = 100.0, *, persistent: bool = False) -> None:
        super().__init__(base, persistent=persistent)
        self.base, self.persistent = base, persistent


@pytest.mark.parametrize("persistent", [False, True])
def test_buffers_of_other_arguments(persistent: bool, caplog: pytest.LogCaptureFixture) -> None:
    """What was computed by an argument that nobody knows is kept, and listed; where it is known, it is made again."""
    ids = {"ids": torch.arange(T)[None]}
    for kind in (Rows, Kept):
        model: Any = kind(7.0, persistent=persistent)
        wanted = model.pe.clone()
        if kind is Kept:
            model.pe.fill_(3.0)
        caplog.clear()
        spikepatch.patch(model, "vanilla", reinit="all", example_inputs=ids)
        assert torch.equal(model.pe, wanted)
        assert any("kept as they are" in line and "pe" in line for line in caplog.messages) == (kind is Rows)


def test_ties_that_were_broken_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = made("tied head")
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    spikepatch.patch(model, "vanilla", reinit="all", example_inputs=MODELS["tied head"].example)
    assert any("which are two in this model and stay two: head.weight and wte.weight" in m for m in caplog.messages)
    caplog.clear()
    spikepatch.patch(made("tied head"), "vanilla", reinit="all", example_inputs=MODELS["tied head"].example)
    assert not caplog.messages


def test_a_buffer_of_nan_is_named() -> None:
    model: Any = Rows()
    model.pe.fill_(float("nan"))
    with pytest.raises(spikepatch.Refused, match="a buffer holds NaN"):
        spikepatch.inspect(model, example_inputs={"ids": torch.arange(T)[None]})
