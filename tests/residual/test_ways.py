"""The ways that a forward pass may go: questions that Python can ask of ids, of hidden states, of sizes.

The model skips every other block where the answer is yes; what is true of it is in its code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import spikepatch

EXAMPLE = {"ids": torch.arange(5, 16)[None]}
WIDTH = 32

Question = Callable[[torch.Tensor, torch.Tensor], object]

#: Asked of (ids, x), the stream. On the example the answers are no, or not known.
QUESTIONS: dict[str, Question] = {
    "bool of data": lambda ids, x: bool(x.abs().amax() > 100),
    "item of data": lambda ids, x: x.abs().amax().item() > 100,
    "item of data and a float": lambda ids, x: x.abs().amax().item() > 100.5,
    "item of data, times a float": lambda ids, x: 0.5 * x.abs().amax().item() > 50,
    "item of data, computed with": lambda ids, x: 2 * x.abs().amax().item() + 1 >= 100,
    "truth of data": lambda ids, x: (x.abs().amax() > 100).item(),
    "all close": lambda ids, x: not torch.allclose(x, 2 * x),
    "choice of data": lambda ids, x: x.abs().amax(-1).argmax(-1).tolist()[0] > 100,
    "rows of data": lambda ids, x: len(x[x[..., 0] > 100]) == 0,
    "bool of ids": lambda ids, x: bool((ids == 3).any()),
    "item of ids": lambda ids, x: ids.max().item() > 40,
    "list of ids": lambda ids, x: max(ids[0].tolist()) > 40,
    "in": lambda ids, x: 3 in ids,
    "equal": lambda ids, x: torch.equal(ids, 0 * ids),
    "count of ids": lambda ids, x: torch.unique(ids).numel() < 4,
    "rows of ids": lambda ids, x: ids[ids == 3].shape[0] > 0,
    "numbers of rows": lambda ids, x: (ids == 3).nonzero().size(0) > 0,
    "length of rows": lambda ids, x: len((ids == 3).nonzero()) > 0,
    "a drawn number": lambda ids, x: torch.rand(()).item() > 2,
    "length": lambda ids, x: ids.shape[1] > 64,
    "length of the stream": lambda ids, x: x.size(1) >= 1000,
    "length by len": lambda ids, x: len(ids[0]) > 64,
    "half the length": lambda ids, x: x.shape[1] // 2 > 100,
    "half the length, a float first": lambda ids, x: 0.5 * x.shape[1] > 100,
    "a share of the length": lambda ids, x: round(0.9 * ids.shape[1]) > 400,
    "length, exactly": lambda ids, x: x.shape[1] == 48,
    "shorter": lambda ids, x: x.shape[-2] < 8,
    "rows": lambda ids, x: ids.shape[0] > 1,
    "tokens of all rows": lambda ids, x: x.flatten(0, 1).shape[0] > 600,
}
#: Answers that Python takes without a question: the ids themselves are tried, and the map holds for such inputs only.
TAKEN: dict[str, Question] = {
    "int of data": lambda ids, x: int(x.abs().amax()) > 100,
    "float of data": lambda ids, x: float(x.abs().amax()) > 100,
    "int of a number": lambda ids, x: int(x.abs().amax().item()) > 100,
    "int of ids": lambda ids, x: int(ids.max()) > 40,
    "an array": lambda ids, x: ids.numpy().max() > 40,
    "in words": lambda ids, x: f"{ids.max()}".startswith("4"),
    "a set": lambda ids, x: len(set(ids[0].tolist())) < 3,
}


class Asking(nn.Module):
    def __init__(self, question: Question) -> None:
        super().__init__()
        self.question = question
        self.embedding, self.norm = nn.Embedding(50, WIDTH), nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for i, block in enumerate(self.blocks):
            if i % 2 and self.question(ids, x):
                continue
            x = x + block(self.norm(x))
        logits: torch.Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_way_with_other_sublayers(name: str) -> None:
    found = spikepatch.inspect(Asking(QUESTIONS[name]), example_inputs=EXAMPLE)
    assert not found.proven
    assert "sub-layers, where this one has" in found.leaks[0]
    assert "test_ways.py, line" in found.leaks[0] or "tokens, not 11" in found.leaks[0]


@pytest.mark.parametrize("name", TAKEN)
def test_a_number_that_python_has(name: str) -> None:
    model = Asking(TAKEN[name])
    found = spikepatch.inspect(model, example_inputs=EXAMPLE)
    assert not found.proven or "test_ways.py, line" in found.conditions[0]
    with pytest.raises(spikepatch.Refused, match=r"test_ways\.py, line"):
        spikepatch.plan(model, "vanilla", reinit="all", example_inputs=EXAMPLE)


class Looping(Asking):
    """The ids, or the stream, say how often a block is run."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for _ in range(self.question(ids, x)):  # type: ignore[call-overload]
            x = x + self.blocks[0](self.norm(x))
        logits: torch.Tensor = self.head(x)
        return logits


