"""What stands between a residual projection and the stream, and what its weight goes through: the truth is the function
itself, run on a value and on a larger one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import spikepatch
from spikepatch import Recipe
from spikepatch_transforms.residual_init import ResidualInit

WIDTH = 64
Function = Callable[[torch.Tensor], torch.Tensor]

OUTPUTS: dict[str, Function] = {
    "nothing": lambda p: p,
    "a constant": lambda p: 3 * p,
    "mean of sizes": lambda p: p / p.abs().mean(-1, keepdim=True),
    "largest size": lambda p: p / p.abs().amax(-1, keepdim=True),
    "largest distance": lambda p: p / (p.amax(-1, keepdim=True) - p.amin(-1, keepdim=True)),
    "length of all": lambda p: p / p.norm(),
    "length over tokens": lambda p: p / p.norm(dim=1, keepdim=True),
    "mean square of all": lambda p: p * torch.rsqrt(p.square().mean((1, 2), keepdim=True) + 1e-6),
    "deviation over tokens": lambda p: (p - p.mean(1, keepdim=True)) / p.std(1, keepdim=True),
    "without its gradient": lambda p: p / p.detach().abs().mean(-1, keepdim=True),
    "normalize, p = 1": lambda p: F.normalize(p, p=1.0, dim=-1),
    "heads of their own": lambda p: F.normalize(p.view(*p.shape[:2], 4, -1), dim=-1).flatten(2),
    "rms norm": lambda p: F.rms_norm(p, (WIDTH,)),
    "smallest and largest": lambda p: (p - p.amin(-1, True)) / (p.amax(-1, True) - p.amin(-1, True)),
    "batch norm": lambda p: F.batch_norm(p.mT, None, None, training=True).mT,
    "its own gate": lambda p: p * p.sigmoid(),
    "a neighbour's gate": lambda p: p * p.roll(1, 1).sigmoid(),
    "times its size": lambda p: p * p.abs().mean(-1, keepdim=True),
    "the root of its size": lambda p: p / p.abs().mean(-1, keepdim=True).sqrt(),
    "square": lambda p: p * p,
    "softsign": F.softsign,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softmax": lambda p: p.softmax(-1),
    "clamp": lambda p: p.clamp(-1, 1),
    "sums over tokens": lambda p: p.cumsum(1),
}  # fmt: skip

WEIGHTS: dict[str, Function] = {
    "nothing": lambda w: w,
    "a constant": lambda w: 2 * w,
    "two constants": lambda w: (w / 4).to(torch.float64).to(torch.float32) * 3,
    "square": lambda w: w * w,
    "times a view of itself": lambda w: w * w.view(-1).view_as(w),
    "times a row of itself": lambda w: w * w[:1],
    "over one of its own": lambda w: w / w[0, 0],
    "over its length": lambda w: w / w.norm(),
    "over its rows' lengths": lambda w: F.normalize(w, dim=-1),
    "times its sizes": lambda w: w * w.abs(),
    "signs": lambda w: w.sign() * w.abs().mean(),
    "centred": lambda w: w - w.mean(),
    "tanh": torch.tanh,
    "cubed": lambda w: w @ w.mT @ w,
}


class Block(nn.Module):
    def __init__(self, output: Function, weight: Function) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.output, self.weight = output, weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.output(F.linear(F.gelu(self.up(self.norm(x))), self.weight(self.down.weight)))


class Model(nn.Module):
    def __init__(self, output: Function = OUTPUTS["nothing"], weight: Function = WEIGHTS["nothing"]) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50, bias=False)
        self.blocks = nn.ModuleList(Block(output, weight) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def inspected(model: nn.Module) -> spikepatch.ResidualMap:
    return spikepatch.inspect(model, example_inputs={"ids": torch.arange(12)[None]})


def ratios(function: Function, *size: int) -> tuple[float, float]:
    """The smallest and the largest of f(100 x) / f(x)."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(3))
    found = function(100 * x) / function(x)
    found = found[found.isfinite()]
    return float(found.min()), float(found.max())


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_is_added_is_in_proportion_or_behind_a_norm(name: str) -> None:
    low, high = ratios(OUTPUTS[name], 2, 12, WIDTH)
    residual = inspected(Model(output=OUTPUTS[name]))
    if not residual.proven:
        assert name not in [*OUTPUTS][:13]
        assert "function of itself" in residual.leaks[0] or "it ends in " in residual.leaks[0]
    elif residual.placement == "branch-norm":
        assert low == pytest.approx(1, rel=0.01) == high
        assert all(p.branch_norm and [b.kind for b in p.between] == ["norm"] for p in residual.residual_projections)
    else:
        assert low == pytest.approx(100, rel=0.01) == high
        assert residual.placement == "pre-norm"


def test_a_plan_divides_nothing_that_is_divided_by_its_own_size() -> None:
    model = Model(output=OUTPUTS["mean of sizes"])
    example = {"ids": torch.arange(12)[None]}
    plan = spikepatch.plan(model, "scaled-embed", reinit="all", example_inputs=example)
    skipped = [skip for skip in plan.skips if "divides the product by its own size" in skip.reason]
    assert [skip.target for skip in skipped] == [f"blocks.{i}.down.weight * 1/sqrt(2)" for i in range(2)]
    of_gains = spikepatch.plan(
        model, Recipe("gains", (ResidualInit(branch_gain=True),)), reinit="all", example_inputs=example
    )
    assert any(skip.reason == "the norm has no gain" for skip in of_gains.skips)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_is_a_projection_where_its_product_is_in_proportion_to_it(name: str) -> None:
    low, high = ratios(WEIGHTS[name], WIDTH, WIDTH)
    residual = inspected(Model(weight=WEIGHTS[name]))
    assert residual.proven or name not in {"nothing", "a constant", "two constants"}
    if residual.proven:
        assert low == pytest.approx(100, rel=0.01) == high
        w = torch.ones(WIDTH, WIDTH)
        factor = float((WEIGHTS[name](w) / w).mean())
        assert [p.multiplier for p in residual.residual_projections] == [factor, factor]
    else:
        assert "its last matrix is no parameter, but computed" in residual.leaks[0]
