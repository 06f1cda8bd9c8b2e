"""Constant factors between a projection and the stream, however they are written: the truth is what a block adds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import spikepatch
from spikepatch.plans.plan import Fill
from tests.residual.test_own_size import inspected

WIDTH = 64
HALF = torch.full((WIDTH,), 0.5)

#: Of the stream x and what the last matrix W puts out for h.
Joined = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1)


JOINED: dict[str, Joined] = {
    "added": lambda x, h, w: x + F.linear(h, w),
    "subtracted": lambda x, h, w: x - F.linear(h, w),
    "alpha of an addition": lambda x, h, w: torch.add(x, F.linear(h, w), alpha=0.5),
    "alpha of a subtraction": lambda x, h, w: torch.sub(x, F.linear(h, w), alpha=0.5),
    "alpha, the other way round": lambda x, h, w: torch.rsub(F.linear(h, w), x, alpha=0.5),
    "alpha of the product": lambda x, h, w: torch.addmm(rows(x), rows(h), w.t(), alpha=0.5).view_as(x),
    "with the product": lambda x, h, w: torch.addmm(rows(x), rows(h), w.t()).view_as(x),
    "with a batch of products": lambda x, h, w: torch.baddbmm(x, h, w.t().expand(len(x), -1, -1)),
    "addcmul": lambda x, h, w: torch.addcmul(x, F.linear(h, w), HALF, value=3),
    "a number": lambda x, h, w: x + F.linear(h, w) / 4,
    "a tensor of one": lambda x, h, w: x + F.linear(h, w) / torch.tensor(4.0),
    "a row of numbers": lambda x, h, w: x + HALF * F.linear(h, w),
    "a computed number": lambda x, h, w: x + F.linear(h, w) * torch.tensor(0.5).log().exp(),
    "two numbers": lambda x, h, w: x + 3 * F.linear(h, w) / 4,
    "twice the value": lambda x, h, w: x + (lambda p: p + p)(F.linear(h, w)),
    "a sum of copies": lambda x, h, w: x + torch.stack([F.linear(h, w)] * 4).sum(0),
    "a mean of copies": lambda x, h, w: x + torch.stack([F.linear(h, w)] * 4).mean(0),
    "a sum over an axis": lambda x, h, w: x + F.linear(h, w).unsqueeze(0).expand(4, -1, -1, -1).sum(0),
    "on the weight": lambda x, h, w: x + F.linear(h, 2 * w),
    "on both": lambda x, h, w: x + F.linear(h, w / 4) * 2,
}


class Block(nn.Module):
    def __init__(self, joined: Joined) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.joined = joined

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.joined(x, F.gelu(self.up(self.norm(x))), self.down.weight)


class Model(nn.Module):
    def __init__(self, joined: Joined) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50, bias=False)
        self.blocks = nn.ModuleList(Block(joined) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("name", JOINED)
def test_the_factor_is_what_the_block_multiplies_with(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, h = torch.randn(1, 12, WIDTH, generator=generator), torch.randn(1, 12, 4 * WIDTH, generator=generator)
    w = torch.randn(WIDTH, 4 * WIDTH, generator=generator)
    added = (JOINED[name](x, h, w) - x) / F.linear(h, w)
    residual = inspected(Model(JOINED[name]))
    assert (residual.proven, residual.sublayers, residual.placement) == (True, 2, "pre-norm")
    for projection in residual.residual_projections:
        assert abs(projection.multiplier) == pytest.approx(float(added.abs().median()), rel=1e-5)
        assert ("multiplier" in [step.kind for step in projection.between]) == (projection.multiplier != 1)


def test_a_value_that_is_added_in_two_steps_is_one_sublayer() -> None:
    residual = inspected(Model(lambda x, h, w: x + F.linear(h, w) + F.linear(h.flip(-1), w)))
    assert (residual.proven, residual.sublayers) == (True, 2)


def test_a_plan_takes_the_factor_out() -> None:
    stds = {}
    for name in ("added", "alpha of an addition", "twice the value"):
        model = Model(JOINED[name])
        plan = spikepatch.plan(model, "scaled-embed", reinit="all", example_inputs={"ids": torch.arange(12)[None]})
        fills = {edit.parameter: edit.std for edit in plan.select(Fill)}
        stds[name] = fills["blocks.0.down.weight"]
    assert stds["alpha of an addition"] == pytest.approx(2 * stds["added"])
    assert stds["twice the value"] == pytest.approx(stds["added"] / 2)
