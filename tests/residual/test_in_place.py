"""Graphs without writes in place compute what the eager code computes, bit for bit, whatever views are written."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spikepatch
from spikepatch.residual.in_place import redirect_writes
from spikepatch.residual.ops import op, writes
from spikepatch.residual.trace import trace


def _given(view: Tensor, data: Tensor) -> Tensor:
    view.data = data
    return view


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
    "places in memory": lambda x: x.as_strided((2, 2), (1, 2)),
    "moved": lambda x: x.movedim(0, -1),
    "halves": lambda x: x.view(*x.shape[:-1], 2, -1),
    "last": lambda x: x[..., 1:],
    "expanded": lambda x: x[:1].expand(1, *x.shape[1:]),
    "detached": lambda x: x.detach(),
    "a copy": lambda x: x.mT.contiguous(),
    "rows": lambda x: x[[0, 1]],
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
    "square": lambda view, _: view.pow_(2).clamp_(max=3),
    "power": lambda view, _: view.clamp_(0.5, 2).pow_(torch.tensor(1.5)),
    "floor": lambda view, _: view.floor_divide_(torch.tensor(2.0)),
    "drawn": lambda view, _: view.normal_(1.0, 0.0),
    "for each": lambda view, _: torch._foreach_mul_([view], 0.5),
    "for each of two": lambda view, _: torch._foreach_add_([*view.chunk(2)], [1.0, 2.0]),
    "a row": lambda view, _: view.__setitem__(0, 0.3),
    "where": lambda view, _: view.__setitem__(view > 0, 0.5),
    "rows": lambda view, _: view.index_add_(0, torch.tensor([0, 0]), view[:1].expand(2, *view.shape[1:]).clone()),
    "diagonal": lambda view, _: view.fill_diagonal_(0.2),
    "turned": lambda view, _: view.transpose_(0, -1),
    "longer": lambda view, _: view.unsqueeze_(0).squeeze_(0).mul_(0.5),
    "other data": lambda view, _: _given(view, view.data * 0.5),
    "other data, written": lambda view, _: _given(view, torch.ones_like(view)).add_(1),
}


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
            elif kind == "write" and _can(name, view):
                WRITES[name](view, read[-1].reshape(1).expand(2))
            else:
                read.append(view.sum() * 0.1)
        return torch.stack([*read, *(view.sum() for view in views), x.square().sum()])


def _can(name: str, view: Tensor) -> bool:
    return view.dim() == 2 if name == "diagonal" else view.dim() > 0 and view.shape[0] > 1


def _check(model: Written) -> None:
    ids = torch.arange(6)[None]
    wanted = model(ids)
    graph = trace(model, {"ids": ids}).graph
    assert all(op(node.args[0]) == "clone" for node in graph.nodes if writes(node))  # what nothing else reads
    torch.testing.assert_close(_values(model, graph, ids), wanted, rtol=1e-5, atol=1e-5, msg=str(model.plan))


@pytest.mark.parametrize("block", range(8))
def test_the_same_values(block: int) -> None:
    wrote = 0
    for seed in range(block * 25, block * 25 + 25):
        torch.manual_seed(seed)
        model = Written(seed)
        _check(model)
        wrote += any(kind == "write" for kind, _, _ in model.plan)
    assert wrote > 15


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("view", ["whole", "transpose", "every second", "split"])
def test_every_write(view: str, write: str) -> None:
    """Through a view, and through windows of one."""
    torch.manual_seed(0)
    model = Written(0)
    for plan in (
        [("view", 0, view), ("write", 1, write), ("read", 0, "")],
        [("view", 0, view), ("view", 1, "windows"), ("write", 2, write), ("read", 1, ""), ("write", 0, "add")],
    ):
        model.plan = plan
        _check(model)


def _values(model: nn.Module, graph: torch.fx.Graph, ids: Tensor) -> Tensor:
    """Node by node, with the model's own weights."""
    found: dict[torch.fx.Node, Any] = {}
    result: Any = None
    for node in graph.nodes:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
        if node.op == "placeholder":
            given = {"ids": ids, "rows_weight": dict(model.named_parameters())["rows.weight"].detach()}
            found[node] = given.get(node.name, node.meta["val"])
        elif node.op == "output":
            result = args[0]
        else:
            here = {"device": "cpu"} if "device" in kwargs else {}
            found[node] = node.target(*args, **{**kwargs, **here})
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


def test_one_tensor_twice_in_a_list_is_refused() -> None:
    """It would be written twice, of which the functional form knows nothing."""
    model = nn.Sequential(nn.Embedding(16, 8), Twice(), nn.Linear(8, 16))
    with pytest.raises(spikepatch.Refused, match="writes into a list of tensors in a way that cannot be followed"):
        trace(model, {"input": torch.arange(6)[None]})


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        torch._foreach_mul_([x, x], 2.0)
        return x
