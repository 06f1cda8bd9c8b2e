"""Whether two models compute the same function: the same operations, in the same order, on the same tensors.

Both forward passes are recorded at full width (no weight is read), and every value gets a number, equal for equal
operations on equal values. Multiplying or dividing by one changes no bit and gets no number of its own. Models whose
outputs have one number give the same bits, for any weights; models whose numbers differ may still be equal, and are not
taken for it. The recorded input is ``TOKENS`` long: what a model does to longer ones, or in another dtype, by another
branch of its Python code is not seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import map_aggregate

from spikepatch.errors import Refused, on_one_line
from spikepatch.residual.example import example_of
from spikepatch.residual.ops import op, shape
from spikepatch.residual.trace import Trace, recorded


def forward_of(model: nn.Module, example: Mapping[str, torch.Tensor] | None = None) -> Trace:
    """One forward pass of ``model``, recorded; parameters anywhere, buffers real; without an example, on its own.

    Raises:
        Refused: it cannot be recorded.
    """
    try:
        return recorded(model, example_of(model) if example is None else example)
    except Exception as error:  # whatever a forward pass raises
        raise Refused(
            what="the forward pass cannot be recorded, so what it computes cannot be compared",
            where=type(model).__name__,
            why=on_one_line(error, 200),
            remedy="check that the model runs on integer token ids",
        ) from error


class Values:
    """Numbers of values, shared by the graphs that are to be compared."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._equal: dict[int, int] = {}

    def output(
        self,
        trace: Trace,
        tensors: Mapping[str, Hashable] = MappingProxyType({}),
        start: Mapping[Node, int] = MappingProxyType({}),
        seen: Callable[[Node, Mapping[Node, int]], None] = lambda node, numbers: None,
    ) -> int:
        """The number of the graph's output.

        Args:
            tensors: parameter name -> what identifies its value; by default, the name.
            start: nodes whose numbers are known.
            seen: told of every call, once it has its number, with all numbers so far.
        """
        inputs = {node: i for i, node in enumerate(trace.inputs)}
        numbers: dict[Node, int] = dict(start)
        for node in trace.graph.nodes:
            if node in numbers:
                continue
            if node in trace.parameters:
                name = trace.parameters[node]
                numbers[node] = self.tensor(tensors.get(name, name))
            elif node in inputs:
                numbers[node] = self._number(("input", inputs[node]))
            elif node in trace.buffers:
                numbers[node] = self._number(_content(trace.buffers[node]))
            elif op(node):
                numbers[node] = self.call(node, numbers)
                seen(node, numbers)
        return numbers[trace.output]

    def tensor(self, identity: Hashable) -> int:
        """The number of the parameter that ``identity`` stands for."""
        return self._number(("tensor", identity))

    def call(self, node: Node, numbers: Mapping[Node, int]) -> int:
        """The number of what ``node`` computes from arguments that have ``numbers``."""
        if op(node) in {"mul", "div"} and not node.kwargs:
            first, second = node.args
            if isinstance(first, Node) and not isinstance(second, Node) and second == 1 and _alike(first, node):
                return numbers[first]
        described = map_aggregate((node.args, node.kwargs), lambda a: _described(a, numbers))
        number = self._number((str(node.target), repr(described)))
        return self._equal.get(number, number)

    def equate(self, number: int, other: int) -> None:
        """From now on ``number`` is ``other``: the caller knows that the values are equal."""
        if number != other:
            self._equal[number] = other

    def _number(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))


def _described(argument: Any, numbers: Mapping[Node, int]) -> Any:
    return f"%{numbers[argument]}" if isinstance(argument, Node) else argument


def _alike(first: object, second: object) -> bool:
    """Same shape and dtype, so that no broadcast and no promotion comes with the product."""
    dtypes = [n.meta["val"].dtype for n in (first, second) if isinstance(n, Node) and "val" in n.meta]
    return len(dtypes) == 2 and dtypes[0] == dtypes[1] and shape(first) == shape(second)


def _content(tensor: torch.Tensor) -> Hashable:
    """Of a real tensor, dtype, shape and bytes; a tensor without memory has no equal."""
    if tensor.is_meta:
        return object()
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return "constant", str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(flat.numpy().tobytes()).hexdigest()
