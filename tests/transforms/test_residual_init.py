"""Residual scaling: projections end with std s / sqrt(S) on the stream, however the architecture multiplies."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import spikepatch
from spikepatch.planning import tensor_shapes
from spikepatch.plans import Context, Fill, Skip
from spikepatch_transforms.residual_init import ResidualInit
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


def test_learned_projections_are_left_alone() -> None:
    assert list(ResidualInit()(spikepatch.inspect(tiny_model("gpt2")), Context("none"))) == []


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
