"""Norms, recognised by what they compute: ``x / rms(x)`` and ``(x - mean(x)) / std(x)`` in whatever notation.

A value that is put together from several, all of which are computed from one earlier value ``x`` without any matrix, is
run on random numbers at the width of the model. If it is ``x`` divided by its size, it is a norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from spikepatch.residual import ops
from spikepatch.residual.execute import run
from spikepatch.residual.map import NormKind
from spikepatch.residual.ops import last, op, operands, shape
from spikepatch.residual.trace import Trace
from spikepatch.source.private import schema

#: A norm that is written out has at most so many nodes.
_LONGEST = 40

#: Numbers that are run at most: attention scores of a long text are no norm, and take gigabytes.
_LARGEST = 1 << 27

#: Of float32, how far two notations of one norm may differ: the terms of a mean are summed in another order.
_TOLERANCE = 1e-3

#: How far an eps that was measured may be from the number that stands in the code: a deviation over d - 1 is larger.
_ABOUT = 0.1

#: What puts the channels before the positions, or gives them so.
_CHANNELS_FIRST = frozenset("transpose permute movedim mT numpy_T".split()) | ops.CONVOLUTIONS

#: Values so small that eps alone decides; their squares are still numbers of float32.
_TINY = 1e-17


@dataclass(frozen=True)
class NormNode:
    """A norm in the graph: ``output`` is the node behind the division by the statistic.

    ``factor`` is what was multiplied before that, in norms that put their gain first; other gains come behind.
    """

    output: Node
    input: Node
    kind: NormKind
    eps: float
    factor: Node | None = None


@dataclass(frozen=True)
class _Part:
    """The nodes between ``x`` (exclusive) and ``y`` (inclusive), all of whose data is computed from ``x``.

    ``further``: it has more statistics, one number for each token, than the part from a nearer ``x``.
    """

    x: Node
    y: Node
    nodes: tuple[Node, ...]
    further: bool


#: What parts of a graph compute, by their form: kind and eps of a norm, or None. Equal parts compute the same.
Forms = dict[object, tuple[NormKind, float] | None]


def norms(
    trace: Trace, data: Callable[[Node], list[Node]], varies: Set[Node], weight: Mapping[Node, str], known: Forms
) -> dict[Node, NormNode]:
    """Every norm of the graph, by its output.

    Args:
        data: the operands of a node whose values depend on the tokens.
        varies: nodes computed from embedded tokens, as data or as control.
        weight: nodes that are one parameter, seen through views.
        known: what has been measured, of this or another pass of the model; added to.
    """
    found: dict[Node, NormNode] = {}
    for node in trace.graph.nodes:
        if op(node) in ops.NORMS:
            kind: NormKind = "rmsnorm" if "rms" in op(node) else "layernorm"
            found[node] = NormNode(node, operands(node)[0], kind, _eps(node))
            continue
        parts = _parts(node, data, weight, found.keys())
        for part in (
            part for part in parts if _is_closed(part, varies)
        ):  # a cast or a gain before the norm is no part of it
            key = _form(part, weight, trace.asked.length)
            if key not in known:
                known[key] = None if _is_polynomial(part) else _measured(trace, part)
            nearer = found.get(node)
            if (result := known[key]) is not None and (nearer is None or part.further or result[0] != nearer.kind):
                found[node] = NormNode(node, part.x, *result, _factor(part, weight))
    return found


def _parts(node: Node, data: Callable[[Node], list[Node]], weight: Mapping[Node, str], known: Set[Node]) -> list[_Part]:
    """The values that all of ``node`` is computed from and that may be what it is a norm of, the nearest first."""
    size = math.prod(shape(node))
    if last(node) < 2 or op(node) in ops.VIEWS or len(edge := set(data(node))) < 2:
        return []
    found: list[_Part] = []
    inside = {node}
    statistics = 0
    while edge and len(inside) < _LONGEST:
        if len(edge) == 1:
            (x,) = edge
            widths = {shape(x)[axis] for axis in _axes(x)} if shape(x) else set()
            reduced = sum(math.prod(shape(n)) * width == size for n in inside for width in widths - {1})
            seen = bool(found) and op(found[-1].x) in ops.VIEWS and operands(found[-1].x)[0] is x
            if reduced and math.prod(shape(x)) == size <= _LARGEST and not seen:
                found.append(_Part(x, node, tuple(sorted(inside)), reduced > statistics))
                statistics = reduced
        latest = max(edge)
        matrix = any(a in weight and len(shape(a)) > 1 and min(shape(a)[-2:]) > 1 for a in operands(latest))
        if latest in known or op(latest) in ops.LOOKUPS or matrix or not data(latest):
            break
        edge.remove(latest)
        inside.add(latest)
        edge.update(data(latest))
    return found


def _is_closed(part: _Part, varies: Set[Node]) -> bool:
    """Of what the input decides it reads nothing but ``x``: no choice of experts, say."""
    own = {part.x, *part.nodes}
    read = (operands(node)[:1] if op(node) in ops.LIKE_SECOND else operands(node) for node in part.nodes)
    return all(a in own or a not in varies for arguments in read for a in arguments)


def _is_polynomial(part: _Part) -> bool:
    """It divides by nothing that hangs on ``x``. So it is no norm, which is as large for 100 ``x`` as for ``x``."""
    own = {part.x, *part.nodes}
    return all(op(n) in ops.POLYNOMIAL or (op(n) == "div" and n.args[1] not in own) for n in part.nodes)


def _axes(x: Node) -> tuple[int, ...]:
    """Along which the stream's width may lie."""
    return (-1, 1) if op(x) in _CHANNELS_FIRST and len(shape(x)) > 2 else (-1,)


