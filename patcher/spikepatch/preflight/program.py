"""A traced forward pass as a program: run on real numbers, one piece of the stream at a time.

The graph is cut at the points of the stream that sub-layers read. A piece computes what lies between two of them from
the few values that are alive there (as a rule the stream alone), so forward, backward and Jacobians need the weights
of one piece at a time: they are asked for when a piece begins and dropped when it ends. What depends on no weight
(masks, rotary angles) is computed once.

Every number is at least float32, whatever the model's dtype: what is measured is the initialisation, not rounding.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from spikepatch.errors import Refused
from spikepatch.residual.execute import compute, execute
from spikepatch.residual.kinds import sublayers_of
from spikepatch.residual.map import SublayerKind
from spikepatch.residual.ops import FUSED_ATTENTION, VIEWS, behind_views, op, operands, writes
from spikepatch.residual.stream import Stream

#: Name of a parameter, as ``named_parameters()`` gives it -> its values, of any float dtype, anywhere.
Weights = Callable[[str], torch.Tensor]
NodeValues = dict[Node, Any]

_GROUPED = frozenset("_grouped_mm grouped_mm grouped_mm_fallback".split())


@dataclass(frozen=True)
class Sublayer:
    """One sub-layer of the stream: it reads ``point`` and adds ``outputs``, whose sum is its branch.

    ``projections`` are its residual projections: (the matmul, the parameter's name).
    """

    index: int
    kind: SublayerKind
    point: Node
    outputs: tuple[Node, ...]
    projections: tuple[tuple[Node, str], ...]
    interior: frozenset[Node]


@dataclass(frozen=True)
class Piece:
    """Nodes between two points of the stream, in execution order.

    Attributes:
        nodes: what to execute; nodes that are weights in another form are in every piece that reads them.
        needs: values of earlier pieces.
        point: the last node: a point of the stream; of the last piece the model's output.
        parameters: placeholders that it reads.
        writes: it holds in-place operations, so its inputs must be copies.
    """

    nodes: tuple[Node, ...]
    needs: tuple[Node, ...]
    point: Node
    parameters: tuple[Node, ...]
    writes: bool


@dataclass(frozen=True)
class Program:
    """One forward pass, in pieces.

    Attributes:
        stream: that the graph is cut at.
        pieces: first to last: the embedding, then one per point of the stream, then the head.
        sublayers: in the order of their additions.
        alive: after each piece, what later ones need of the values so far.
        static: values of all that depends on no weight.
        device: where it is run.
    """

    stream: Stream
    pieces: tuple[Piece, ...]
    sublayers: tuple[Sublayer, ...]
    alive: tuple[frozenset[Node], ...]
    static: Mapping[Node, Any]
    device: torch.device

    @property
    def points(self) -> tuple[Node, ...]:
        """The stream's points in order: the input of the first sub-layer first, the end of the stream last."""
        return tuple(piece.point for piece in self.pieces[:-1])

    def parameter(self, node: Node, weights: Weights) -> torch.Tensor:
        """The values of a placeholder of ``pieces[i].parameters``, in at least float32, on the program's device."""
        return _at_least_float32(weights(self.stream.facts.trace.parameters[node]).detach()).to(self.device)


def compile_program(stream: Stream, device: torch.device) -> Program:
    """Cut the graph of ``stream`` at its points, and compute what depends on no weight."""
    facts = stream.facts
    cone = facts.behind([facts.trace.output])
    sublayers = _sublayers(stream)
    points = sorted({*(s.point for s in sublayers), _end(stream)}, key=facts.order.__getitem__)
    weighted: set[Node] = set()  # depends on a parameter
    for node in facts.nodes:
        if node in facts.trace.parameters or any(a in weighted for a in operands(node)):
            weighted.add(node)
    # In every piece that reads it: memory that data is written into, and weights in another form.
    remade = _scratch(stream, weighted) | {n for n in weighted - facts.varies if n not in facts.trace.parameters}
    data = [n for n in facts.nodes if n in cone and n in weighted and n in facts.varies]
    _check_runnable(data)

    ends = [facts.order[point] for point in points]
    piece_of = {node: bisect_left(ends, facts.order[node]) for node in data}
    pieces = []
    for i, point in enumerate([*points, facts.trace.output]):
        own = [node for node in data if piece_of[node] == i]
        read = {a for node in own for a in operands(node)}
        helpers = facts.behind(read & remade, stop=set(facts.nodes) - remade)
        nodes = tuple(sorted({*own, *helpers}, key=facts.order.__getitem__))
        read |= {a for node in helpers for a in operands(node)}
        pieces.append(
            Piece(
                nodes=nodes,
                # Where no head follows the stream, its end is the output, and the last piece hands it on.
                needs=tuple(a for a in data if (a in read or a is point) and piece_of[a] < i),
                point=point,
                parameters=tuple(p for p in facts.trace.parameters if p in read),
                writes=any(writes(node) for node in nodes),
            )
        )
    last_use = {node: i for i, piece in enumerate(pieces) for node in piece.needs}
    last_use[facts.trace.output] = len(points) + 1
    alive = tuple(frozenset(n for n in last_use if piece_of[n] <= i < last_use[n]) for i in range(len(pieces)))
    program = Program(stream, tuple(pieces), sublayers, alive, {}, device)
    static = [n for n in facts.nodes if n in cone and n not in weighted and n not in remade]
    values = _constants(program)
    with torch.no_grad():
        _execute(program, static, values)
    return dataclasses.replace(program, static=values)


def _check_runnable(nodes: Iterable[Node]) -> None:
    for node in nodes:
        if op(node) == "_add_batch_dim":
            raise Refused(
                what="its forward pass cannot be run piece by piece",
                where=node.name,
                why="it uses torch.vmap, whose batch axis this version of torch.export leaves to the interpreter",
                remedy="a newer transformers may compute the same without it; convert and inspect are not affected",
            )


def run_piece(
    program: Program,
    piece: Piece,
    inputs: Mapping[Node, Any],
    parameters: Mapping[Node, torch.Tensor],
    keep: Iterable[Node],
) -> NodeValues:
    """Execute one piece.

    Args:
        inputs: at least the values of ``piece.needs``.
        parameters: at least those of ``piece.parameters``.
        keep: nodes of the piece whose values are wanted; all others are dropped after their last use.
    """
    values: NodeValues = {node: inputs[node] for node in piece.needs}
    if piece.writes:
        values = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
    written = {behind_views(operands(node)[0]) for node in piece.nodes if writes(node)}
    values.update((p, parameters[p].clone() if p in written else parameters[p]) for p in piece.parameters)
    wanted = set(keep)
    _execute(program, piece.nodes, values, wanted)
    return {node: values[node] for node in wanted if node in values}


def part_of(program: Program, piece: Piece, start: Node, stop: Node) -> Piece:
    """The part of ``piece`` that computes ``stop`` from ``start``, all other values of the piece's inputs held."""
    inside = program.stream.facts.behind([stop], stop={start}) & set(piece.nodes)
    nodes = tuple(node for node in piece.nodes if node in inside)
    read = {a for node in nodes for a in operands(node)}
    return Piece(
        nodes=nodes,
        needs=tuple(dict.fromkeys((start, *(n for n in piece.needs if n in read)))),
        point=stop,
        parameters=tuple(p for p in piece.parameters if p in read),
        writes=piece.writes,
    )


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in {torch.bfloat16, torch.float16} else tensor


def _end(stream: Stream) -> Node:
    """The last point of the stream that is not behind a final norm."""
    facts = stream.facts
    last = max(stream.additions, key=facts.order.__getitem__)
    norms = [n for n in stream.spine if n in facts.norm_at and facts.order[n] > facts.order[stream.start]]
    return last if all(facts.order[norm] > facts.order[last] for norm in norms) else stream.end


def _sublayers(stream: Stream) -> tuple[Sublayer, ...]:
    order = stream.facts.order
    kinds, numbers = sublayers_of(stream)
    found = []
    for number, kind in dict(zip(numbers, kinds, strict=True)).items():
        terms = [t for t, n in zip(stream.terms, numbers, strict=True) if n == number]
        found.append(
            Sublayer(
                index=number,
                kind=kind,
                point=max((t.reads for t in terms), key=order.__getitem__),
                outputs=tuple(t.node for t in terms),
                projections=tuple(projection for t in terms for projection in t.projections),
                interior=frozenset().union(*(t.interior for t in terms)),
            )
        )
    return tuple(found)


def _scratch(stream: Stream, weighted: set[Node]) -> set[Node]:
    """Memory without weights that data is written into: made anew for every run."""
    found: set[Node] = set()
    for node in stream.facts.nodes:
        if not writes(node) or node not in weighted:
            continue
        target = operands(node)[0]
        while target not in weighted and target.op == "call_function" and target not in found:
            found.add(target)
            if op(target) not in VIEWS:
                break
            target = operands(target)[0]
    return found


def _constants(program: Program) -> NodeValues:
    trace = program.stream.facts.trace
    constants = {**trace.buffers, **trace.inputs}  # copies: the graph may write into them
    return {node: _at_least_float32(value.clone()).to(program.device) for node, value in constants.items()}


def _execute(program: Program, nodes: Sequence[Node], values: NodeValues, keep: set[Node] | None = None) -> None:
    """Run ``nodes`` into ``values``; with ``keep`` given, drop all others after their last use among ``nodes``."""
    execute(
        nodes,
        values,
        value=lambda node: values[node] if node in values else program.static[node],
        call=partial(_call, program.device),
        keep=keep,
    )


def _call(device: torch.device, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """By kernels that can be differentiated twice."""
    if op(node) in _GROUPED:
        return _grouped(*args, **kwargs)
    if op(node) == "histc":
        args = [args[0].float(), *args[1:]]  # counts of integers, which the CPU lacks
    if op(node) in FUSED_ATTENTION and torch.is_grad_enabled():
        with sdpa_kernel(SDPBackend.MATH):
            return compute(node, args, kwargs, device)
    return compute(node, args, kwargs, device)


def _grouped(
    tokens: torch.Tensor, matrices: torch.Tensor, offs: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:  # (rows, in), (groups, in, out), ends of the groups -> (rows, out)
    ends = [0, *offs.tolist()]
    parts = [tokens[a:b] @ matrix for a, b, matrix in zip(ends, ends[1:], matrices, strict=False)]
    rest = tokens.new_zeros(len(tokens) - ends[-1], matrices.shape[-1])
    return torch.cat([*parts, rest])


def is_float(value: Any) -> bool:
    """It can have a gradient."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()
