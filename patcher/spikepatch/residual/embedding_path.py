"""What the embedding path really does, measured: the part of the traced graph from the lookups to the first point of
the stream is run on real numbers, at full width, so a factor is found whatever config key, buffer or code applies it.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch.fx import Node

from spikepatch.residual.ops import LOOKUPS, op, operands, shape, table_of
from spikepatch.residual.stream import Stream
from spikepatch.residual.trace import Trace

#: Rows of a stand-in table: the example's ids are below the first, and learned positions start at small offsets. Where
#: larger rows are looked up (hashes of tokens), at most the second, modulo which they are taken.
ROWS, MANY_ROWS = 64, 4096


class Measured(NamedTuple):
    """``kind`` from how the row numbers move; ``scale`` and ``normed`` as in ``residual.map.Embedding``."""

    kind: Literal["token", "position", "type"]
    scale: float
    normed: bool


def measure(trace: Trace, stream: Stream) -> dict[Node, Measured]:
    """Run the embedding path of ``stream`` once per table and case; float32, on the CPU.

    Linear in the table: f(2 E) = 2 f(E) once the constant part f(0) is subtracted. A norm on the way breaks that.
    """
    seeds = dict.fromkeys(trace.inputs, 0)
    result: dict[Node, Measured] = {}
    tables = {lookup: _table(trace, lookup, seeds) for lookup in stream.tables}
    for lookup, table in tables.items():
        kind = _kind(trace, lookup)
        silent, once, twice = (_start(trace, stream, tables, lookup, factor) for factor in (0.0, 1.0, 2.0))
        once, twice = once - silent, twice - silent
        linear = torch.allclose(twice, 2 * once, rtol=1e-3, atol=1e-3 * float(once.abs().max()))
        looked_up = table[_rows(trace, lookup, seeds).flatten() % len(table)] if op(lookup) in LOOKUPS else table
        scale = _size(once) / _size(looked_up) if linear else 1.0
        result[lookup] = Measured(kind, float(f"{scale:.6g}"), not linear)
    return result


def _size(values: torch.Tensor) -> float:
    """Root mean square of what is not zero: rows of padding are no part of an embedding."""
    held = values[values != 0]
    return float(held.square().mean().sqrt()) if held.numel() else 0.0


def _kind(trace: Trace, table: Node) -> Literal["token", "position", "type"]:
    """From the row numbers that two different texts look up; learned rows without a lookup are one or a position's."""
    if op(table) not in LOOKUPS:
        return "position" if len(shape(table)) > 1 and shape(table)[-2] > 1 else "type"
    first, second = (_rows(trace, table, dict.fromkeys(trace.inputs, seed)) for seed in (0, 1))
    if not torch.equal(first, second):
        return "token"
    return "position" if bool((first != first.flatten()[0]).any()) else "type"


def _rows(trace: Trace, lookup: Node, seeds: Mapping[Node, int]) -> torch.Tensor:
    ids: torch.Tensor = run(trace, [operands(lookup)[1]], {}, seeds)[operands(lookup)[1]]
    return ids


def _table(trace: Trace, node: Node, seeds: Mapping[Node, int]) -> torch.Tensor:
    """Random rows that stand for the table's."""
    *rows, width = shape(table_of(node))
    if op(node) in LOOKUPS:
        few = int(_rows(trace, node, seeds).max()) < ROWS
        rows = [ROWS if few else max(ROWS, min(rows[0], MANY_ROWS))]
    return torch.randn(*rows, width, generator=torch.Generator().manual_seed(0))


def _start(
    trace: Trace, stream: Stream, tables: Mapping[Node, torch.Tensor], lookup: Node, factor: float
) -> torch.Tensor:
    """The first point of the stream, with this table times ``factor`` and every other zero."""
    values = {table_of(other): torch.zeros_like(table) for other, table in tables.items()}
    values[table_of(lookup)] = factor * tables[lookup]
    alone = {node: stream.facts.carries[node][0] for node in stream.entrances}  # as if no features entered
    result = run(trace, [stream.start], values, dict.fromkeys(trace.inputs, 0), alone)[stream.start]
    assert isinstance(result, torch.Tensor)
    return result.float()


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
    for node in trace.graph.nodes:
        if node not in needed:
            continue
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
