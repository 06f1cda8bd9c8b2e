"""Residual scaling: projections end with std s / sqrt(S) on the stream, however the architecture multiplies."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import spikepatch
from spikepatch.errors import Refused
from spikepatch.plans.plan import Constant, Context, Fill, Recipe, Skip
from spikepatch.residual.map import Between
from spikepatch.source.layout import tensor_shapes
from spikepatch_transforms.residual_init import ResidualInit
from spikepatch_transforms.small_init import SmallInit
from tests.architectures import ids, tiny_model

SMALL = math.sqrt(2 / (5 * 64))


@pytest.mark.parametrize("reinit", ["all", "residual"])
@pytest.mark.parametrize(("model_type", "sublayers"), [("gpt2", 6), ("mamba", 3), ("mixtral", 6)])
def test_equation_on_real_tensors(model_type: str, sublayers: int, reinit: Any) -> None:
    model = tiny_model(model_type)
    plan = spikepatch.plan(model, "vanilla", reinit=reinit)
    spikepatch.patch(model, plan)
    projections = [fill for fill in plan.select(Fill) if fill.depth]
    assert len(projections) == sublayers
    for fill in projections:
        weight = model.get_parameter(fill.parameter).detach().double()
        std = SMALL / math.sqrt(sublayers)
        assert abs(float(weight.std()) / std - 1) < 6 / math.sqrt(2 * weight.numel()), fill.parameter


def test_a_multiplier_is_not_applied_twice() -> None:
    """What a block adds to the stream is the same, whatever constant the architecture multiplies it by."""
    added = {}
    for multiplier in (1.0, 0.25):
        model = tiny_model("granite", residual_multiplier=multiplier)
        spikepatch.patch(model, "vanilla", reinit="all")
        with torch.no_grad():
            states = model(ids(model), output_hidden_states=True).hidden_states
        added[multiplier] = states[1] - states[0]
    size = float(added[1.0].abs().max())
    assert size > 0
    # The weights are powers of two apart, so products and sums only differ where the smaller ones round.
    slack = 64 * torch.finfo(torch.float32).eps * max(1.0, float(states[0].abs().max()))
    assert float((added[1.0] - added[0.25]).abs().max()) < slack
    assert slack < size / 100


def test_a_negative_multiplier() -> None:
    model = tiny_model("gpt2")
    residual, context = spikepatch.inspect(model), Context("all", shapes=tensor_shapes(model))
    flipped = tuple(dataclasses.replace(p, multiplier=-2.0) for p in residual.residual_projections)
    fills = list(ResidualInit()(dataclasses.replace(residual, residual_projections=flipped), context))
    assert len(fills) == 6
    assert all(isinstance(f, Fill) and f.std == pytest.approx(SMALL / (2 * math.sqrt(6))) for f in fills)


def fills(model: Any, config: ResidualInit) -> dict[str, Fill]:
    residual, context = spikepatch.inspect(model), Context("all", shapes=tensor_shapes(model))
    return {item.parameter: item for item in config(residual, context) if isinstance(item, Fill)}


def test_wang() -> None:
    """2 / (N sqrt(d)) for every projection, with N = 3 layers; it falls with the depth itself, not with its root."""
    found = fills(tiny_model("llama"), ResidualInit(scale="wang"))
    assert len(found) == 6
    assert all(fill.std == pytest.approx(2 / (3 * 8), rel=1e-15) and fill.depth == -1.0 for fill in found.values())


def test_mitchell() -> None:
    """1 / sqrt(2 d (l + 1)) for W_O, 1 / sqrt(2 d_ffn (l + 1)) for W_2, whichever way round a matrix lies in memory."""
    for model_type, names, inner in (
        ("llama", ("model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.mlp.down_proj.weight"), 96),
        ("gpt2", ("transformer.h.{}.attn.c_proj.weight", "transformer.h.{}.mlp.c_proj.weight"), 256),
    ):
        model = tiny_model(model_type)
        found = fills(model, ResidualInit(scale="mitchell", cut=3.0))
        expected = {
            name.format(layer): 1 / math.sqrt(2 * fan_in * (layer + 1))
            for name, fan_in in zip(names, (64, inner), strict=True)
            for layer in range(3)
        }
        assert {name: fill.std for name, fill in found.items()} == pytest.approx(expected, rel=1e-15)
        for name, fill in found.items():
            assert (fill.distribution, fill.cut, fill.depth) == ("truncated", 3.0, 0.0)
            (axis,) = fill.axes
            assert model.get_parameter(name).shape[axis] == fill.fan == (inner if "mlp" in name else 64)


def test_mitchell_of_experts() -> None:
    """fan_in is one expert's: 96, not that of all four."""
    found = fills(tiny_model("mixtral"), ResidualInit(scale="mitchell"))
    assert found["model.layers.1.mlp.experts.down_proj"].std == pytest.approx(1 / math.sqrt(2 * 96 * 2), rel=1e-15)


def test_mitchell_without_layers() -> None:
    model = tiny_model("gpt2")
    residual = spikepatch.inspect(model)
    loose = tuple(dataclasses.replace(p, layer=None) for p in residual.residual_projections)
    with pytest.raises(Refused, match=r"layer of every residual projection(.|\n)*c_proj\.weight belongs to no layer"):
        list(
            ResidualInit(scale="mitchell")(
                dataclasses.replace(residual, residual_projections=loose), Context("all", shapes=tensor_shapes(model))
            )
        )


