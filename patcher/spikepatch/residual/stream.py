"""The residual stream of a traced model, found by dataflow, and the proof that it was found whole.

The stream is a sum. A value *carries* the stream when it is an embedding lookup, or is reached from one through
additions, views, casts, norms and token-independent factors only. Walking back from the output, the first carrying
value is the last point of the stream; expanding it back through its carrying operands gives the *spine*, and every
other operand of a spine addition is a *term*: the output of a sub-layer. From each term a walk back through linear ops
meets the nearest matmuls with a parameter: the residual projections.

Proof, two-sided. *Cut*: with every residual projection's output set to zero and zeros propagated by a rule per op, the
parameters that the output still depends on must be exactly those reached without entering a term, and the token
embedding must be among them. *Minimality*: give any one projection back and its own weight is live again.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node

from spikepatch.residual import ops
from spikepatch.residual.ops import last, op, operands, shape
from spikepatch.residual.trace import Trace


@dataclass(frozen=True)
class NormNode:
    """A norm in the graph: ``output`` is the node behind the division by the statistic, before any gain."""

    output: Node
    input: Node
    kind: Literal["layernorm", "rmsnorm"]
    eps: float


@dataclass(frozen=True)
class Term:
    """One operand of a residual addition that is no skip, and the weights whose products it is made of."""

    node: Node
    projections: tuple[tuple[Node, str], ...]  # (matmul, parameter)
    path: frozenset[Node]  # nodes between the projections and the addition
    interior: frozenset[Node]  # what computes it, back to the stream
    reads: Node  # the latest point of the stream that it reads
    crosses: bool  # it reads another stream as well


@dataclass(frozen=True)
class Stream:
    """One analysed stream: ``start`` is its first point (all embeddings summed), ``end`` its last.

    ``tables`` are the nodes at which tables of rows enter: lookups, and learned positions sliced from a parameter.
    ``suffix`` holds what lies between ``end`` (exclusive) and the output: the head. ``leaks`` says why the map is not
    proven; empty: proven.
    """

    facts: Analysis
    start: Node
    end: Node
    spine: frozenset[Node]
    terms: tuple[Term, ...]
    tables: tuple[Node, ...]
    suffix: frozenset[Node]
    leaks: tuple[str, ...]


class Analysis:
    """Facts about every node of one graph, each computed in a single pass in execution order."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.nodes = list(trace.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.weight = self._weight_views()
        self.varies = self._input_dependent()
        self.norm_at = {node: norm for node in self.nodes if (norm := self._norm(node)) is not None}
        self.carries = self.carriers(None)

    def _weight_views(self) -> dict[Node, str]:
        """Nodes that are one parameter, seen through views, casts, gathers and constant factors -> its name."""
        weight: dict[Node, str] = dict(self.trace.parameters)
        for node in self.nodes:
            arguments = operands(node)
            constant = all(a in weight or a in self.trace.buffers for a in arguments)
            seen_through = op(node) in ops.VIEWS or (op(node) in ops.PRODUCTS and constant)
            names = {weight[a] for a in arguments if a in weight}
            if seen_through and len(names) == 1 and arguments[0] in weight:
                weight[node] = names.pop()
        return weight

    def _input_dependent(self) -> set[Node]:
        """Nodes computed from embedded tokens or real-valued inputs: all but weights, constants, positions, masks."""
        varies = {node for node in self.trace.inputs if _floating(node)}
        for node in self.nodes:
            if op(node) in ops.LOOKUPS or (node not in self.weight and any(a in varies for a in operands(node))):
                varies.add(node)
        return varies

    def data(self, node: Node) -> list[Node]:
        """The operands whose values depend on the tokens; indices and offsets that do are control, not data."""
        arguments = operands(node)[:1] if op(node) in ops.VIEWS else operands(node)  # type_as reads a dtype only
        return [a for a in arguments if a in self.varies and _floating(a)]

    def carriers(self, root: Node | None) -> dict[Node, list[Node]]:
        """Nodes that carry the stream -> the operands through which they do (none for a lookup or the ``root``)."""
        carries: dict[Node, list[Node]] = {}
        for node in self.nodes:
            name = op(node)
            arguments = operands(node)
            moving = self.data(node)
            through: list[Node] = []
            if name in ops.LOOKUPS or node is root:
                carries[node] = []
            elif node in self.norm_at:
                through = [a for a in (self.norm_at[node].input,) if a in carries]
            elif name in ops.ADDS:
                through = [a for a in arguments if a in carries]
            elif name in ops.VIEWS and not _narrows(node):
                through = [a for a in arguments[:1] if a in carries]
            elif name in ops.PRODUCTS or name in {"masked_fill", "where"}:
                alone = len(moving) == 1 and moving[0] in carries and last(node) == last(moving[0])
                through = moving if alone else []
            elif name == "cat" and moving and all(a in carries and last(a) == last(node) for a in moving):
                through = moving
            if through:
                carries[node] = list(dict.fromkeys(through))
        return carries

    def _norm(self, node: Node) -> NormNode | None:
        """Recognise a norm, fused or written out: ``x * f(mean(x^2))`` with f made of pointwise ops and numbers."""
        name = op(node)
        if name in ops.NORMS:
            fused: Literal["layernorm", "rmsnorm"] = "rmsnorm" if "rms" in name else "layernorm"
            numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, float)]
            return NormNode(node, operands(node)[0], fused, numbers[-1] if numbers else 0.0)
        if name not in ops.PRODUCTS or len(operands(node)) != 2 or last(node) < 2 or node not in self.varies:
            return None
        first, second = operands(node)
        for value, statistic in ((first, second), (second, first)):
            if name != "mul" and value is second:
                break
            if last(value) != last(node) or statistic not in self.varies:
                continue
            found = _statistic_of(statistic, value)
            if found is not None:
                source, kind, eps = found
                return NormNode(node, source, kind, eps)
        return None

    def behind(self, ends: Iterable[Node], stop: Iterable[Node] = ()) -> set[Node]:
        """Backward cone of ``ends``; nodes in ``stop`` are reached but not entered, and not returned."""
        barrier = set(stop)
        seen: set[Node] = set()
        todo = [n for n in ends if n not in barrier]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            todo.extend(a for a in operands(node) if a not in seen and a not in barrier)
        return seen