@pytest.mark.parametrize(
    "count",
    [
        lambda ids, x: int(ids.max()) // 7,
        lambda ids, x: ids.max().item() // 7,
        lambda ids, x: 1 + x.abs().amax(-1).argmax(-1).tolist()[0],
    ],
)
def test_a_loop_of_so_many(count: Question) -> None:
    found = spikepatch.inspect(Looping(count), example_inputs=EXAMPLE)
    assert not found.proven or found.conditions


class Gated(Asking):
    """A gate on the stream that leaves the graph as a number."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = torch.sigmoid(x.mean()).item() * x + block(self.norm(x))
        logits: torch.Tensor = self.head(x)
        return logits


def test_a_factor_that_leaves_the_graph() -> None:
    found = spikepatch.inspect(Gated(QUESTIONS["in"]), example_inputs=EXAMPLE)
    assert "test_ways.py, line" in found.conditions[0]


class Experts(Asking):
    """A loop over those of the experts that some token was sent to."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        flat = self.norm(x).flatten(0, 1)
        weights, chosen = self.head(flat)[:, :4].softmax(-1).topk(2, dim=-1)
        mixed = torch.zeros_like(flat)
        for i, expert in enumerate(self.blocks):
            rows, which = torch.where(chosen == i)
            if rows.numel() == 0:
                continue
            mixed.index_add_(0, rows, expert(flat[rows]) * weights[rows, which, None])
        logits: torch.Tensor = self.head(x + mixed.view_as(x))
        return logits


@pytest.mark.parametrize(
    "question",
    [
        lambda ids, x: False,
        lambda ids, x: ids.shape[1] > 10**6,  # longer than anything that is tried
        lambda ids, x: (x.shape[0] == ids.shape[0]) is False,
    ],
)
def test_ways_that_add_nothing(question: Question) -> None:
    found = spikepatch.inspect(Asking(question), example_inputs=EXAMPLE)
    assert (found.proven, found.conditions, found.sublayers) == (True, (), 4)


def test_a_choice_among_equal_experts() -> None:
    found = spikepatch.inspect(Experts(QUESTIONS["in"]), example_inputs=EXAMPLE)
    assert (found.proven, found.conditions, found.sublayers) == (True, (), 1)
    assert len(found.residual_projections) == 4


