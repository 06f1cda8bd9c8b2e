"""Small initialisation: which weights are N(0, 2 / (5 d)), and which are left to the architecture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import spikepatch
from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, Fill, Recipe, Skip
from spikepatch.source.layout import tensor_shapes
from spikepatch_transforms.small_init import SmallInit
from tests.architectures import tiny_model

STD = math.sqrt(2 / (5 * 64))


def fills(model_type: str, config: SmallInit) -> dict[str, Fill]:
    plan = spikepatch.plan(tiny_model(model_type), Recipe("one", (config,)), reinit="all")
    return {fill.parameter: fill for fill in plan.select(Fill)}


def test_equation_on_real_tensors() -> None:
    """Mean and std of the drawn matrices, within 6 standard errors; nothing else has that std."""
    model = tiny_model("llama")
    plan = spikepatch.plan(model, "vanilla", reinit="all", seed=2)
    spikepatch.patch(model, plan)
    checked = 0
    for fill in plan.select(Fill):
        if not fill.depth:
            weight = model.get_parameter(fill.parameter).detach().double()
            n = weight.numel()
            assert abs(float(weight.mean())) < 6 * STD / math.sqrt(n), fill.parameter
            assert abs(float(weight.std()) / STD - 1) < 6 / math.sqrt(2 * n), fill.parameter
            checked += 1
    assert checked == 2 + 3 * 5  # embedding, head; q, k, v, gate, up per layer


def test_xavier_counts_each_matrix_by_itself() -> None:
    """2 / (fan_in + fan_out): fused queries, keys and values as one, experts one by one, tables as torch counts."""
    gpt2 = fills("gpt2", SmallInit("xavier"))
    assert gpt2["transformer.h.0.attn.c_attn.weight"].std == pytest.approx(math.sqrt(2 / (64 + 192)), rel=1e-15)
    assert gpt2["transformer.wte.weight"].std == pytest.approx(math.sqrt(2 / (500 + 64)), rel=1e-15)
    mixtral = fills("mixtral", SmallInit("xavier"))
    assert mixtral["model.layers.0.mlp.experts.gate_up_proj"].std == pytest.approx(math.sqrt(2 / (64 + 192)), rel=1e-15)
    reference = torch.nn.init.xavier_normal_(torch.empty(500, 64), generator=torch.Generator().manual_seed(0))
    assert abs(gpt2["transformer.wte.weight"].std / float(reference.std()) - 1) < 6 / math.sqrt(2 * 500 * 64)


def test_fan_in() -> None:
    """1 / sqrt(fan_in), with the axis that it runs along, so that another config's is known."""
    for model_type in ("gpt2", "llama", "mixtral"):
        model = tiny_model(model_type)
        found = fills(model_type, SmallInit("fan_in"))
        assert len(found) > 6
        for name, fill in found.items():
            (axis,) = fill.axes
            assert model.get_parameter(name).shape[axis] == fill.fan == 64
            assert fill.std == pytest.approx(1 / 8, rel=1e-15)


@pytest.mark.parametrize(
    ("config", "distribution", "largest"),
    [
        (SmallInit(cut=2.0), "truncated", 2 / 0.8796256610342398),
        (SmallInit("normal", STD, cut=2.0), "truncated", 2 / 0.8796256610342398),
        (SmallInit(uniform=True), "uniform", math.sqrt(3)),
    ],
)
def test_other_distributions_have_the_same_std(config: SmallInit, distribution: str, largest: float) -> None:
    """The std that is meant is that of the weights, also where the tails are cut off."""
    model = tiny_model("llama")
    plan = spikepatch.plan(model, Recipe("other", (config,)), reinit="all")
    spikepatch.patch(model, plan)
    checked = 0
    for fill in plan.select(Fill):
        assert (fill.std, fill.distribution) == (STD, distribution)
        weight = model.get_parameter(fill.parameter).detach().double()
        assert abs(float(weight.std()) / STD - 1) < 6 / math.sqrt(2 * weight.numel()), fill.parameter
        assert float(weight.abs().max()) <= largest * STD * (1 + torch.finfo(torch.float32).eps)
        checked += 1
    assert checked == 2 + 3 * 5


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


def test_twice_is_once() -> None:
    """Values only: the same seed draws the same bits again."""
    model = tiny_model("gpt2")
    states = []
    for _ in range(2):
        spikepatch.patch(model, "xavier", reinit="all", seed=2)
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


@pytest.mark.parametrize("reinit", ["residual", "none"])
def test_learned_weights_are_left_alone(reinit: str) -> None:
    model = tiny_model("gpt2")
    assert list(SmallInit()(spikepatch.inspect(model), Context(reinit, shapes=tensor_shapes(model)))) == []  # type: ignore[arg-type]


def test_head_of_its_own() -> None:
    plans = [spikepatch.plan(tiny_model("gpt2"), "vanilla", reinit="all", untie=untie) for untie in (False, True)]
    tied, untied = ({fill.parameter for fill in plan.select(Fill)} for plan in plans)
    assert untied - tied == {"lm_head.weight"}


def test_router_is_a_sublayer_matrix() -> None:
    plan = spikepatch.plan(tiny_model("mixtral"), "vanilla", reinit="all")
    filled = {fill.parameter for fill in plan.select(Fill)}
    assert {f"model.layers.{i}.mlp.gate.weight" for i in range(3)} < filled


def test_inner_projections_of_a_mixer() -> None:
    """They are skipped, and keep what transformers' initialiser gives: here a bias that sets the time step."""
    model = tiny_model("mamba")
    items = list(SmallInit()(spikepatch.inspect(model), Context("all", shapes=tensor_shapes(model))))
    skips = {item.target for item in items if isinstance(item, Skip)}
    assert skips == {f"backbone.layers.{i}.mixer.{x}_proj.weight" for i in range(3) for x in ("x", "dt")}
    assert all("mixer" in item.reason for item in items if isinstance(item, Skip))
    before = {name: float(model.get_parameter(name).detach().std()) for name in skips}
    spikepatch.patch(model, "vanilla", reinit="all")
    for name, std in before.items():
        weight = model.get_parameter(name).detach()
        assert abs(float(weight.std()) / std - 1) < 6 / math.sqrt(weight.numel()), name
