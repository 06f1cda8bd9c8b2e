"""Norms on the stream and on tables, and tables whose rows another model picks: what they make of the map."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spikepatch
from tests.residual.test_stream import EXAMPLE, Block

WIDTH = 32


def unit(x: torch.Tensor) -> torch.Tensor:
    length: torch.Tensor = x.norm(dim=-1, keepdim=True)
    return x / length


class Tokens(nn.Module):
    """Tokens and positions, blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, WIDTH), nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.step = nn.Parameter(torch.full((WIDTH,), 0.05))

    def added(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(block, Block)
        out: torch.Tensor = block.down(torch.relu(block.up(block.norm(x))))
        return out


class StepsOnASphere(Tokens):
    """nGPT: x = unit(x + a (unit(f(x)) - x))."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = unit(x + self.step * (unit(self.added(block, x)) - x))
        logits: torch.Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("recipe", ["scaled-embed", "unit-embed", "embed-ln"])
def test_a_norm_behind_every_addition_is_told_before_those_on_branches(recipe: str) -> None:
    """The stream is as large as the norm makes it, so a large shortcut is refused."""
    model = StepsOnASphere()
    found = spikepatch.inspect(model, example_inputs=EXAMPLE)
    assert (found.proven, found.placement) == (True, "post-norm")
    assert all(p.branch_norm is not None for p in found.residual_projections)
    with pytest.raises(spikepatch.Refused, match="a norm on the stream itself, after every addition"):
        spikepatch.plan(model, recipe, reinit="all", example_inputs=EXAMPLE)


class NormedTables(Tokens):
    """Each table is normed for itself, to unit length; and one norm of both behind that, if ``both``."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if both else nn.Identity()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        x = self.norm(unit(self.tokens(ids)) + unit(self.positions(positions)))
        for block in self.blocks:
            x = x + self.added(block, x)
        logits: torch.Tensor = self.head(x)
        return logits


def test_a_normed_table_is_told_with_its_own_size() -> None:
    """Not with that of the sum, which is larger by sqrt(2)."""
    found = spikepatch.inspect(NormedTables(both=False), example_inputs=EXAMPLE)
    assert [e.normed for e in found.embeddings] == [True, True]
    assert [e.scale for e in found.embeddings] == pytest.approx([WIDTH**-0.5] * 2, rel=0.1)
    assert found.placement == "pre-norm"


class Picked(Tokens):
    """An image becomes tokens: a residual network picks the nearest rows of a codebook."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.codes = nn.Linear(8, WIDTH), nn.Embedding(50, WIDTH)
        self.tower = nn.ModuleList(Block(WIDTH) for _ in range(2))

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        x = self.patches(image)
        for block in self.tower:
            x = nn.functional.layer_norm(x + self.added(block, x) * x, [WIDTH])  # no sum
        picked = (x @ self.codes.weight.T).argmax(-1)
        x = self.tokens(torch.cat([picked, ids], dim=1))
        for block in self.blocks:
            x = x + self.added(block, x)
        logits: torch.Tensor = self.head(x)
        return logits


def test_what_picks_tokens_is_no_part_of_the_sum() -> None:
    """It is a tower: no gradient reaches it, and it is left as it is."""
    example = {**EXAMPLE, "image": torch.randn(1, 4, 8)}
    found = spikepatch.inspect(Picked(), example_inputs=example)
    assert (found.proven, found.sublayers) == (True, 2)
    assert [e.parameter for e in found.embeddings] == ["tokens.weight"]
    roles = {use.parameter.split(".")[0]: use.role for use in found.uses}
    assert (roles["tower"], roles["patches"], roles["tokens"]) == ("entrance", "entrance", "embedding")


def test_what_the_tokens_themselves_pick_is_looked_at() -> None:
    """A stream that is lost in a choice of rows is not the table that they are of."""

    class Lost(Tokens):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.tokens(ids)
            for block in self.blocks:
                x = x + self.added(block, x)
            x = self.positions((x @ self.positions.weight.T).argmax(-1))
            for block in self.blocks:
                x = x + self.added(block, x)
            logits: torch.Tensor = self.head(x)
            return logits

    found = spikepatch.inspect(Lost(), example_inputs=EXAMPLE)
    assert not found.proven
