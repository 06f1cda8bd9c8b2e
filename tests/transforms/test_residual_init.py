"""Residual scaling: projections end with std s / sqrt(S) on the stream, however the architecture multiplies."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from spikepatch.errors import Refused
from spikepatch.plans.plan import Constant, Context, Edit, Fill, Recipe, Skip
from spikepatch.residual.map import Between, ResidualMap
from spikepatch_transforms.residual_init import ResidualInit
from tests.residual.maps import Shapes, mapped, plan_of

SMALL = math.sqrt(2 / (5 * 64))


def test_a_negative_multiplier() -> None:
    residual, shapes = mapped("gpt2")
    context = Context("all", shapes=shapes)
    flipped = tuple(dataclasses.replace(p, multiplier=-2.0) for p in residual.residual_projections)
    fills = list(ResidualInit()(dataclasses.replace(residual, residual_projections=flipped), context))
    assert len(fills) == 6
    assert all(isinstance(f, Fill) and f.std == pytest.approx(SMALL / (2 * math.sqrt(6))) for f in fills)


def items(found: tuple[ResidualMap, Shapes], config: ResidualInit) -> list[Edit | Skip]:
    residual, shapes = found
    return list(config(residual, Context("all", shapes=shapes)))


def fills(model_type: str, config: ResidualInit, **changes: Any) -> dict[str, Fill]:
    found = items(mapped(model_type, **changes), config)
    return {item.parameter: item for item in found if isinstance(item, Fill)}


def test_wang() -> None:
    """2 / (N sqrt(d)) for every projection, with N = 3 layers; it falls with the depth itself, not with its root."""
    found = fills("llama", ResidualInit(scale="wang"))
    assert len(found) == 6
    assert all(fill.std == pytest.approx(2 / (3 * 8), rel=1e-15) and fill.depth == -1.0 for fill in found.values())


def test_mitchell() -> None:
    """1 / sqrt(2 d (l + 1)) for W_O, 1 / sqrt(2 d_ffn (l + 1)) for W_2, whichever way round a matrix lies in memory."""
    for model_type, names, inner in (
        ("llama", ("model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.mlp.down_proj.weight"), 96),
        ("gpt2", ("transformer.h.{}.attn.c_proj.weight", "transformer.h.{}.mlp.c_proj.weight"), 256),
    ):
        shapes = mapped(model_type)[1]
        found = fills(model_type, ResidualInit(scale="mitchell", cut=3.0))
        expected = {
            name.format(layer): 1 / math.sqrt(2 * fan_in * (layer + 1))
            for name, fan_in in zip(names, (64, inner), strict=True)
            for layer in range(3)
        }
        assert {name: fill.std for name, fill in found.items()} == pytest.approx(expected, rel=1e-15)
        for name, fill in found.items():
            assert (fill.distribution, fill.cut, fill.depth) == ("truncated", 3.0, 0.0)
            (axis,) = fill.axes
            assert shapes[name][axis] == fill.fan == (inner if "mlp" in name else 64)


def test_mitchell_of_experts() -> None:
    """fan_in is one expert's: 96, not that of all four."""
    found = fills("mixtral", ResidualInit(scale="mitchell"))
    assert found["model.layers.1.mlp.experts.down_proj"].std == pytest.approx(1 / math.sqrt(2 * 96 * 2), rel=1e-15)


def test_mitchell_without_layers() -> None:
    residual, shapes = mapped("gpt2")
    loose = tuple(dataclasses.replace(p, layer=None) for p in residual.residual_projections)
    with pytest.raises(Refused, match=r"layer of every residual projection(.|\n)*c_proj\.weight belongs to no layer"):
        list(
            ResidualInit(scale="mitchell")(
                dataclasses.replace(residual, residual_projections=loose), Context("all", shapes=shapes)
            )
        )


@pytest.mark.parametrize("scale", ["wang", "mitchell"])
def test_every_scale_divides_a_multiplier_out(scale: Any) -> None:
    plain = fills("granite", ResidualInit(scale=scale))
    scaled = fills("granite", ResidualInit(scale=scale), residual_multiplier=0.25)
    assert len(plain) == 6
    for name, fill in plain.items():
        assert scaled[name].std == pytest.approx(4 * fill.std, rel=1e-15)


def test_no_scale() -> None:
    """For recipes that draw every matrix alike; then the architecture's multiplier is left to do its work."""
    found = fills("granite", ResidualInit("normal", 0.02, scale="none"), residual_multiplier=0.25)
    assert {(fill.std, fill.depth, fill.fan) for fill in found.values()} == {(0.02, 0.0, 0)}


def test_the_base_of_another_distribution() -> None:
    """Megatron's scaled_normal: 0.02 / sqrt(2 N), whatever the width."""
    found = fills("gpt2", ResidualInit("normal", 0.02))
    assert {(fill.std, fill.depth, fill.fan) for fill in found.values()} == {(0.02 / math.sqrt(6), -0.5, 0)}


def test_learned_projections_are_left_alone() -> None:
    assert list(ResidualInit(branch_gain=True)(mapped("gpt2")[0], Context("none"))) == []


def test_a_branch_norm_without_a_gain() -> None:
    residual, shapes = mapped("olmo2")
    bare = tuple(dataclasses.replace(norm, gain="none", parameter=None) for norm in residual.norms)
    items = list(
        ResidualInit(branch_gain=True)(dataclasses.replace(residual, norms=bare), Context("all", shapes=shapes))
    )
    assert not any(isinstance(item, Constant) for item in items)
    assert len([item for item in items if isinstance(item, Skip) and item.reason == "the norm has no gain"]) == 6


def test_a_factor_before_the_branch_norm() -> None:
    """The norm takes it out, so it says nothing of the size on the stream; no gain is worked out from it."""
    residual, shapes = mapped("olmo2")
    before = tuple(
        dataclasses.replace(p, multiplier=3.0, between=(Between("multiplier", None), *p.between))
        for p in residual.residual_projections
    )
    context = Context("all", shapes=shapes)
    items = list(ResidualInit(branch_gain=True)(dataclasses.replace(residual, residual_projections=before), context))
    assert not any(isinstance(item, Constant) for item in items)
    assert len([item for item in items if isinstance(item, Skip) and "before the norm" in item.reason]) == 6
    after = tuple(
        dataclasses.replace(p, multiplier=3.0, between=(*p.between, Between("multiplier", None)))
        for p in residual.residual_projections
    )
    gains = ResidualInit(branch_gain=True)(dataclasses.replace(residual, residual_projections=after), context)
    values = [item.value for item in gains if isinstance(item, Constant)]
    assert values == pytest.approx([1 / (3 * math.sqrt(6))] * 6, rel=1e-15)


def test_without_branch_norms_there_is_no_gain_to_set() -> None:
    plan = plan_of("llama", Recipe("gains", (ResidualInit(branch_gain=True),)), reinit="all")
    assert len(plan.select(Fill)) == len(plan.edits) == 6
