"""The other ways that a forward pass may go, by what the inputs hold or by how long they are: each is run as well."""

from __future__ import annotations

import functools
import math
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spikepatch.errors import first_line
from spikepatch.residual import ops
from spikepatch.residual.kinds import sublayers_of
from spikepatch.residual.ops import behind_views, op, operands, shape
from spikepatch.residual.stream import Stream, find
from spikepatch.residual.told import Mode, is_ours
from spikepatch.residual.trace import Trace, recorded
from spikepatch.source.private import CHECKING

#: A length that is tried of every model, as those of training are longer than the example's: that ``0.5 * n`` was
#: computed of a length n, nobody is told.
_LONG = 512

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


def compared(model: nn.Module, graph: Trace, found: Sequence[Stream]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the other ways that the pass may go: what they add to the stream instead; and why that is not known."""
    strayed: dict[str, None] = {}
    unknown: dict[str, None] = {}
    here = [_added(model, stream) for stream in found]
    for way in other_ways(model, graph):
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
    return tuple(strayed), tuple(unknown)


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
    for length in sorted((asked.lengths | {_LONG}) - {asked.length}) if asked.length else ():
        chosen = f"inputs of {length} tokens, not {asked.length}: their length chooses the way, and that for these"
        longer = _as_long(found.example, asked.length, length)
        for way in _gone(model, longer, "example", chosen, _MORE * len(found.graph.nodes)):
            if not isinstance(way.trace, Trace) or _calls(way.trace) != _calls(found):
                yield way


def _calls(trace: Trace) -> list[object]:
    """Of each node, what is called, and of which nodes; or which parameter it is."""
    place = {node: i for i, node in enumerate(trace.graph.nodes)}
    return [
        trace.parameters.get(node, (node.target if node.op != "placeholder" else "", *map(place.get, operands(node))))
        for node in place
    ]


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


def _as_long(example: Mapping[str, Any], length: int, wanted: int) -> dict[str, Any]:
    """The example with its tokens repeated or cut off."""
    places = torch.arange(wanted) % length
    result = {}
    for name, value in example.items():
        sizes = value.shape if isinstance(value, torch.Tensor) else ()
        axes = [axis for axis, size in enumerate(sizes) if size == length]
        result[name] = functools.reduce(lambda v, axis: v.index_select(axis, places), axes, value)
    return result
