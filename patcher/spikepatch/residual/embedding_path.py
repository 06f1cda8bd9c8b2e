"""What the embedding path really does, measured: the part of the traced graph from the lookups to the first point of
the stream is run on real numbers, at full width, so a factor is found whatever config key, buffer or code applies it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch.fx import Node

from spikepatch.errors import Refused
from spikepatch.residual.execute import ROWS, needed_for, run
from spikepatch.residual.multipliers import times_parameter
from spikepatch.residual.ops import LOOKUPS, op, operands, place, shape, table_of
from spikepatch.residual.stream import Stream
from spikepatch.residual.trace import Trace
from spikepatch.residual.weights import fan, matrix_weight

#: Rows of a stand-in table where larger ones than ROWS are looked up (hashes of tokens): modulo this they are taken.
MANY_ROWS = 4096

#: What is smaller than a value by this factor comes from its rounding in float32, or is nothing beside it.
_ROUNDING = 1e-4

#: By how much a norm's eps, or an activation on a part of the way, may bend a size.
_NEARLY = 0.15

#: A norm that leaves the stream smaller than this is none that makes a large shortcut.
_SMALL = 0.5

#: What a table brings to the stream, of all that is there, above which it is taken to be all: two draws differ as much.
_ALONE = 0.9

#: Elements of what may be factors of a table.
_FEW = 1 << 16

#: A learned factor between this and its reciprocal began as 1.
_NEAR = 1.25


class Measured(NamedTuple):
    """``kind`` from how the row numbers move; ``scale`` and ``normed`` as in ``residual.map.Embedding``.

    ``known``: what enters the stream is in proportion to the table, or nearly so, or as large whatever its size.
    """

    kind: Literal["token", "position", "type"]
    scale: float
    normed: bool
    known: bool


def vectors(trace: Trace, stream: Stream) -> dict[Node, str]:
    """The learned numbers on the way to the stream that are no matrices: what a table may be multiplied by."""
    facts = stream.facts
    path = facts.behind([stream.start]) - set(map(table_of, stream.tables))
    matrices = {facts.weight[a] for n in path if facts.product(n) for a in operands(n) if a in facts.weight}
    few = {n: name for n, name in trace.parameters.items() if n in path and math.prod(shape(n)) <= _FEW}
    return {n: name for n, name in few.items() if name not in matrices}


def measure(trace: Trace, stream: Stream, known: Mapping[Node, torch.Tensor]) -> dict[Node, Measured]:
    """Run the embedding path of ``stream`` once per table and case; float32, on the CPU.

    Affine in the table: f(3 E) - f(E) = 2 (f(2 E) - f(E)), and not 0. A norm breaks that: f(0.1 E) and f(3 E) are as
    large as f(E). Behind an activation sizes may be in proportion still; what is neither is not ``known``. No
    table is zero: a norm without eps divides by the size of what it reads. A learned factor that is near 1 is 1, where
    training began.

    Args:
        known: values of ``vectors``; of those that are not there nothing is known, and they are taken to be 1.

    Raises:
        Refused: what is no number stands on the way.
    """
    _check_buffers(trace, stream)
    seeds = dict.fromkeys(trace.inputs, 0)
    result: dict[Node, Measured] = {}
    tables = {lookup: _table(trace, lookup, seeds) for lookup in stream.tables}
    drawn = _matrices(stream, tables)
    drawn |= _steady(trace, stream, tables, {**drawn, **known}, known)
    weighted = stream.facts.behind([stream.start]) & trace.parameters.keys() - set(map(table_of, tables)) - known.keys()
    for lookup, table in tables.items():
        kind = _kind(trace, lookup)
        values, at = {**drawn, **known}, _entry(stream, lookup)
        at_one, at_two, at_three = (_start(trace, stream, tables, lookup, at, f, values) for f in (1.0, 2.0, 3.0))
        once, twice = at_two - at_one, at_three - at_one
        linear = torch.allclose(twice, 2 * once, rtol=1e-3, atol=1e-3 * float(once.abs().max()))
        absent = bool(known) and not bool(once.any())  # by a learned factor of 0
        linear &= absent or _size(once) > _ROUNDING * _size(at_one)
        looked_up = table[_rows(trace, lookup, seeds).flatten() % len(table)] if op(lookup) in LOOKUPS else table
        size = _size(at_one)
        if not linear and len(tables) > 1:  # others may be behind norms of their own, as large whatever they hold
            redrawn = {**tables, lookup: _table(trace, lookup, seeds, draw=2)}
            alone = _size(at_one - _start(trace, stream, redrawn, lookup, at, 1.0, values)) / math.sqrt(2)
            size = float(f"{alone:.2g}") if alone < _ALONE * size else size
        small = size < _SMALL and not weighted  # a gain's value is not known here
        scale = _size(once) / _size(looked_up) if linear else size if small else 1.0
        if linear and known and scale != 1.0 and 1 / _NEAR < scale < _NEAR:
            others = drawn | {node: 2 * value + 1 for node, value in known.items()}
            low, high = (_start(trace, stream, tables, lookup, at, factor, others) for factor in (1.0, 2.0))
            scale = scale if torch.allclose(high - low, once, rtol=1e-3) else 1.0
        normed = not linear and all(
            math.isclose(_size(_start(trace, stream, tables, lookup, at, factor, values)), size, rel_tol=_NEARLY)
            for factor in (0.1, 3.0)
        )
        if not linear and not normed and math.isclose(_size(at_three), 3 * size, rel_tol=_NEARLY):
            linear, scale = True, size / _size(looked_up)
        scale *= times_parameter(stream.facts, table_of(lookup)) if linear else 1.0
        result[lookup] = Measured(kind, float(f"{scale:.6g}"), not linear, linear or normed)
    return result


def _steady(
    trace: Trace,
    stream: Stream,
    tables: Mapping[Node, torch.Tensor],
    values: Mapping[Node, torch.Tensor],
    known: Mapping[Node, torch.Tensor],
) -> dict[Node, torch.Tensor]:
    """What the path reads that hangs on no table and no known number, such as a tower that picks rows: run once."""
    alone = _alone(stream)
    moved = {*map(table_of, tables), *known}
    path = sorted(needed_for([stream.start], {}, alone))
    for node in path:
        if not moved.isdisjoint([alone[node]] if node in alone else operands(node)):
            moved.add(node)
    read = {a for node in path if node in moved and node not in alone for a in operands(node)}
    still = [a for a in read - moved if op(a) and a in path]
    return run(trace, still, values, dict.fromkeys(trace.inputs, 0), alone)


def _alone(stream: Stream) -> dict[Node, Node]:
    """As if no features entered."""
    return {node: stream.facts.carries[node][0] for node in stream.entrances}


def _matrices(stream: Stream, tables: Iterable[Node]) -> dict[Node, torch.Tensor]:
    """Random matrices that keep the size of what they multiply, in place of those on the way; their biases are zero."""
    facts = stream.facts
    of = {name: node for node, name in facts.trace.parameters.items()}
    drawn: dict[Node, torch.Tensor] = {}
    for node in facts.behind([stream.start]):
        vectors_of = [a for a in operands(node) if a in facts.trace.parameters and len(shape(a)) == 1]
        drawn |= {bias: torch.zeros(shape(bias)) for bias in vectors_of if facts.product(node)}
        weight = matrix_weight(facts, node) if facts.product(node) else None
        size = fan(facts, node, weight) if weight is not None else None
        if weight is not None and size is not None and of[facts.weight[weight]] not in map(table_of, tables):
            matrix = of[facts.weight[weight]]
            drawn[matrix] = torch.randn(shape(matrix), generator=torch.Generator().manual_seed(1)) / math.sqrt(
                size.fan_in
            )
    return drawn


def _check_buffers(trace: Trace, stream: Stream) -> None:
    path = stream.facts.behind([stream.start])
    for node, value in trace.buffers.items():
        if node in path and value.is_floating_point() and not value.isfinite().all():
            readers = (place(user) for user in node.users)
            raise Refused(
                what="a buffer holds NaN or infinity, so what the model does to its embedding cannot be measured",
                where=next(filter(None, readers), "the model's own forward"),
                why=f"one of shape {tuple(value.shape)} is read there, between the token embedding and the stream",
                remedy="give it the values that the model's constructor gives it, and patch the model then",
            )


def _size(values: torch.Tensor) -> float:
    """Root mean square of what is not zero: rows of padding are no part of an embedding."""
    count = int(torch.count_nonzero(values))
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) / math.sqrt(count) if count else 0.0


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


def _table(trace: Trace, node: Node, seeds: Mapping[Node, int], draw: int = 0) -> torch.Tensor:
    """Random rows that stand for the table's."""
    *rows, width = shape(table_of(node))
    if op(node) in LOOKUPS:
        few = int(_rows(trace, node, seeds).max()) < ROWS
        rows = [ROWS if few else max(ROWS, min(rows[0], MANY_ROWS))]
    return torch.randn(*rows, width, generator=torch.Generator().manual_seed(draw))


def _entry(stream: Stream, lookup: Node) -> Node:
    """What a table brings to the stream: at its start, or what is added to it behind a layer."""
    if lookup not in stream.spine or lookup in needed_for([stream.start], {}, _alone(stream)):
        return stream.start
    node = lookup
    while users := [user for user in node.users if stream.facts.carries.get(user) == [node]]:
        node = users[0]
    return node


def _start(
    trace: Trace,
    stream: Stream,
    tables: Mapping[Node, torch.Tensor],
    lookup: Node,
    at: Node,
    factor: float,
    known: Mapping[Node, torch.Tensor],
) -> torch.Tensor:
    """The value ``at`` a node on the way, with this table times ``factor``, and next to nothing of the others."""
    values = {**known} | {table_of(other): _ROUNDING**2 * table for other, table in tables.items()}
    values[table_of(lookup)] = factor * tables[lookup]
    result = run(trace, [at], values, dict.fromkeys(trace.inputs, 0), _alone(stream))[at]
    assert isinstance(result, torch.Tensor)
    return result.float()
