"""The two-sided proof that the residual projections of a stream were found, all of them and nothing else.

*Cut*: with every residual projection's output set to zero and zeros propagated by a rule per op, the parameters that
the output still depends on must be exactly those reached without entering a term, and the input must be among what it
depends on. *Minimality*: give any one projection back and its own weight is live again. Both take one pass over the
graph together.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Node

from spikepatch.residual import ops
from spikepatch.residual.facts import Facts, floating
from spikepatch.residual.ops import argument, behind_views, op, operands, place, shape


@dataclass(frozen=True)
class Term:
    """One operand of a residual addition that is no skip, and the weights whose products it is made of."""

    node: Node
    projections: tuple[tuple[Node, str], ...]  # (matmul, or the sum with its bias; parameter)
    path: frozenset[Node]  # nodes between the projections and the addition
    interior: frozenset[Node]  # what computes it, back to the stream
    reads: Node  # the latest point of the stream that it reads
    crosses: bool  # it reads another stream as well


@dataclass(frozen=True)
class Proof:
    """``leaks``: why it fails, naming parameters; empty: proven. ``reaches``: the parameters that the cut leaves."""

    leaks: tuple[str, ...]
    reaches: tuple[str, ...]


def prove(facts: Facts, output: Node, spine: set[Node], start: Node, terms: list[Term]) -> Proof:
    """Both sides of the proof that ``terms`` are all that is added to the stream ``spine`` behind its ``start``."""
    names = sorted(set(facts.trace.parameters.values()))
    bit = {name: 1 << i for i, name in enumerate(names)}
    for i, lookup in enumerate(n for n in facts.nodes if op(n) in ops.LOOKUPS):
        bit[lookup.name] = 1 << (len(names) + i)  # a tied head must not stand in for the lookup itself

    def spelled(mask: int) -> list[str]:
        return [name for name in names if mask & bit[name]]

    leaks = [_without_projection(facts, term) for term in terms if not term.projections]
    cut = {matmul for term in terms for matmul, _ in term.projections}
    alive: dict[Node, int | None] = {}  # None: zero; else the parameters it depends on
    for node in facts.nodes:
        alive[node] = None if node in cut else _value(facts, node, alive, bit)

    allowed_nodes = facts.behind([output], stop={t.node for t in terms})
    allowed = _mask(bit, {facts.trace.parameters[n] for n in allowed_nodes if n in facts.trace.parameters})
    # Biases of norms between a projection and its addition stay, as constants; of what is made in the shape of another
    # value, that value is none.
    path = {node for t in terms for node in t.path} - cut
    constants = {n for node in path for n in operands(node) if n not in facts.varies}
    shaped = (n for n in facts.nodes if op(n) in ops.FACTORIES)
    between = {n for n in facts.behind(constants, stop=shaped) if n in facts.trace.parameters}
    lookups = [n for n in facts.behind([start]) | spine if op(n) in ops.LOOKUPS]
    allowed |= _mask(bit, {n.name for n in lookups})
    live = alive[output] or 0
    permitted = allowed | _mask(bit, {facts.trace.parameters[n] for n in between})
    leaks += [
        f"{name}: still reaches the output with all residual projections cut" for name in spelled(live & ~permitted)
    ]
    if unheard := spelled(allowed & ~live):
        heard = _uncut(facts, output, bit)
        leaks += [
            f"{name}: is on the stream but silenced by the cut"
            if heard & bit[name]
            else f"{name}: never reaches the output, with nothing cut either: the forward pass ignores it here"
            for name in unheard
        ]
    # A tied head keeps the table alive, so the lookups themselves are asked.
    read = [n for n in lookups if n in facts.fed]
    if not any(live & bit[n.name] for n in read) and not any(floating(n) for n in facts.trace.inputs):
        leaks.append("the token embedding does not reach the output with all residual projections cut")
    leaks += [
        f"{parameter}: given back, its sub-layer stays silent (not a residual projection)"
        for term in terms
        for matmul, parameter in term.projections
        if not _given_back(facts, term, matmul, cut, alive, bit) & bit[parameter]
    ]
    return Proof(tuple(leaks), tuple(spelled(live)))


def left_over(
    facts: Facts, output: Node, spine: set[Node], start: Node, terms: list[Term], beyond: frozenset[Node]
) -> tuple[str, ...]:
    """The additions of the graph that are part of no stream and of no sub-layer, as the stream that was lost there.

    Where an operation on the stream is not understood, what comes behind it looks like the head, or what comes before
    it like an embedding. Either then holds additions of what sub-layers, not understood as such, have computed. What a
    sub-layer computes is its own only if the output does not read it past the stream, as a second track of it. What
    only picks rows of a table, as an image's tokenizer does, adds nothing.
    """
    computed = set[Node]().union(*(term.interior for term in terms))
    bypassing = computed & facts.behind([output], stop=spine)
    inside = computed - bypassing | spine | facts.behind(beyond) | beyond
    ends = {term.node for term in terms}
    feeding = facts.behind((a for n in spine for a in operands(n) if a not in spine), stop=spine)
    for node in facts.nodes:  # sums of several sub-layers' outputs, taken apart on the way to the spine
        if node in feeding and any(a in ends for a in operands(node)):
            ends.add(node)
    inside |= ends
    path = facts.behind([start])
    found: dict[str, None] = {}
    for node in sorted(facts.behind([output]) - inside - facts.picking(output), key=facts.order.__getitem__):
        if op(node) in ops.ADDS and _adds_what_was_computed(facts, node, convolved=node in path):
            if node in bypassing:
                found[_second_track(node)] = None
            elif node not in path and facts.behind([node]).isdisjoint(spine):
                found[_another_sum(node)] = None
            else:
                found[_lost(facts, node, spine, inside, path)] = None
    return tuple(found)


def _adds_what_was_computed(facts: Facts, node: Node, *, convolved: bool) -> bool:
    """An operand is computed, through a weight, from what another one is computed from too.

    Args:
        convolved: convolutions along the positions do not count: some positions are embedded by one.
    """
    data = facts.data(node)
    if len(data) < 2 or not set.intersection(*(facts.behind([a]) & facts.varies for a in data)):
        return False
    waiting = set(data)
    while len(waiting) > 1:  # back to the value that all ways to the addition pass
        latest = max(waiting, key=facts.order.__getitem__)
        if facts.product(latest) and not (convolved and op(latest) in ops.CONVOLUTIONS):
            return True
        waiting.remove(latest)
        waiting.update(facts.data(latest))
    return False


def _second_track(node: Node) -> str:
    where = f" in {place(node)}" if place(node) else ""
    return f"the output reads an addition{where} past the stream, as a second track of it, which is not followed"


def _another_sum(node: Node) -> str:
    """Of two towers whose outputs are compared, say: the head of one reads the other."""
    parts = place(node).split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    where = ".".join(parts[: numbers[0]] if numbers else parts) or "the model itself"
    return f"the output also reads a sum beside this stream, in {where}, which reads nothing of it: two models in one"


def _lost(facts: Facts, node: Node, spine: set[Node], inside: set[Node], path: set[Node]) -> str:
    """What stands on the stream where it was lost, before or behind ``node``, and where."""
    if node in path:
        steps = [user for user in node.users if user in path]
        at = min(steps, key=facts.order.__getitem__, default=node)
        before = node
    else:
        reads = {
            n: max(facts.order[a] for a in operands(n) if a in spine)
            for n in facts.behind([node]) - inside
            if n in facts.varies and any(a in spine for a in operands(n))
        }
        at = min(reads, key=lambda n: (-reads[n], facts.order[n]), default=node)  # of the latest point of the stream
        before = facts.nodes[reads[at]] if reads else node
    while op(at) in ops.VIEWS and (users := [u for u in at.users if u in facts.varies]):
        at = users[0]
    computed = op(at) in ops.PRODUCTS and len(facts.data(at)) > 1
    name = "a write into a part of it" if op(at) in ops.PARTLY_WRITTEN else op(at).strip("_").replace("_", " ")
    what = "a matrix" if facts.product(at) else "a product of computed values" if computed else name
    while len(way := facts.carries.get(before, [])) == 1 and len(facts.data(before)) < 2:
        before = way[0]  # through gains and views, back to the addition
    added = [a for a in facts.data(before) if a not in facts.carries]
    last_part = place(added[-1]) if added else ""
    last_part = last_part or "the embedding"
    where = f" in {place(at)}" if place(at) else ""
    return f"the stream goes through {what}{where}, after {last_part}: it is not a sum"


def _uncut(facts: Facts, output: Node, bit: Mapping[str, int]) -> int:
    """The parameters that reach the output of the model as it is."""
    alive: dict[Node, int | None] = {}
    for node in facts.nodes:
        alive[node] = _value(facts, node, alive, bit)
    return alive[output] or 0


def _mask(bit: Mapping[str, int], names: set[str]) -> int:
    return sum(bit[name] for name in names)


def _without_projection(facts: Facts, term: Term) -> str:
    held = sorted({facts.trace.parameters[n] for n in term.interior if n in facts.trace.parameters})
    where = place(term.node) or "the model's own forward"
    if not held:
        return f"{where}: this part of the sum is computed without any weight, so there is no projection to scale"
    sample = ", ".join(held[:3]) + (" ..." if len(held) > 3 else "")
    return f"{where}: no projection found for this part of the sum, which holds {sample}: {_in_the_way(facts, term)}"


def _in_the_way(facts: Facts, term: Term) -> str:
    """What the walk back from a term without projections meets first that is not linear."""
    node = term.node
    while True:
        data = [a for a in facts.data(node) if a in term.interior]
        if facts.product(node):
            if len(data) > 1:
                return f"it ends in a product of computed values, in {place(node) or 'the model itself'}"
            matrix = [a for a in operands(node) if a not in facts.varies and len(shape(a)) > 1]
            made_by = op(behind_views(matrix[0])).strip("_").replace("_", " ") if matrix else ""
            return f"its last matrix is no parameter, but computed{f' by {made_by}' if made_by else ''}"
        if op(node) in ops.PRODUCTS and len(facts.data(node)) > 1:
            what = "ends in a quotient" if op(node) == "div" else "is a gate, a product"
            return f"it {what} of computed values, in {place(node) or 'the model itself'}"
        norm = facts.norm_at.get(node)
        linear = op(node) in ops.LINEAR_FIRST | ops.JOINS | ops.PRODUCTS and not ops.squares(node)
        before = [norm.input] if norm is not None else data
        if not before or (norm is None and not linear):
            what = op(node).strip("_").replace("_", " ") or "an input"
            return f"it ends in {what}, in {place(node) or 'the model itself'}"
        node = max(before, key=facts.order.__getitem__)


def _given_back(
    facts: Facts, term: Term, matmul: Node, cut: set[Node], alive: dict[Node, int | None], bit: Mapping[str, int]
) -> int:
    """Parameters that the term depends on when only ``matmul`` is not cut: local, so the whole proof stays linear."""
    local = ChainMap({}, alive)
    for node in sorted(term.path, key=facts.order.__getitem__):
        local[node] = None if node in cut and node is not matmul else _value(facts, node, local, bit)
    return local[term.node] or 0


def _value(facts: Facts, node: Node, alive: Mapping[Node, int | None], bit: Mapping[str, int]) -> int | None:
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
        constant = argument(node, "bias")
        return alive[constant] if isinstance(constant, Node) else None
    if name in ops.FUSED_ATTENTION:
        return None if alive[arguments[2]] is None else union
    if name == "mul" and None in values:
        return None
    if name in (ops.JOINS | ops.ADDS):
        data = [a for a in arguments if floating(a)]
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