class Differing(nn.Module):
    """The same sub-layers on every way, and something else about them."""

    def __init__(self, place: str, change: Callable[[Differing, torch.Tensor, int], torch.Tensor]) -> None:
        super().__init__()
        self.place, self.change = place, change
        self.embedding, self.positions = nn.Embedding(50, WIDTH), nn.Embedding(2048, WIDTH)
        self.norm, self.other, self.final = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.head, self.other_head = nn.Linear(WIDTH, 50, bias=False), nn.Linear(WIDTH, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tokens = ids.shape[1]

        def at(place: str, value: torch.Tensor, usual: torch.Tensor) -> torch.Tensor:
            return self.change(self, value, tokens) if place == self.place else usual

        x = self.embedding(ids)
        x = at("embedding", x, x)
        for block in self.blocks:
            h = at("input", x, self.norm(x))
            y = block(h)
            x = x + at("branch", y, y)
        logits: torch.Tensor = at("end", x, self.head(self.final(x)))
        return logits


#: Where, what is computed there of the model, the value and the number of tokens, and what is said of it.
DIFFERING: dict[str, tuple[str, Callable[[Differing, torch.Tensor, int], torch.Tensor], str]] = {
    "a factor by a branch": ("branch", lambda m, y, n: 0.5 * y if n > 64 else y, "0.5 as the factor on blocks.0"),
    "a factor by a choice": ("branch", lambda m, y, n: y * (0.5 if n > 64 else 1.0), "the number 0.5"),
    "a factor of the length": ("branch", lambda m, y, n: y / math.sqrt(n), "the number 22.63"),
    "a power of the length": ("branch", lambda m, y, n: y * n**-0.5, "the number 0.04419"),
    "the length": ("branch", lambda m, y, n: y / n, "the number 512"),
    "a tensor of the length": ("branch", lambda m, y, n: y * torch.tensor(n**-0.5), "the number 0.04419"),
    "the number of rows": ("branch", lambda m, y, n: y / len(y), "the number 3"),
    "numbers for each token": (
        "branch",
        lambda m, y, n: y * (torch.arange(1.0, n + 1) ** -0.5).view(n, 1).expand(n, WIDTH),
        "in the model's own forward",
    ),
    "whole numbers for each token": (
        "branch",
        lambda m, y, n: y.cumsum(1) / torch.arange(1, n + 1)[:, None],
        "in the model's own forward",
    ),
    "a norm on the branch": ("branch", lambda m, y, n: m.other(y) if n > 64 else y, "the norm other"),
    "no norm before": ("input", lambda m, x, n: x if n > 64 else m.norm(x), "leaves out the pre norm norm"),
    "another norm before": ("input", lambda m, x, n: m.other(x) if n > 64 else m.norm(x), "the pre norm norm"),
    "a factor on the embedding": ("embedding", lambda m, x, n: 8 * x if n > 64 else x, "8 as the factor on the emb"),
    "its width, nearly": ("embedding", lambda m, x, n: x * math.sqrt(n), "the number 22.63"),
    "a norm behind it": ("embedding", lambda m, x, n: m.other(x) if n > 64 else x, "token, normed as the embedding"),
    "positions": (
        "embedding",
        lambda m, x, n: x if n > 64 else x + m.positions(torch.arange(n)),
        "leaves out the embedding positions.weight",
    ),
    "no last norm": ("end", lambda m, x, n: m.head(x if n > 64 else m.final(x)), "leaves out the final norm final"),
    "another head": (
        "end",
        lambda m, x, n: (m.other_head if n > 64 else m.head)(m.final(x)),
        "other_head.weight as the head",
    ),
}


@pytest.mark.parametrize("name", DIFFERING)
def test_a_way_of_which_the_map_says_something_else(name: str) -> None:
    place, change, words = DIFFERING[name]
    found = spikepatch.inspect(Differing(place, change), example_inputs=EXAMPLE)
    assert not found.proven
    assert words in found.leaks[0]
    assert "tokens, not 11: their size chooses the way" in found.leaks[0]


def test_a_factor_that_ids_are_computed_to_is_no_constant() -> None:
    class Counting(Asking):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(ids)
            for block in self.blocks:
                x = x + block(self.norm(x)) * (ids > 100).float().mean()
            logits: torch.Tensor = self.head(x)
            return logits

    found = spikepatch.inspect(Counting(QUESTIONS["in"]), example_inputs=EXAMPLE)
    assert {projection.multiplier for projection in found.residual_projections} == {1.0}


class Refusing(Asking):
    """The other way ends in an error of the model's own."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.max().item() >= self.embedding.num_embeddings:
            raise ValueError("no such token")
        assert ids.shape[1] <= 64
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(self.norm(x))
        logits: torch.Tensor = self.head(x)
        return logits


def test_an_input_that_the_model_refuses() -> None:
    found = spikepatch.inspect(Refusing(QUESTIONS["in"]), example_inputs=EXAMPLE)
    assert (found.proven, found.conditions, found.sublayers) == (True, (), 4)