@pytest.mark.parametrize("scale", ["wang", "mitchell"])
def test_every_scale_divides_a_multiplier_out(scale: Any) -> None:
    plain = fills(tiny_model("granite"), ResidualInit(scale=scale))
    scaled = fills(tiny_model("granite", residual_multiplier=0.25), ResidualInit(scale=scale))
    assert len(plain) == 6
    for name, fill in plain.items():
        assert scaled[name].std == pytest.approx(4 * fill.std, rel=1e-15)


def test_no_scale() -> None:
    """For recipes that draw every matrix alike; then the architecture's multiplier is left to do its work."""
    found = fills(tiny_model("granite", residual_multiplier=0.25), ResidualInit("normal", 0.02, scale="none"))
    assert {(fill.std, fill.depth, fill.fan) for fill in found.values()} == {(0.02, 0.0, 0)}


def test_the_base_of_another_distribution() -> None:
    """Megatron's scaled_normal: 0.02 / sqrt(2 N), whatever the width."""
    found = fills(tiny_model("gpt2"), ResidualInit("normal", 0.02))
    assert {(fill.std, fill.depth, fill.fan) for fill in found.values()} == {(0.02 / math.sqrt(6), -0.5, 0)}


def test_learned_projections_are_left_alone() -> None:
    assert list(ResidualInit(branch_gain=True)(spikepatch.inspect(tiny_model("gpt2")), Context("none"))) == []


@pytest.mark.parametrize(("model_type", "offset"), [("olmo2", 0.0), ("gemma2", -1.0)])
def test_gain_of_a_branch_norm(model_type: str, offset: float) -> None:
    """olmo2 multiplies by w, gemma2 by 1 + w: either way the branch ends with a size of 1/sqrt(S) on the stream."""
    model = tiny_model(model_type, rms_norm_eps=0.0)
    recipe = Recipe("gains", (SmallInit(), ResidualInit(branch_gain=True)))
    plan = spikepatch.plan(model, recipe, reinit="all")
    constants = plan.select(Constant)
    assert len(constants) == 6
    assert {(c.offset, c.depth) for c in constants} == {(offset, -0.5)}
    assert all(c.value == pytest.approx(1 / math.sqrt(6), rel=1e-15) for c in constants)
    assert len([skip for skip in plan.skips if skip.reason.startswith("scale-invariant")]) == 6
    spikepatch.patch(model, plan)
    outputs = []
    modules = dict(model.named_modules())
    for projection in spikepatch.inspect(model).residual_projections:
        assert projection.branch_norm is not None
        modules[projection.branch_norm].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        model(ids(model))
    assert len(outputs) == 6
    for output in outputs:  # RMSNorm without eps: every token's vector has a root mean square of the gain
        sizes = output.double().square().mean(-1).sqrt()
        slack = 64 * torch.finfo(torch.float32).eps
        assert torch.allclose(sizes, torch.full_like(sizes, 1 / math.sqrt(6)), rtol=slack, atol=0)


def test_a_branch_norm_without_a_gain() -> None:
    model = tiny_model("olmo2")
    residual = spikepatch.inspect(model)
    bare = tuple(dataclasses.replace(norm, gain="none", parameter=None) for norm in residual.norms)
    items = list(
        ResidualInit(branch_gain=True)(
            dataclasses.replace(residual, norms=bare), Context("all", shapes=tensor_shapes(model))
        )
    )
    assert not any(isinstance(item, Constant) for item in items)
    assert len([item for item in items if isinstance(item, Skip) and item.reason == "the norm has no gain"]) == 6


def test_a_factor_before_the_branch_norm() -> None:
    """The norm takes it out, so it says nothing of the size on the stream; no gain is worked out from it."""
    model = tiny_model("olmo2")
    residual = spikepatch.inspect(model)
    before = tuple(
        dataclasses.replace(p, multiplier=3.0, between=(Between("multiplier", None), *p.between))
        for p in residual.residual_projections
    )
    context = Context("all", shapes=tensor_shapes(model))
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
    plan = spikepatch.plan(tiny_model("llama"), Recipe("gains", (ResidualInit(branch_gain=True),)), reinit="all")
    assert len(plan.select(Fill)) == len(plan.edits) == 6


def test_twice_is_once() -> None:
    """Values only: the same seed draws the same bits, and sets the same gains."""
    model = tiny_model("olmo2")
    recipe = Recipe("gains", (SmallInit(), ResidualInit(branch_gain=True)))
    states = []
    for _ in range(2):
        spikepatch.patch(model, recipe, reinit="residual", seed=2)
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_behind_a_branch_norm_the_scale_is_invariant() -> None:
    """The reason that is given holds: without eps in the norm, projections four times smaller give the same bits."""
    model = tiny_model("olmo2", rms_norm_eps=0.0)
    residual = spikepatch.inspect(model)
    items = list(ResidualInit()(residual, Context("all", shapes=tensor_shapes(model))))
    skips = [item for item in items if isinstance(item, Skip)]
    assert len(skips) == 6
    for skip, projection in zip(skips, residual.residual_projections, strict=True):
        assert skip.target.startswith(projection.parameter)
        assert skip.reason.startswith("scale-invariant: ")
        assert projection.branch_norm is not None
        assert projection.branch_norm in skip.reason
    assert all(fill.std == SMALL and not fill.depth for fill in items if isinstance(fill, Fill))

    with torch.no_grad():
        before = model(ids(model)).logits
        for projection in residual.residual_projections:
            model.get_parameter(projection.parameter).div_(4)
        after = model(ids(model)).logits
    assert torch.equal(before, after)
