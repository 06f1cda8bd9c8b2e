"""The second tracer: the same map as from ``torch.export`` where both work, and a map where only it does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spikepatch
from spikepatch.residual.inspect import map_of
from spikepatch.residual.record import record
from spikepatch.residual.trace import recorded
from tests.architectures import TYPES, tiny_model
from tests.residual.test_stream import EXAMPLE, Block


@pytest.mark.parametrize("model_type", TYPES)
def test_same_map_as_exported(model_type: str) -> None:
    model = tiny_model(model_type)
    exported = spikepatch.inspect(model, source="model")
    assert exported.proven
    assert map_of(model, recorded(model), "model") == exported


class Branching(nn.Module):
    """A forward pass that branches on its data: ``torch.export`` cannot follow it."""

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


def test_a_branch_on_data() -> None:
    residual = spikepatch.inspect(Branching(), example_inputs=EXAMPLE)
    assert residual.proven
    assert [p.parameter for p in residual.residual_projections] == ["block.down.weight"]


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


def test_a_forward_that_cannot_run() -> None:
    class Broken(Branching):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            raise ValueError("this model does not run")

    with pytest.raises(spikepatch.Refused, match="cannot be traced") as refused:
        spikepatch.inspect(Broken(), example_inputs=EXAMPLE)
    assert "this model does not run" in refused.value.why
