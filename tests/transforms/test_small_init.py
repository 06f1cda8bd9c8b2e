"""Small initialisation: which weights are N(0, 2 / (5 d)), and which are left to the architecture."""

from __future__ import annotations

import math

import pytest

import spikepatch
from spikepatch.planning import tensor_shapes
from spikepatch.plans import Context, Fill, Skip
from spikepatch_transforms.small_init import SmallInit
from tests.architectures import tiny_model

STD = math.sqrt(2 / (5 * 64))


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
