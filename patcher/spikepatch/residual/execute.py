"""Parts of a traced graph run on real numbers, at full width and in at least float32.

``torch.fx.Interpreter`` runs a graph from its first node to its last. Here it is a part that is run, of a graph whose
parameters have no memory: what is not computed is asked for, and what nobody reads any more is dropped.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from spikepatch.residual.ops import FACTORIES, LIKE_SECOND, LOOKUPS, VIEWS, op, operands, shape
from spikepatch.residual.trace import Trace

#: Rows of a stand-in table: the example's ids are below this, and learned positions start at small offsets.
ROWS = 64


def execute(
    nodes: Sequence[Node],
    values: dict[Node, Any],
    *,
    value: Callable[[Node], Any],
    call: Callable[[Node, list[Any], dict[str, Any]], Any],
    keep: Collection[Node] | None = None,
) -> None:
    """Run ``nodes``, in execution order, into ``values``.

    Args:
        value: of a node that one of them reads, computed or not.
        call: what a node computes from these; see ``compute``.
        keep: where it is given, all other values are dropped after their last use among ``nodes``.
    """
    last: dict[Node, Node] = {a: node for node in nodes for a in operands(node)} if keep is not None else {}
    for node in nodes:
        if op(node):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
            values[node] = call(node, list(args), dict(kwargs))
        if keep is not None:
            for argument in operands(node):
                if last[argument] is node and argument not in keep:
                    values.pop(argument, None)


def compute(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> Any:
    """One operation, on ``device`` and in at least float32, whatever the model's: what is measured is no rounding."""
    args = [_in_single(argument, device) for argument in args]
    kwargs = {name: _in_single(argument, device) for name, argument in kwargs.items()}
    if node.target is operator.getitem:
        return args[0][args[1]]
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _in_single(argument: Any, device: torch.device) -> Any:
    """A traced operation's argument: ``device`` for the meta device, float32 for a narrower dtype of the model's."""
    if isinstance(argument, torch.device):
        return device
    reduced = isinstance(argument, torch.dtype) and argument in {torch.bfloat16, torch.float16}
    return torch.float32 if reduced else argument


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
        seeds: for each input, of the random example in its place. Where the graph does not run on that, whole numbers
            that are no rows of a table stay as they are: the grid, say, that patches were cut from.
        instead: nodes whose values are those of others.
    """
    try:
        return _run(trace, wanted, values, seeds, instead, frozenset())
    except (IndexError, RuntimeError):
        whole = (n for n, value in trace.inputs.items() if not value.is_floating_point() and not _looks_up(n))
        if not (kept := frozenset(whole)):
            raise
        return _run(trace, wanted, values, seeds, instead, kept)


def _run(
    trace: Trace,
    wanted: list[Node],
    values: Mapping[Node, torch.Tensor],
    seeds: Mapping[Node, int],
    instead: Mapping[Node, Node],
    kept: Collection[Node],
) -> dict[Node, Any]:
    given: dict[Node, Any] = dict(values)
    needed = needed_for(wanted, given, instead)
    for node in needed - given.keys():
        if node in trace.buffers:
            buffer = trace.buffers[node].cpu()
            given[node] = buffer.float() if buffer.is_floating_point() else buffer
        elif node in trace.inputs:
            example = trace.inputs[node]
            given[node] = example if node in kept else _input(example, seeds[node])
        elif node in trace.parameters:
            given[node] = _parameter(shape(node))
    computed = sorted(needed - given.keys() - instead.keys())  # as they stand in the graph
    results: dict[Node, Any] = {}

    def value(node: Node) -> Any:
        while node in instead:
            node = instead[node]
        return given[node] if node in given else results[node] if node in results else _shaped(node)

    execute(computed, results, value=value, call=_call, keep={*wanted, *instead.values()})
    return {node: value(node) for node in wanted}


def needed_for(wanted: list[Node], given: Mapping[Node, Any], instead: Mapping[Node, Node]) -> set[Node]:
    """The nodes whose values ``wanted`` are computed from, themselves included."""
    needed: set[Node] = set()
    todo = list(wanted)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo.extend([instead[node]] if node in instead else [] if node in given else _read(node))
    return needed


def _looks_up(node: Node) -> bool:
    """Its numbers, as they came in, are rows of a table."""
    return any(op(user) in LOOKUPS or (op(user) in VIEWS and _looks_up(user)) for user in node.users)


def _read(node: Node) -> list[Node]:
    """The operands whose values are needed; of others an operation reads the shape and dtype only."""
    return [] if op(node) in FACTORIES else operands(node)[:1] if op(node) in LIKE_SECOND else operands(node)


def _shaped(node: Node) -> torch.Tensor:
    """Something of the shape, strides and dtype of a node's value."""
    value: torch.Tensor = node.meta["val"]
    return torch.empty_strided(value.shape, value.stride(), dtype=_in_single(value.dtype, value.device))


def _parameter(size: tuple[int, ...]) -> torch.Tensor:
    """A gain of one, or a matrix that keeps the size of what it multiplies."""
    if len(size) < 2:
        return torch.ones(size)
    return torch.randn(size, generator=torch.Generator().manual_seed(1)) / math.sqrt(size[-1])


def _call(node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """On the CPU; the row numbers of a lookup fit its stand-in table, which is shorter."""
    if op(node) in LOOKUPS:
        args[1] = args[1] % len(args[0])
    return compute(node, args, kwargs, torch.device("cpu"))


def _input(example: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if example.is_floating_point():
        return torch.randn(example.shape, generator=generator)
    if example.dtype == torch.bool:  # what is there, and what is padding
        return example
    return torch.randint(5, ROWS, example.shape, generator=generator, dtype=example.dtype)