def _floating(node: Node) -> bool:
    value = node.meta.get("val")
    return value.is_floating_point() if isinstance(value, torch.Tensor) else True


def _narrows(node: Node) -> bool:
    """A view that leaves out a part of the stream's last axis (a split of heads keeps the number of elements)."""
    if op(node) in {"getitem", "split", "chunk", "unbind", "split_with_sizes"}:
        return True
    source = operands(node)[0]
    return op(node) in {"slice", "select", "narrow", "index_select", "gather"} and last(node) != last(source)


def _statistic_of(statistic: Node, value: Node) -> tuple[Node, Literal["layernorm", "rmsnorm"], float] | None:
    """Is ``statistic`` a per-token reduction of ``value`` (or of what ``value`` is a cast or the centred form of)?"""
    roots = [value]
    centred = False
    while True:  # through casts, and one subtraction of the mean
        node = roots[-1]
        if op(node) in {"to", "_to_copy", "alias", "clone", "detach", "contiguous", "type_as"}:
            roots.append(operands(node)[0])
        elif op(node) == "sub" and len(operands(node)) == 2 and op(_uncast(operands(node)[1])) == "mean":
            centred = True
            roots.append(operands(node)[0])
        else:
            break
    seen: set[Node] = set()
    todo = [statistic]
    reduced = squared = False
    eps = 0.0
    while todo:
        node = todo.pop()
        if node in roots or node in seen:
            continue
        seen.add(node)
        if op(node) not in ops.STATISTIC or len(seen) > 40:
            return None
        moment = op(node) in {"var", "std", "linalg_vector_norm", "norm"}
        reduced |= moment or op(node) in {"mean", "sum"}
        squared |= moment or op(node) in {"pow", "square"} or (op(node) == "mul" and len(operands(node)) == 1)
        numbers = [a for a in node.args[1:] if isinstance(a, float)]
        if op(node) in {"add", "clamp", "clamp_min", "maximum"} and numbers:
            eps = numbers[0]
        if not operands(node):
            return None
        todo.extend(operands(node))
    if not (reduced and squared):
        return None
    return roots[-1], "layernorm" if centred else "rmsnorm", eps


