"""The ways that a forward pass may go: questions that Python can ask of ids, of hidden states, of sizes.

The model skips every other block where the answer is yes; what is true of it is in its code.
"""

from __future__ import annotations

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
