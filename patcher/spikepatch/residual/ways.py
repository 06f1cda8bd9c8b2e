"""The other ways that a forward pass may go, by what the inputs hold or by how long they are: each is run as well."""

from __future__ import annotations

import contextlib
import functools
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from spikepatch.errors import Refused, first_line
from spikepatch.residual import ops
from spikepatch.residual.kinds import sublayers_of
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.ops import behind_views, op, operands, shape
from spikepatch.residual.stream import Stream, find
from spikepatch.residual.told import Mode, is_ours
from spikepatch.residual.trace import Trace, recorded
from spikepatch.source.private import CHECKING

#: A length, and a number of rows, that are tried of every model, as those of training are larger than the example's:
#: that ``0.5 * n`` was computed of a length n, nobody is told.
_LONG, _ROWS = 512, 3

#: A pass over other lengths that makes so many times the calls loops over its tokens, and is given up.
_MORE = 4


@dataclass(frozen=True)
class Way:
    """Another way.

    Attributes:
        chosen: what chooses it, and where.
        trace: the pass; or why nothing is known of it.
        all_turned: every question was answered the other way, or nothing holds of data, so that no expert of a mixture
            may be left.
    """

    chosen: str
    trace: Trace | str
    all_turned: bool = False


def compared(
    model: nn.Module, graph: Trace, found: Sequence[Stream], main: ResidualMap, mapped: Callable[[Stream], ResidualMap]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the other ways that the pass may go: what is otherwise there; and why that is not known.

    Args:
        main: the map of the first stream, with which that of the first stream of another way is compared.
        mapped: the map of a stream.
    """
    strayed: dict[str, None] = {}
    unknown: dict[str, None] = {}
    here, calls = [_added(model, stream) for stream in found], _calls(graph)
    for way in other_ways(model, graph):
        if isinstance(way.trace, Trace) and _calls(way.trace) == calls:
            strayed |= {f"{way.chosen} {other}": None for other in _other_numbers(found, graph, way.trace)}
            continue
        streams = find(way.trace, found[0].facts.forms) if isinstance(way.trace, Trace) else way.trace
        leaks = [streams] if isinstance(streams, str) else [leak for stream in streams for leak in stream.leaks]
        if leaks and way.all_turned:  # without any expert there may be no sum; the first question alone is asked too
            continue
        if isinstance(streams, str):
            unknown[f"{way.chosen} is not known ({streams})"] = None
            continue
        there = [_added(model, stream) for stream in streams]
        if leaks:
            strayed[f"{way.chosen} is not proven ({leaks[0]})"] = None
        elif len(here) != len(there) or not all(
            _agree(*both, without_mixtures=way.all_turned) for both in zip(here, there, strict=True)
        ):
            strayed[f"{way.chosen} {_difference(here[0], there[0])}"] = None
        elif here == there:
            with contextlib.suppress(Refused):  # rows are looked up that the tables do not have
                if other := _otherwise(_said(main), _said(mapped(streams[0]))):
                    strayed[f"{way.chosen} {other}"] = None
    return tuple(strayed), tuple(unknown)


def _other_numbers(found: Sequence[Stream], graph: Trace, way: Trace) -> Iterator[str]:
    """The first place where another pass, which made the same calls, multiplied or added to a stream, to its start or
    to what a sub-layer adds, another number.
    """
    pairs = zip(_nodes(graph), _nodes(way), strict=True)
    changed = {one: other for one, other in pairs if not _close(_numbers(one), _numbers(other))}
    for stream in found if changed else ():
        path = stream.spine.union(stream.facts.behind([stream.start]) & stream.facts.varies)
        path = path.union(*(term.path for term in stream.terms))
        for one, other in changed.items():
            readers = {reader for reader in _readers(one) if op(reader) in ops.PRODUCTS}
            if one in path or not path.isdisjoint(readers):
                mine, theirs = ([f"{n:.4g}" for n in _numbers(node)] for node in (one, other))
                where = ops.place(one) or "the model's own forward"
                yield f"has the number {', '.join(theirs)} in {where}, where this one has {', '.join(mine)}"
                return


#: What a map says of a model for every input: of what, and the words or the number for it.
_Said = dict[str, str | float]

#: Of a number that is computed in float32; and of the factor on an embedding, measured on drawn values.
_ROUNDING, _SAMPLING = 1e-5, 0.1


def _said(of: ResidualMap) -> _Said:
    said: _Said = {}
    for embedding in of.embeddings:
        said[f"the embedding {embedding.parameter}"] = embedding.kind + ", normed" * embedding.normed
        said[f"the factor on the embedding {embedding.parameter}"] = embedding.scale
    for projection in of.residual_projections:
        behind = [f"the norm {projection.branch_norm}"] if projection.branch_norm is not None else []
        behind += [f"the {between.kind} {between.parameter or ''}".strip() for between in projection.between]
        said[f"the factor on {projection.parameter}"] = projection.multiplier
        said[f"what stands behind {projection.parameter}"] = ", ".join(behind) or "nothing"
    for norm in of.norms:
        said[f"the {norm.role} norm {norm.module}"] = f"{norm.kind}, gain {norm.gain}, eps {norm.eps:g}"
    return said | {"the head": of.head.parameter if of.head else "none", "the placement of norms": of.placement}


def _otherwise(here: _Said, there: _Said) -> str:
    """The first thing that is otherwise on the other way; empty for none."""
    for what in dict.fromkeys((*here, *there)):
        if what not in there or what not in here:
            return f"{'leaves out' if what in here else 'has'} {what}"
        mine, theirs = here[what], there[what]
        if isinstance(mine, float) and isinstance(theirs, float):
            if not math.isclose(mine, theirs, rel_tol=_SAMPLING if "embedding" in what else _ROUNDING):
                return f"has {theirs:.4g} as {what}, where this one has {mine:.4g}"
        elif mine != theirs:
            return f"has {theirs} as {what}, where this one has {mine}"
    return ""


#: What each sub-layer adds: its residual projections, and the shape of each.
_Added = list[dict[str, torch.Size]]


def _added(model: nn.Module, stream: Stream) -> _Added:
    _, sublayers = sublayers_of(stream)
    added: _Added = [{} for _ in set(sublayers)]
    for term, sublayer in zip(stream.terms, sublayers, strict=True):
        added[sublayer] |= {name: model.get_parameter(name).shape for _, name in term.projections}
    return added


def _agree(here: _Added, there: _Added, *, without_mixtures: bool) -> bool:
    """The other way adds the same, or the products of fewer ones of several equal experts.

    Args:
        without_mixtures: a sub-layer that only experts add may be missing there.
    """
    todo = list(there)
    for mine in here:
        equal = len(mine) > 1 and len(set(mine.values())) == 1
        if todo and (mine == todo[0] or (equal and todo[0] and todo[0].items() <= mine.items())):
            todo.pop(0)
        elif not (equal and without_mixtures):
            return False
    return not todo


def _difference(here: _Added, there: _Added) -> str:
    if len(here) != len(there):
        return f"has {len(there)} sub-layers, where this one has {len(here)}"
    return "adds the products of other weights to the stream"


def other_ways(model: nn.Module, found: Trace) -> Iterator[Way]:
    """The ways of ``model`` that ``found`` did not go, as far as its questions show them.

    A way on which the model's own code raises is none: such inputs are refused.
    """
    asked, rows = found.asked, _rows(found)
    ids = {i for i, value in enumerate(found.inputs.values()) if id(value) in rows}
    followed_by_none = [*asked.unknown, *(line for line, inputs in asked.plain.items() if inputs & ids)]
    if followed_by_none:
        yield Way(
            f"{_lines(followed_by_none)}: the code takes a number out of a tensor here, and what it does with it",
            "Python has it",
        )
    if asked.branches:
        chosen = f"{_lines(asked.branches)}: what the input holds chooses the way here, and the other way"
        yield from _gone(model, found.example, "first", chosen)
        yield from _gone(model, found.example, "all", chosen)
    if asked.values:
        chosen = f"{_lines(asked.values)}: what the input holds is read by the code here, and the way for other values"
        yield from _gone(model, _other_values(found.example, rows), "values", chosen)
        yield from _gone(model, found.example, "zeros", chosen)
    most = _MORE * len(found.graph.nodes)
    for length in sorted((asked.lengths | {_LONG}) - {asked.length}) if asked.length else ():
        for times in (_ROWS, 1) if length == _LONG else (1,):
            size = f"{times} x {length}" if times > 1 else str(length)
            chosen = f"inputs of {size} tokens, not {asked.length}: their size chooses the way, and that for these"
            larger = _as_large(found.example, asked.length, length, times)
            ways = [*_gone(model, larger, "example", chosen, most)]
            yield from ways
            if ways:
                break


def _calls(trace: Trace) -> list[object]:
    """Of each call that does more than to give a value another shape: what it is, and of which; and each parameter."""
    nodes = _nodes(trace)
    place = {node: i for i, node in enumerate(nodes)}
    return [
        trace.parameters.get(node)
        or (node.target if node.op != "placeholder" else "", *(place.get(_behind_shapes(a)) for a in operands(node)))
        for node in nodes
    ]


def _nodes(trace: Trace) -> list[Node]:
    return [node for node in trace.graph.nodes if op(node) not in ops.RESHAPES]


def _behind_shapes(node: Node) -> Node:
    while op(node) in ops.RESHAPES:
        node = operands(node)[0]
    return node


def _readers(node: Node) -> Iterator[Node]:
    for user in node.users:
        yield from _readers(user) if op(user) in ops.RESHAPES else (user,)


def _numbers(node: Node) -> list[float]:
    """The numbers that a call on data is given, but for sizes and places; of control that data is multiplied with, the
    root mean square.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return []
    if not value.is_meta:
        multiplies = any(op(reader) in ops.PRODUCTS for reader in _readers(node))
        return [float(value.to(torch.complex128).abs().square().mean().sqrt())] if multiplies and value.numel() else []
    numbers = (*node.args, *node.kwargs.values()) if value.is_floating_point() and op(node) not in ops.VIEWS else ()
    return [float(part) for part in numbers if isinstance(part, (int, float))]


def _close(here: list[float], there: list[float]) -> bool:
    return len(here) == len(there) and all(
        math.isclose(*both, rel_tol=_ROUNDING) for both in zip(here, there, strict=True)
    )


def _lines(lines: Iterable[str]) -> str:
    return "; ".join([*lines][:3])


def _gone(
    model: nn.Module, example: Mapping[str, Any], mode: Mode, chosen: str, most: float = math.inf
) -> Iterator[Way]:
    try:
        yield Way(chosen, recorded(model, example, mode, most), mode in {"all", "zeros"})
    except Exception as error:  # whatever a forward pass raises
        if most == math.inf and mode in {"first", "values"} and not _is_own(error):
            yield Way(chosen, f"the model does not run so: {first_line(error)}")


def _is_own(error: Exception) -> bool:
    """The model's own code raised it, by ``raise``, ``assert`` or ``torch._check``."""
    *_, last = traceback.extract_tb(error.__traceback__)
    meant = isinstance(error, (AssertionError, ValueError, NotImplementedError, RuntimeError))
    return meant and (not is_ours(last.filename) or last.name.startswith(CHECKING))


def _rows(found: Trace) -> dict[int, int]:
    """Inputs by their ``id`` that look rows up in tables -> the rows of the smallest of these."""
    rows: dict[int, int] = {}
    for node in found.graph.nodes:
        if op(node) in ops.LOOKUPS:
            table, index = operands(node)[0], operands(node)[-1]
            value = found.inputs.get(behind_views(index))
            if value is not None and shape(table):
                rows[id(value)] = min(shape(table)[0], rows.get(id(value), shape(table)[0]))
    return rows


def _other_values(example: Mapping[str, Any], rows: Mapping[int, int]) -> dict[str, Any]:
    """The example with other ids: counted from the end of the smallest table that they look rows up in.

    Ids that stand in it more than once have a meaning: they are padding, or stand for the parts of an image.
    """
    result = {}
    for name, value in example.items():
        if id(value) not in rows:
            result[name] = value
            continue
        _, inverse, counts = torch.unique(value, return_inverse=True, return_counts=True)
        turned = (rows[id(value)] - 1 - value) % rows[id(value)]
        result[name] = torch.where(counts[inverse] == 1, turned, value)
    return result


def _as_large(example: Mapping[str, Any], length: int, wanted: int, rows: int) -> dict[str, Any]:
    """The example with its tokens repeated or cut off, and all that is there for each of its rows so many times."""
    tensors = {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}
    batch = next((len(t) for t in tensors.values() if not t.is_floating_point() and t.shape[-1:] == (length,)), 0)
    places = torch.arange(wanted) % length
    result = dict(example)
    for name, value in tensors.items():
        axes = [axis for axis, size in enumerate(value.shape) if size == length]
        longer = functools.reduce(lambda v, axis: v.index_select(axis, places), axes, value)
        per_row = longer.ndim > 1 and len(longer) == batch
        result[name] = torch.cat([longer] * rows) if per_row else longer
    return result
