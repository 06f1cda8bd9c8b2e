"""The numbers that a model begins with, drawn by its own initialiser, where the model itself has none yet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spikepatch

WIDTH = 64

#: A table of this many rows takes a terabyte.
MANY = 1 << 32


class Gained(nn.Module):
    """A table with a gain beside it, in one module."""

    def __init__(self, rows: int, gain: str) -> None:
        super().__init__()
        self.kind = gain
        self.weight = nn.Parameter(torch.empty(rows, WIDTH))
        self.gain = nn.Parameter(torch.empty(WIDTH))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(std=0.25)
        if self.kind == "a number":
            self.gain.fill_(8.0)
        elif self.kind == "a value":
            self.gain.fill_(8 * float(self.weight.std()) / 0.25)
        elif self.kind == "a copy":
            self.gain.copy_(8 * self.weight.square().mean(0).sqrt() / 0.25)
        else:
            self.gain.data = 8 * torch.ones(WIDTH, device=self.weight.device) * self.weight.std() / 0.25

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self.weight) * self.gain


class Small(nn.Module):
    def __init__(self, rows: int, gain: str) -> None:
        super().__init__()
        self.table = Gained(rows, gain)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = x + block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@pytest.mark.parametrize(
    ("rows", "gain"), [(MANY, "a number"), (50, "a number"), (5000, "a value"), (5000, "a copy"), (5000, "other data")]
)
def test_a_gain_that_has_no_value_yet_is_the_one_it_begins_with(rows: int, gain: str) -> None:
    """Whatever it is made of; and a large table beside it takes no memory."""
    with torch.device("meta"):
        model = Small(rows, gain)
    found = spikepatch.inspect(model, example_inputs={"ids": torch.arange(6)[None]})
    assert (found.proven, found.sublayers) == (True, 2), found.leaks
    # The deviation of 5000 x 64 normal numbers is off by 1 / sqrt(2 n), that of one column of them by 0.01.
    assert [e.scale for e in found.embeddings] == pytest.approx([8], rel=0.01)
