"""Forward passes that write into parameters, buffers and inputs: the map is of what was given, and nothing that was
given changes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spikepatch

WIDTH = 32
Write = Callable[[nn.Parameter], object]


def _give(weight: nn.Parameter, data: Tensor) -> None:
    weight.data = data


#: Each makes another matrix of a parameter, which is no longer in proportion to it.
OTHERWISE: dict[str, Write] = {
    "copy_": lambda w: w.copy_(F.normalize(w, dim=-1)),
    "div_": lambda w: w.div_(w.norm(dim=-1, keepdim=True)),
    "data.copy_": lambda w: w.data.copy_(F.normalize(w.data, dim=-1)),
    "data =": lambda w: _give(w, F.normalize(w.data, dim=-1)),
    "sub_": lambda w: w.sub_(w.mean(-1, keepdim=True)),
    "clamp_": lambda w: w.clamp_(-1, 1),
    "for each": lambda w: torch._foreach_clamp_max_([w], 1.0),
    "rows": lambda w: w[:4].copy_(F.normalize(w[:4], dim=-1)),
}

#: And these the double of it.
DOUBLED: dict[str, Write] = {
    "mul_": lambda w: w.mul_(2),
    "data *=": lambda w: w.data.mul_(2),
    "data = 2 data": lambda w: _give(w, 2 * w.data),
}


class Writing(nn.Module):
    def __init__(self, into: str, write: Write) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 50, bias=False)
        self.count: Tensor
        self.seen: Tensor
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("seen", torch.zeros(50))
        self.into, self.write = into, write

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if self.into and name.endswith(self.into):
                    self.write(parameter)
        self.count.add_(1)
        self.seen.index_add_(0, ids.flatten(), torch.ones(ids.numel()))
        ids[ids > 30] = 0
        x = self.table(ids)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _inspected(model: nn.Module) -> spikepatch.ResidualMap:
    """And nothing that was given is another one now."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(40)[None]
    found = spikepatch.inspect(model, example_inputs={"ids": ids})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(ids, torch.arange(40)[None])
    return found


class Replacing(nn.Linear):
    """A parameter is replaced by another one in each pass."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        self.weight = nn.Parameter(F.normalize(self.weight, dim=-1))
        return super().forward(input)


def test_a_parameter_that_each_pass_replaces_is_not_proven() -> None:
    model = Writing("", lambda _: None)
    for block in model.blocks:
        block.add_module("2", Replacing(64, WIDTH))
    found = _inspected(model)
    assert not found.proven
    assert "weight" in found.leaks[0]


def test_buffers_and_inputs_are_left_alone() -> None:
    found = _inspected(Writing("", lambda _: None))
    assert (found.proven, found.sublayers) == (True, 2), found.leaks
    assert [(e.parameter, e.scale) for e in found.embeddings] == [("table.weight", 1.0)]


@pytest.mark.parametrize("write", OTHERWISE)
def test_a_projection_that_each_pass_computes_anew_is_not_proven(write: str) -> None:
    """To draw it smaller would change nothing, or something else."""
    found = _inspected(Writing("2.weight", OTHERWISE[write]))
    assert not found.proven
    assert "its last matrix is no parameter, but computed" in found.leaks[0]


@pytest.mark.parametrize("write", DOUBLED)
def test_a_weight_that_each_pass_doubles_has_that_factor(write: str) -> None:
    found = _inspected(Writing("2.weight", DOUBLED[write]))
    assert found.proven, found.leaks
    assert [p.multiplier for p in found.residual_projections] == [2.0, 2.0]
    found = _inspected(Writing("table.weight", DOUBLED[write]))
    assert [(e.kind, e.scale) for e in found.embeddings] == [("token", 2.0)]


@pytest.mark.parametrize("write", OTHERWISE)
def test_a_table_that_each_pass_computes_anew_is_not_scaled(write: str) -> None:
    found = _inspected(Writing("table.weight", OTHERWISE[write]))
    assert found.embeddings == ()
    with pytest.raises(spikepatch.Refused, match="no token embedding enters the stream"):
        spikepatch.plan(
            Writing("table.weight", OTHERWISE[write]), "scaled-embed", reinit="all",
            example_inputs={"ids": torch.arange(8)[None]},
        )  # fmt: skip


@pytest.mark.parametrize("factor", [2.0, 0.25])
def test_a_factor_on_the_table_itself(factor: float) -> None:
    """``F.embedding(ids, 2 * weight)`` enters twice as large as the weight."""

    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, factor * self.weight)

    model = Writing("", lambda _: None)
    model.table = Scaled(50, WIDTH)
    assert [(e.kind, e.scale) for e in _inspected(model).embeddings] == [("token", factor)]
