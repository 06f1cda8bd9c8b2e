"""Small initialisation: which weights are N(0, 2 / (5 d)), and which are left to the architecture."""

from __future__ import annotations

import math
from typing import Any

import pytest

from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, Fill, Recipe, Skip
from spikepatch_transforms.small_init import SmallInit
from tests.residual.maps import mapped, plan_of

STD = math.sqrt(2 / (5 * 64))


def fills(model_type: str, config: SmallInit) -> dict[str, Fill]:
    plan = plan_of(model_type, Recipe("one", (config,)), reinit="all")
    return {fill.parameter: fill for fill in plan.select(Fill)}


def test_xavier_counts_each_matrix_by_itself() -> None:
    """2 / (fan_in + fan_out): fused queries, keys and values as one, experts one by one, tables as torch counts."""
    gpt2 = fills("gpt2", SmallInit("xavier"))
    assert gpt2["transformer.h.0.attn.c_attn.weight"].std == pytest.approx(math.sqrt(2 / (64 + 192)), rel=1e-15)
    assert gpt2["transformer.wte.weight"].std == pytest.approx(math.sqrt(2 / (500 + 64)), rel=1e-15)
    mixtral = fills("mixtral", SmallInit("xavier"))
    assert mixtral["model.layers.0.mlp.experts.gate_up_proj"].std == pytest.approx(math.sqrt(2 / (64 + 192)), rel=1e-15)


def test_fan_in() -> None:
    """1 / sqrt(fan_in), with the axis that it runs along, so that another config's is known."""
    for model_type in ("gpt2", "llama", "mixtral"):
        shapes = mapped(model_type)[1]
        found = fills(model_type, SmallInit("fan_in"))
        assert len(found) > 6
        for name, fill in found.items():
            (axis,) = fill.axes
            assert shapes[name][axis] == fill.fan == 64
            assert fill.std == pytest.approx(1 / 8, rel=1e-15)


def test_a_constant_std_does_not_follow_the_width() -> None:
    assert {fill.fan for fill in fills("llama", SmallInit("normal", 0.02)).values()} == {0}
    assert {fill.fan for fill in fills("llama", SmallInit()).values()} == {64}


@pytest.mark.parametrize(
    "options",
    [
        {"base": "normal"},
        {"std": 0.02},
        {"base": "normal", "std": 0.0},
        {"base": "normal", "std": math.inf},
        {"cut": -1.0},
        {"cut": math.nan},
        {"cut": 2.0, "uniform": True},
    ],
)
def test_distributions_without_sense(options: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="SmallInit: this is no distribution"):
        SmallInit(**options)


def test_another_transform_may_draw_the_token_embedding() -> None:
    found = fills("gpt2", SmallInit(token_embedding=False))
    assert "transformer.wte.weight" not in found
    assert "transformer.wpe.weight" in found


@pytest.mark.parametrize("reinit", ["residual", "none"])
def test_learned_weights_are_left_alone(reinit: str) -> None:
    residual, shapes = mapped("gpt2")
    assert list(SmallInit()(residual, Context(reinit, shapes=shapes))) == []  # type: ignore[arg-type]


def test_head_of_its_own() -> None:
    plans = [plan_of("gpt2", "vanilla", reinit="all", untie=untie) for untie in (False, True)]
    tied, untied = ({fill.parameter for fill in plan.select(Fill)} for plan in plans)
    assert untied - tied == {"lm_head.weight"}


def test_router_is_a_sublayer_matrix() -> None:
    plan = plan_of("mixtral", "vanilla", reinit="all")
    filled = {fill.parameter for fill in plan.select(Fill)}
    assert {f"model.layers.{i}.mlp.gate.weight" for i in range(3)} < filled


def test_inner_projections_of_a_mixer() -> None:
    residual, shapes = mapped("mamba")
    items = list(SmallInit()(residual, Context("all", shapes=shapes)))
    skips = {item.target for item in items if isinstance(item, Skip)}
    assert skips == {f"backbone.layers.{i}.mixer.{x}_proj.weight" for i in range(3) for x in ("x", "dt")}
    assert all("mixer" in item.reason for item in items if isinstance(item, Skip))