def _uncast(node: Node) -> Node:
    while op(node) in {"to", "_to_copy", "expand", "unsqueeze"}:
        node = operands(node)[0]
    return node


def find(trace: Trace) -> tuple[Stream, ...] | str:
    """The stream that feeds the output, then those that feed it (an encoder's); or why there is no residual sum."""
    facts = Analysis(trace)
    main = _locate(facts, trace.output, frozenset())
    if isinstance(main, str):
        return main
    source = _foreign_output(main)
    if source is None:
        return (main,)
    other = _locate(Analysis(trace), source, frozenset())
    if isinstance(other, str):
        return (main,)
    again = _at(facts, trace.output, other.spine | {source})  # sub-layers end where the other stream begins
    return (main if isinstance(again, str) else again, other)


def _locate(facts: Analysis, output: Node, beyond: frozenset[Node]) -> Stream | str:
    """The stream that ends before ``output``; where no lookup begins it, a projected embedding or patches may."""
    found = _at(facts, output, beyond)
    if isinstance(found, Stream) and not found.leaks:
        return found
    for root in _possible_roots(facts, output):
        facts.carries = facts.carriers(root)
        rooted = _at(facts, output, beyond)
        if isinstance(rooted, Stream) and not rooted.leaks and root in rooted.spine:
            return rooted
    facts.carries = facts.carriers(None)
    return found


def _at(facts: Analysis, output: Node, beyond: frozenset[Node]) -> Stream | str:
    frontier = _first_carriers(facts, output)
    if not frontier:
        return _no_sum(facts, output)
    end = max(frontier, key=facts.order.__getitem__)
    spine, entries = _spine(facts, end)
    found = {node: _term(facts, node, spine, beyond) for nodes in entries.values() for node in nodes}
    terms = sorted((t for t in found.values() if t is not None), key=lambda t: facts.order[t.node])
    if not terms:
        return _no_sum(facts, output)
    if copies := _copies(spine):
        return copies
    start = _start(facts, spine, {add for add, nodes in entries.items() if any(found[n] for n in nodes)}, end)
    suffix = facts.behind([output], stop=spine)
    return Stream(
        facts=facts,
        start=start,
        end=end,
        spine=frozenset(spine),
        terms=tuple(terms),
        tables=tuple(_tables(facts, spine, facts.behind([start]))),
        suffix=frozenset(suffix),
        leaks=tuple(_prove(facts, output, spine, start, terms)),
    )


def _no_sum(facts: Analysis, output: Node) -> str:
    return _copies(facts.behind([output]) & facts.carries.keys()) or (
        "no sum of an embedding and sub-layer outputs reaches the output: the stream is not a residual sum"
    )


def _copies(carriers: Iterable[Node]) -> str | None:
    """The reason to refuse a stream that is kept in several copies, broadcast from the embedding along a new axis."""
    for node in carriers:
        if op(node) not in {"expand", "repeat", "repeat_interleave"}:
            continue
        before, after = shape(operands(node)[0]), shape(node)
        along_width = len(after) > 2 and after[-1] > before[-1]
        new_axis = len(after) > 3 and after[-1] == before[-1] and after[-2] > before[-2] == 1
        if along_width or new_axis:
            count = after[-1] // before[-1] if along_width else after[-2]
            return f"hyper-connections: the stream is a set of {count} mixed copies, not a sum"
    return None


