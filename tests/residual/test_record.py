"""The tracer: control is real, data is not; numbers and buffers keep their values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spikepatch
from spikepatch.residual.record import record
from spikepatch.residual.trace import recorded
from tests.residual.test_stream import EXAMPLE, Block


class Branching(nn.Module):
    """A forward pass that branches on its data."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.block = nn.Embedding(50, 16), Block(16)
        self.head = nn.Linear(16, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        if x.mean() > -1:
            x = self.block(x)
        logits: torch.Tensor = self.head(x)
        return logits


class ByIds(Branching):
    """The ids say how many rows there are."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.block(self.tokens(ids))
        logits: torch.Tensor = self.head(x[ids > 3])
        return logits


class ByPosition(Branching):
    """A mask and a branch that depend on the length of the text alone; rows by their numbers, which depend on ids."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1])
        x = self.tokens(ids)
        if positions.max() > 3:
            x = self.block(x)
        logits: torch.Tensor = self.head(x[:, positions % 2 == 0][:, ids[0, :3] % 2])
        return logits


class ThroughAView(Branching):
    """A mask that the ids are written into, by way of a part of it."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(2, ids.shape[1], dtype=torch.bool)
        mask[0].copy_(ids[0] > 3)
        x = self.tokens(ids)
        if mask.any():
            x = self.block(x)
        logits: torch.Tensor = self.head(x)
        return logits


@pytest.mark.parametrize(
    ("kind", "whole"), [(Branching, False), (ByIds, False), (ThroughAView, False), (ByPosition, True)]
)
def test_what_is_asked_of_values_is_noted(kind: type[Branching], whole: bool) -> None:
    asked = recorded(kind(), EXAMPLE).asked
    assert (not asked.branches and not asked.values) is whole


class Numbers(nn.Module):
    """Numbers in the code become tensors on the data's device, where a traced model has none."""

    def forward(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        x = nn.functional.embedding(ids, table)
        return x[..., [-1, 2]] + torch.tensor(0.25, device=x.device) + x[[0]][..., :2]


def test_numbers_in_the_code_keep_their_values() -> None:
    recorder, _ = record(Numbers(), {"ids": torch.arange(3)[None], "table": torch.zeros(8, 4, device="meta")})
    assert recorder.constants
    assert not any(value.is_meta for value in recorder.constants.values())
    values = [value.flatten().tolist() for value in recorder.constants.values()]
    assert [-1, 2] in values
    assert [0.25] in values
    assert [0] in values


class Moving(Branching):
    """It moves its buffer to where the data are, and the data to where the ids are, as it runs."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((16,), 3.0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        self.scale = self.scale.to(x.device)
        logits: torch.Tensor = self.head(self.block((x * self.scale).to(ids.device)))
        return logits


def test_a_buffer_that_the_run_replaces_keeps_its_value() -> None:
    graph = recorded(Moving(), EXAMPLE)
    assert not graph.asked.branches
    assert [buffer.tolist() for buffer in graph.buffers.values()] == [[3.0] * 16]
    shared = Moving()
    shared.block.register_buffer("scale", shared.scale)
    (buffer,) = recorded(shared, EXAMPLE).buffers.values()
    assert not buffer.is_meta
    (embedding,) = spikepatch.inspect(Moving(), example_inputs=EXAMPLE).embeddings
    assert embedding.scale == 3


def test_a_run_that_draws_leaves_the_random_numbers_as_they_were() -> None:
    class Noisy(Branching):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            kept = torch.rand(ids.shape[1]) > 0.1
            return super().forward(ids) * kept[:, None]

    before = torch.get_rng_state()
    assert spikepatch.inspect(Noisy(), example_inputs=EXAMPLE) is not None
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    Noisy()
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1.1920928955078125e-07])
def test_eps_of_a_norm_that_is_written_out(eps: float) -> None:
    model = Branching()
    model.block.norm = nn.RMSNorm(16, eps=eps, elementwise_affine=False)  # type: ignore[assignment]
    model.forward = lambda ids: model.head(model.block(model.tokens(ids)))  # type: ignore[method-assign]
    (norm,) = spikepatch.inspect(model, example_inputs=EXAMPLE).norms
    assert norm.eps == eps


def test_a_forward_that_cannot_run() -> None:
    class Broken(Branching):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            raise ValueError("this model does not run")

    with pytest.raises(spikepatch.Refused, match="cannot be traced") as refused:
        spikepatch.inspect(Broken(), example_inputs=EXAMPLE)
    assert "this model does not run" in refused.value.why
