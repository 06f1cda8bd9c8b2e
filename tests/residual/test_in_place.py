"""Graphs without writes in place compute what the eager code computes, bit for bit, whatever views are written."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spikepatch
from spikepatch.residual.in_place import redirect_writes
from spikepatch.residual.ops import writes
from spikepatch.residual.trace import trace

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[1:3],
    "every second": lambda x: x[:, ::2],
    "select": lambda x: x[2],
    "transpose": lambda x: x.transpose(0, -1),
    "t of rows": lambda x: x.reshape(x.shape[0], -1).t(),
    "split": lambda x: torch.split(x, 2, 0)[1],
    "sizes": lambda x: torch.split(x, [1, x.shape[0] - 1], 0)[1],
    "chunk": lambda x: x.chunk(3, 0)[-1],
    "unbind": lambda x: x.unbind(-1)[1],
    "flat": lambda x: x.view(-1),
    "whole": lambda x: x[:],
    "unsqueeze": lambda x: x.unsqueeze(1),
    "narrow": lambda x: x.narrow(0, 1, 2),
    "diagonal": lambda x: x.diagonal(),
    "windows": lambda x: x.unfold(0, 2, 2),
}
WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "mul": lambda view, _: view.mul_(0.5),
    "add": lambda view, row: view.add_(row.flatten()[0]),
    "copy": lambda view, row: view.copy_(view.clone() + row.flatten()[1]),
    "fill": lambda view, _: view.fill_(3.0),
    "masked": lambda view, _: view.masked_fill_(view > 0, 0.25),
    "zero": lambda view, _: view.zero_(),
    "itself": lambda view, _: view.sub_(view.flip(-1) * 0.25),
    "out": lambda view, _: torch.mul(view, 0.7, out=view),
    "of its data": lambda view, _: view.data.mul_(0.9),
}


#: Seeds that write into windows of transposed views.
WINDOWS = (2184, 2492)


class Written(nn.Module):
    """Views of one tensor, each maybe a view of another, written and read in an order that is drawn."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.rows = nn.Embedding(16, 6)
        self.plan: list[tuple[str, Any, str]] = []
        for views in range(1, 7):
            kind = draw.choice(("view", "write", "write", "read"))
            name = draw.choice(list(VIEWS if kind == "view" else WRITES))
            self.plan.append((kind, draw.randrange(views), name))

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        x = self.rows(ids)[0] * 1.0
        views, read = [x], [x.sum()]
        for kind, which, name in self.plan:
            view = views[which % len(views)]
            if kind == "view" and view.dim() > 1 and view.shape[0] > 2 and view.shape[-1] > 1:
                made: Any = None
                try:
                    made = VIEWS[name](view)
                except RuntimeError:  # such a view this one does not have
                    continue
                views.append(made)
            elif kind == "write":
                WRITES[name](view, read[-1].reshape(1).expand(2))
            else:
                read.append(view.sum() * 0.1)
        return torch.stack([*read, *(view.sum() for view in views), x.square().sum()])


@pytest.mark.parametrize("seeds", [range(block, block + 25) for block in range(0, 100, 25)] + [WINDOWS])
def test_the_same_values(seeds: Sequence[int]) -> None:
    wrote = 0
    for seed in seeds:
        torch.manual_seed(seed)
        model, ids = Written(seed), torch.arange(6)[None]
        wanted = model(ids)
        graph = trace(model, {"ids": ids}).graph
        assert not any(writes(node) for node in graph.nodes), seed
        values = _values(model, graph, ids)
        torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-6, msg=f"seed {seed}: {model.plan}")
        wrote += any(kind == "write" for kind, _, _ in model.plan)
    assert wrote > len(seeds) / 2


def _values(model: nn.Module, graph: torch.fx.Graph, ids: Tensor) -> Tensor:
    """Node by node, with the model's own weights."""
    found: dict[torch.fx.Node, Any] = {}
    result: Any = None
    for node in graph.nodes:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
        if node.op == "placeholder":
            found[node] = ids if node.name == "ids" else dict(model.named_parameters())["rows.weight"].detach()
        elif node.op == "output":
            result = args[0]
        else:
            found[node] = node.target(*args, **kwargs)
    while isinstance(result, (tuple, list)):
        result = result[0]
    assert isinstance(result, Tensor)
    return result


def test_a_graph_without_writes_is_left_alone() -> None:
    graph = trace(nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3)), {"input": torch.arange(3)[None]}).graph
    before = str(graph)
    redirect_writes(graph)
    assert str(graph) == before


class IntoABuffer(nn.Module):
    """``out`` receives the sum: another tensor than the first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 16, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.rows(ids)
        for block in self.blocks:
            total = torch.empty_like(x)
            torch.add(x, block(torch.nn.functional.layer_norm(x, (8,))), out=total)
            x = total
        logits: Tensor = self.head(self.norm(x))
        return logits


def test_a_sum_into_a_buffer_is_one() -> None:
    residual = spikepatch.inspect(IntoABuffer(), example_inputs={"ids": torch.arange(6)[None]})
    assert (residual.proven, residual.sublayers) == (True, 3), residual.leaks