def _possible_roots(facts: Analysis, output: Node) -> list[Node]:
    """Products with a weight whose input is computed without attention or additions of its own: in execution order."""
    roots = []
    plain: set[Node] = set()
    cone = facts.behind([output])
    for node in facts.nodes:
        if node not in facts.varies or node not in cone:
            continue
        data = facts.data(node)
        mixing = len(data) > 1 and op(node) not in ops.ADDS | {"cat"}
        skip = (
            op(node) in ops.ADDS
            and len(data) > 1
            and any(a in facts.behind([b]) for a in data for b in data if a is not b)
        )
        if all(a in plain for a in data) and not (mixing or skip or op(node) in {"softmax"} | ops.FUSED_ATTENTION):
            plain.add(node)
            if op(node) in ops.MATMULS | ops.CONVOLUTIONS:
                roots.append(node)
    return roots[:24]


def _foreign_output(main: Stream) -> Node | None:
    """What sub-layers of ``main`` read beside the stream itself and that is computed from other inputs, if anything."""
    facts = main.facts
    own = (facts.behind([main.start]) | main.spine) & facts.varies
    for node in facts.nodes:
        if node in facts.varies and any(a in own for a in operands(node)):
            own.add(node)
    fed = set(facts.trace.inputs)  # position biases are looked up as well, but by constants
    for node in facts.nodes:
        if any(a in fed for a in operands(node)):
            fed.add(node)
    inside = {n for term in main.terms for n in term.interior}
    foreign = inside & facts.varies & fed - own
    edge = [n for n in foreign if any(user in own for user in n.users)]
    if len(edge) < 2:
        return None
    common = set.intersection(*(facts.behind([n]) for n in edge)) & foreign
    return max(common, key=facts.order.__getitem__, default=None)


def _first_carriers(facts: Analysis, output: Node) -> set[Node]:
    found: set[Node] = set()
    seen: set[Node] = set()
    todo = [output]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in facts.carries:
            found.add(node)
        else:
            todo.extend(facts.data(node))
    return found


def _spine(facts: Analysis, end: Node) -> tuple[set[Node], dict[Node, list[Node]]]:
    """The stream's own nodes back from ``end``; and for each of its additions the summands that are no skip."""
    spine: set[Node] = set()
    entries: dict[Node, list[Node]] = {}
    todo = [end]
    while todo:
        node = todo.pop()
        if node in spine:
            continue
        spine.add(node)
        todo.extend(facts.carries[node])
        if op(node) in ops.ADDS:
            entries[node] = [x for a in operands(node) if a not in facts.carries for x in _summands(facts, a)]
    return spine, entries


def _tables(facts: Analysis, spine: set[Node], path: set[Node]) -> list[Node]:
    """Lookups on the way to the stream, and learned rows that are added to it without a lookup."""
    both = spine | path
    tables = [n for n in both if op(n) in ops.LOOKUPS]
    added = (a for n in both if op(n) in ops.ADDS and n in facts.varies for a in operands(n) if a in facts.weight)
    tables += [a for a in added if len(shape(a)) > 1 and shape(a)[-2] > 1]
    return sorted(set(tables), key=facts.order.__getitem__)


def _summands(facts: Analysis, node: Node) -> list[Node]:
    """A sub-layer output that is itself a sum (parallel attention and MLP, routed and shared experts), taken apart."""
    if node not in facts.varies:
        return []
    inner = node
    while op(inner) in ops.VIEWS and not _narrows(inner):
        inner = operands(inner)[0]
    if op(inner) in ops.ADDS and len(facts.data(inner)) > 1:
        return [leaf for a in operands(inner) for leaf in _summands(facts, a)]
    return [node]


