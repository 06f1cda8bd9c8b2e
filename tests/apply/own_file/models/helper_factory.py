# ruff: noqa
# mypy: ignore-errors
# fmt: off
"""A ModuleList of blocks; both embeddings come from one helper, and nothing is imported that is not needed."""
from __future__ import annotations

from torch import arange, nn


def make_embedding(rows: int, width: int) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=0.02)
    return table


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        return self.down(self.up(self.norm(x)).relu())


class Mixer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.reads = nn.Linear(width, 3 * width)
        self.down = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.reads(self.norm(x)).chunk(3, dim=-1)
        return self.down(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class Model(nn.Module):
    def __init__(self, vocabulary: int = 64, length: int = 48, width: int = 24, depth: int = 2) -> None:
        super().__init__()
        self.tokens = make_embedding(
            vocabulary,
            width,
        )  # é, so that columns in bytes and in characters differ
        self.positions = make_embedding(length, width)
        blocks = [kind(width) for _ in range(depth) for kind in (Mixer, FeedForward)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        é = self.norm; self.head = nn.Linear(width, vocabulary, bias=é is None)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def build(**sizes: int) -> Model:
    return Model(**sizes)
