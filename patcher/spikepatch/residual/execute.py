"""Parts of a traced graph run on real numbers: on the CPU, in float32, at full width."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from spikepatch.residual.ops import LOOKUPS, op, operands, shape
from spikepatch.residual.trace import Trace

#: Rows of a stand-in table: the example's ids are below this, and learned positions start at small offsets.
ROWS = 64


def run(
    trace: Trace,
    wanted: list[Node],
    values: Mapping[Node, torch.Tensor],
    seeds: Mapping[Node, int],
    instead: Mapping[Node, Node] = MappingProxyType({}),
) -> dict[Node, Any]:
    """Execute the graph up to ``wanted``, on the CPU in float32.

    Args:
        values: of nodes that are not computed; parameters that are not among them are gains of one, or random matrices.
        seeds: for each input, of the random example in its place.
        instead: nodes whose values are those of others.
    """

    def read(node: Node) -> list[Node]:
        return [instead[node]] if node in instead else [] if node in values else operands(node)

    needed: set[Node] = set()
    todo = list(wanted)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo.extend(read(node))
    waiting = Counter(a for node in needed for a in read(node)) + Counter(wanted)
    results: dict[Node, Any] = {}
    for node in sorted(needed):  # as they stand in the graph
        if node in instead:
            results[node] = results[instead[node]]
        elif node in values:
            results[node] = values[node]
        elif node in trace.buffers:
            buffer = trace.buffers[node].cpu()
            results[node] = buffer.float() if buffer.is_floating_point() else buffer
        elif node in trace.inputs:
            results[node] = _input(trace.inputs[node], seeds[node])
        elif node in trace.parameters:
            results[node] = _parameter(shape(node))
        elif op(node):
            results[node] = _call(node, *torch.fx.node.map_arg((node.args, node.kwargs), lambda n: results[n]))
        for argument in read(node):  # what nobody reads any more is freed
            waiting[argument] -= 1
            if not waiting[argument]:
                results.pop(argument, None)
    return {node: results[node] for node in wanted}


def _parameter(size: tuple[int, ...]) -> torch.Tensor:
    """A gain of one, or a matrix that keeps the size of what it multiplies."""
    if len(size) < 2:
        return torch.ones(size)
    return torch.randn(size, generator=torch.Generator().manual_seed(1)) / math.sqrt(size[-1])


def in_single(argument: Any, device: torch.device) -> Any:
    """A traced operation's argument: ``device`` for the meta device, float32 for a narrower dtype of the model's."""
    if isinstance(argument, torch.device):
        return device
    reduced = isinstance(argument, torch.dtype) and argument in {torch.bfloat16, torch.float16}
    return torch.float32 if reduced else argument


def _call(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """On the CPU and in float32, whatever the model's device and precision: a factor is not to be rounded."""
    cpu = torch.device("cpu")
    args = [in_single(argument, cpu) for argument in args]
    kwargs = {name: in_single(argument, cpu) for name, argument in kwargs.items()}
    if node.target is operator.getitem:
        return args[0][args[1]]
    if op(node) in LOOKUPS:
        args[1] = args[1] % len(args[0])  # the stand-in table is shorter
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _input(example: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if example.is_floating_point():
        return torch.randn(example.shape, generator=generator)
    return torch.randint(5, ROWS, example.shape, generator=generator, dtype=example.dtype)