def _term(facts: Analysis, node: Node, spine: set[Node], beyond: frozenset[Node]) -> Term | None:
    interior = facts.behind([node], stop=spine | beyond)
    reads = {a for n in interior for a in operands(n) if a in spine}
    if not reads:
        return None  # it reads nothing of the stream: part of the embedding, not a sub-layer
    crosses = any(a in beyond for n in interior for a in operands(n))
    projections = _projections(facts, node, set())
    path: set[Node] = set()
    for inner in sorted(interior, key=facts.order.__getitem__):
        if inner in projections or any(a in path for a in operands(inner)):
            path.add(inner)
    latest = max(reads, key=facts.order.__getitem__)
    return Term(node, tuple(projections.items()), frozenset(path), frozenset(interior), latest, crosses)


def _projections(facts: Analysis, node: Node, seen: set[Node]) -> dict[Node, str]:
    """Nearest matmuls with a parameter, walking back from ``node`` through linear ops; ``{}`` if any way is blocked."""
    seen.add(node)
    name = op(node)
    arguments = facts.data(node)
    if name in ops.MATMULS:
        names = [facts.weight[a] for a in operands(node) if a in facts.weight and len(shape(a)) > 1]
        return {node: names[0]} if names and len(arguments) == 1 else {}
    if name in ops.ADDS and any(a in facts.weight for a in operands(node)) and len(arguments) == 1:
        found = _projections(facts, arguments[0], seen)  # a bias of its own: cut behind it
        return {node: next(iter(found.values()))} if len(found) == 1 else found
    if node in facts.norm_at:
        through = [[facts.norm_at[node].input]]
    elif name in ops.JOINS:
        through = [arguments]
    elif name in ops.LINEAR_FIRST or name == "masked_fill":
        through = [arguments[:1]]
    elif name in ops.PRODUCTS:
        # Either factor's zero silences the product: prefer the one as wide as the stream, then the later argument.
        sides = arguments if name == "mul" else arguments[:1]
        through = [[a] for a in sorted(sides, key=lambda a: (-last(a), -facts.order[a]))]
    else:
        return {}
    for choice in through:
        parts = [_projections(facts, argument, seen) for argument in choice if argument not in seen]
        if parts and all(parts):
            return {matmul: parameter for part in parts for matmul, parameter in part.items()}
    return {}


def _start(facts: Analysis, spine: set[Node], additions: set[Node], end: Node) -> Node:
    """The first point of the stream: what the earliest sub-layer's output is added to."""
    first = min(additions, key=facts.order.__getitem__, default=None)
    return end if first is None else max(facts.carries[first], key=facts.order.__getitem__)


# --- the proof ---------------------------------------------------------------------------------------------------


def _prove(facts: Analysis, output: Node, spine: set[Node], start: Node, terms: list[Term]) -> list[str]:
    """Both sides of the proof; the reasons why it fails, naming parameters."""
    names = sorted(set(facts.trace.parameters.values()))
    bit = {name: 1 << i for i, name in enumerate(names)}
    for i, lookup in enumerate(n for n in facts.nodes if op(n) in ops.LOOKUPS):
        bit[lookup.name] = 1 << (len(names) + i)  # a tied head must not stand in for the lookup itself

    def spelled(mask: int) -> list[str]:
        return [name for name in names if mask & bit[name]]

    leaks = [
        f"{n.name}: no projection found for this part of the sum, which holds {_sample(facts, t)}"
        for t in terms
        for n in [t.node]
        if not t.projections
    ]
    cut = {matmul for term in terms for matmul, _ in term.projections}
    alive: dict[Node, int | None] = {}  # None: zero; else the parameters it depends on
    for node in facts.nodes:
        alive[node] = None if node in cut else _value(facts, node, alive, bit)

    allowed_nodes = facts.behind([output], stop={t.node for t in terms})
    allowed = sum(
        bit[name] for name in {facts.trace.parameters[n] for n in allowed_nodes if n in facts.trace.parameters}
    )
    offsets = {n for t in terms for node in t.path for n in operands(node) if n in facts.trace.parameters}
    lookups = [n for n in facts.behind([start]) | spine if op(n) in ops.LOOKUPS]
    allowed |= sum(bit[n.name] for n in lookups)
    live = alive[output] or 0
    permitted = allowed | sum({name: bit[name] for name in (facts.trace.parameters[n] for n in offsets)}.values())
    leaks += [
        f"{name}: still reaches the output with all residual projections cut" for name in spelled(live & ~permitted)
    ]
    leaks += [f"{name}: is on the stream but silenced by the cut" for name in spelled(allowed & ~live)]
    if not any(live & bit[n.name] for n in lookups) and not any(n in facts.trace.inputs for n in facts.behind([start])):
        leaks.append("the token embedding does not reach the output with all residual projections cut")
    leaks += [
        f"{parameter}: given back, its sub-layer stays silent (not a residual projection)"
        for term in terms
        for matmul, parameter in term.projections
        if not _given_back(facts, term, matmul, cut, alive, bit) & bit[parameter]
    ]
    return leaks