def _form(part: _Part, weight: Mapping[Node, str], length: int) -> object:
    """What the part computes, whatever its place and the number of tokens: equal ones have equal forms."""
    place = {node: i for i, node in enumerate((part.x, *part.nodes))}

    def sizes(node: Node) -> object:
        return tuple("length" if size == length else size for size in shape(node))

    def named(node: Node) -> object:
        return place[node] if node in place else ("weight" if node in weight else node, sizes(node))

    def of(argument: Any) -> object:
        if isinstance(argument, (list, tuple)):
            return tuple(map(of, argument))
        if isinstance(argument, Node):
            return ("node", named(argument))
        return "length" if type(argument) is int and argument == length else repr(argument)

    calls = [(node.target, of(node.args), of([*node.kwargs.items()]), sizes(node)) for node in part.nodes]
    return (sizes(part.x), *calls)


def _factor(part: _Part, weight: Mapping[Node, str]) -> Node | None:
    """The gain that is multiplied inside the part."""
    gains = [a for node in part.nodes for a in operands(node) if a not in part.nodes and _is_gain(a, weight)]
    return gains[-1] if gains else None


def _is_gain(node: Node, weight: Mapping[Node, str]) -> bool:
    return node in weight or (op(node) == "add" and any(a in weight for a in operands(node)))


def _measured(trace: Trace, part: _Part) -> tuple[NormKind, float] | None:
    """The kind and eps of the norm that the part computes, if it is one."""
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + torch.randn(shape(part.x), generator=generator)  # the mean is to be seen
    x = x * torch.rand((*x.shape[:-1], 1), generator=generator).add(0.5)  # no two tokens are as large

    def computed(value: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = run(trace, [part.y], {part.x: value}, dict.fromkeys(trace.inputs, 0))[part.y]
        turned = result.shape != x.shape and result.mT.shape == x.shape
        return (result.mT if turned else result).float().reshape(x.shape)

    try:
        large, larger = computed(1e2 * x), computed(1e4 * x)
    except (IndexError, RuntimeError, NotImplementedError):  # an operation that the CPU lacks, or another shape
        return None
    if not torch.allclose(large, larger, rtol=_TOLERANCE, atol=_TOLERANCE):
        return None
    for axis in _axes(part.x):
        centred = x - x.mean(axis, keepdim=True)
        kinds: dict[NormKind, torch.Tensor] = {"rmsnorm": x, "layernorm": centred}
        for kind, value in kinds.items():
            exact = value / value.square().mean(axis, keepdim=True).sqrt()
            factor = float((larger * exact).mean())  # of a gain 1 + w, or of a deviation over d - 1
            if factor > 0 and float((larger / factor - exact).abs().max()) <= _TOLERANCE * float(exact.abs().max()):
                at_zero = float((computed(_TINY * exact) / exact).median()) / factor / _TINY
                return kind, _eps_of(part, at_zero, x.shape[axis])
    return None


def _eps_of(part: _Part, gain: float, width: int) -> float:
    """eps as it is written, from what tiny values are multiplied with: it stands under the root or behind it, and with
    the length of x instead of its RMS.
    """
    measured = gain**-2 if 0 < gain < math.inf else 0.0
    if measured < 10 * _TINY**2:
        return 0.0
    numbers = [a for node in part.nodes for a in (*node.args, *node.kwargs.values()) if isinstance(a, float)]
    for meant in (measured, measured * width, math.sqrt(measured), math.sqrt(measured * width)):
        for number in numbers:
            if math.isclose(number, meant, rel_tol=_ABOUT):
                return _as_written(number)
    return float(f"{measured:.3g}")


def _as_written(number: float) -> float:
    """1e-05 for 9.999999747378752e-06: torch writes out some norms with their eps rounded to float32."""
    short = float(f"{number:.6g}")
    return short if float(torch.tensor(short, dtype=torch.float32)) == number else number


def _eps(node: Node) -> float:
    """Of a fused norm. Arguments that have their default may be left out."""
    numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, float)]
    of_op = schema(node.target)
    defaults = [a.default_value for a in of_op.arguments if a.name == "eps"] if of_op is not None else []
    return float([0.0, *(d for d in defaults if d is not None), *numbers][-1])