def _sample(facts: Analysis, term: Term) -> str:
    held = sorted({facts.trace.parameters[n] for n in term.interior if n in facts.trace.parameters})
    return ", ".join(held[:3]) + (" ..." if len(held) > 3 else "")


def _given_back(
    facts: Analysis, term: Term, matmul: Node, cut: set[Node], alive: dict[Node, int | None], bit: Mapping[str, int]
) -> int:
    """Parameters that the term depends on when only ``matmul`` is not cut: local, so the whole proof stays linear."""
    local = ChainMap({}, alive)
    for node in sorted(term.path, key=facts.order.__getitem__):
        local[node] = None if node in cut and node is not matmul else _value(facts, node, local, bit)
    return local[term.node] or 0


def _value(facts: Analysis, node: Node, alive: Mapping[Node, int | None], bit: Mapping[str, int]) -> int | None:
    """Zero (None), or the set of parameters (a bit mask) that the node's value depends on."""
    if node in facts.trace.parameters:
        return bit[facts.trace.parameters[node]]
    name = op(node)
    arguments = operands(node)
    values = [alive[a] for a in arguments]
    union = 0
    for value in values:
        union |= value or 0
    if name in ops.LOOKUPS:
        return union | bit[node.name]
    if name in ops.ZERO_FACTORIES:
        return None
    if not values:
        return 0
    if name in ops.MATMULS or name in ops.CONVOLUTIONS:
        bias, factors = _bias(node, arguments)
        if any(alive[f] is None for f in factors):
            return alive[bias] if bias is not None else None
        return union
    if name in ops.NORMS:
        if alive[arguments[0]] is not None:
            return union
        biased = "layer_norm" in name and len(arguments) > 2
        return alive[arguments[2]] if biased else None
    if name in ops.FUSED_ATTENTION:
        return None if alive[arguments[2]] is None else union
    if name == "mul" and None in values:
        return None
    if name in (ops.JOINS | ops.ADDS):
        data = [a for a in arguments if _floating(a)]
        numbers = [a for a in node.args if isinstance(a, (int, float)) and a != 0] if name in ops.ADDS else []
        return None if not numbers and data and all(alive[a] is None for a in data) else union
    if name in ops.PRODUCTS | ops.LINEAR_FIRST | ops.ZERO_AT_ZERO or (name == "pow" and _positive(node)):
        return None if values[0] is None else union
    return union


def _positive(node: Node) -> bool:
    exponent = node.args[1] if len(node.args) > 1 else 0
    return isinstance(exponent, (int, float)) and exponent > 0


def _bias(node: Node, arguments: list[Node]) -> tuple[Node | None, list[Node]]:
    """(bias, factors) of a matmul or convolution."""
    if op(node) in {"addmm", "baddbmm"}:
        return arguments[0], arguments[1:3]
    if op(node) in ops.CONVOLUTIONS or op(node) == "linear":
        return (arguments[2] if len(arguments) > 2 else None), arguments[:2]
    return None, arguments[:2]
