"""The residual stream of a traced model, found by dataflow, and the proof that it was found whole.

The stream is a sum. A value *carries* the stream when it is an embedding lookup, or is reached from one through
additions, views, casts, norms and token-independent factors only. Walking back from the output, the first carrying
value is the last point of the stream; expanding it back through its carrying operands gives the *spine*, and every
other operand of a spine addition is a *term*: the output of a sub-layer. From each term a walk back through linear ops
meets the nearest matmuls with a parameter: the residual projections. ``proof.py`` then shows that they are all there.

Where no lookup begins the stream itself (projected embeddings, image patches), products with a weight that come before
any attention are tried as its beginning, in execution order; the proof decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.fx import Node

from spikepatch.residual import ops
from spikepatch.residual.facts import Facts, narrows
from spikepatch.residual.norms import Forms
from spikepatch.residual.ops import behind_views, last, op, operands, shape
from spikepatch.residual.own_size import growth, other_law, product_with_itself
from spikepatch.residual.proof import Term, left_over, prove
from spikepatch.residual.refusals import copies, in_part, no_sum
from spikepatch.residual.trace import Trace
from spikepatch.residual.weights import factors, matrix_weight

#: Possible beginnings that are tried: each takes a proof of the whole graph.
_ROOTS = 24
_ACTIVATED = 4


@dataclass(frozen=True)
class Stream:
    """One analysed stream: ``start`` is its first point (all embeddings summed), ``end`` its last.

    ``additions`` are the nodes of the spine that add a sub-layer's output, ``tables`` those at which tables of rows
    enter: lookups, and learned positions sliced from a parameter; ``later`` are other values that are added and read
    nothing of the stream. ``entrances`` are features of images or sounds, at the node of the spine by which they enter.
    ``divided``: terms, by their node, that are divided by their own size, though by no known norm, and where.
    ``suffix`` lies between ``end`` (exclusive) and the output: the head. ``leaks`` says why the
    map is not proven; empty: proven. ``reaches`` names the parameters that the output still depends on with every
    residual projection cut.
    """

    facts: Facts
    start: Node
    end: Node
    spine: frozenset[Node]
    additions: frozenset[Node]
    terms: tuple[Term, ...]
    tables: tuple[Node, ...]
    later: frozenset[Node]
    entrances: Mapping[Node, tuple[Node, ...]]
    divided: Mapping[Node, Node]
    suffix: frozenset[Node]
    leaks: tuple[str, ...]
    reaches: tuple[str, ...]


def find(trace: Trace, forms: Forms | None = None) -> tuple[Stream, ...] | str:
    """The stream that feeds the output, then those that feed it (an encoder's); or why there is no residual sum.

    Args:
        forms: what is known of parts of the graph from another pass of the model, see ``Facts``.
    """
    facts = Facts(trace, forms)
    main = _locate(facts, trace.output, frozenset())
    if isinstance(main, str):
        return main
    source = _foreign_output(main)
    if source is None:
        return (main,)
    other = _locate(facts, source, frozenset())
    if isinstance(other, str):
        return (main,)
    again = _at(main.facts, trace.output, other.spine | {source})  # sub-layers end where the other stream begins
    return (main if isinstance(again, str) else again, other)


def _locate(facts: Facts, output: Node, beyond: frozenset[Node]) -> Stream | str:
    """The stream that ends before ``output``; where no lookup begins it, a projected embedding or patches may."""
    found = _at(facts, output, beyond)
    if isinstance(found, Stream) and not found.leaks:
        return found
    nearest: Stream | None = None
    for root in _possible_roots(facts, output):
        rooted = _at(facts.rooted(root), output, beyond)
        if not isinstance(rooted, Stream) or root not in rooted.spine:
            continue
        before, beside = facts.behind([root]), {a for n in rooted.spine - {root} for a in operands(n)}
        if any(a in before for o in beside & facts.varies - rooted.spine for a in _summands(facts, o)):
            continue  # it is added to what it was computed from, as a sub-layer's output is
        if not rooted.leaks:
            return rooted
        nearest = nearest or rooted
    return found if isinstance(found, Stream) or nearest is None else nearest


def _at(facts: Facts, output: Node, beyond: frozenset[Node]) -> Stream | str:
    """The stream that ends before ``output``, by the carriers of ``facts``; sub-layers end at ``beyond``."""
    frontier = _first_carriers(facts, output)
    if not frontier:
        return no_sum(facts, output)
    end = max(frontier, key=facts.order.__getitem__)
    spine, entries = _spine(facts, end)
    found = {node: _term(facts, node, spine, beyond) for nodes in entries.values() for node in nodes}
    terms = sorted((t for t in found.values() if t is not None), key=lambda t: facts.order[t.node])
    if not terms:
        return no_sum(facts, output)
    if reason := copies(sorted(spine, key=facts.order.__getitem__)):
        return reason
    additions = {add for add, nodes in entries.items() if any(found[n] for n in nodes)}
    start = max(facts.carries[min(additions, key=facts.order.__getitem__)], key=facts.order.__getitem__)
    suffix = facts.behind([output], stop=spine)
    later = frozenset(node for node, term in found.items() if term is None)
    entrances = _entrances(facts, spine, later)
    features = frozenset(node for nodes in entrances.values() for node in nodes)
    proof = prove(facts, output, spine, start, terms)
    leaks = (*left_over(facts, output, spine, start, terms, beyond | features), *proof.leaks, *in_part(spine))
    divided: dict[Node, Node] = {}
    if not leaks:
        divided, leaks = _own_sizes(facts, terms)
    return Stream(
        facts=facts,
        start=start,
        end=end,
        spine=frozenset(spine),
        additions=frozenset(additions),
        terms=tuple(terms),
        tables=tuple(_tables(facts, spine, facts.behind([start], stop=features))),
        later=later - features,
        entrances=entrances,
        divided=divided,
        suffix=frozenset(suffix),
        leaks=leaks,
        reaches=proof.reaches,
    )


def _own_sizes(facts: Facts, terms: Iterable[Term]) -> tuple[dict[Node, Node], tuple[str, ...]]:
    """Where terms are divided by their own size; and why others do not grow in proportion to their projections."""
    divided: dict[Node, Node] = {}
    leaks: list[str] = []
    for term in terms:
        node = product_with_itself(facts, term)
        grown = growth(facts, term) if node is not None else "in proportion"
        if node is not None and grown == "not at all":
            divided[term.node] = node
        elif node is not None and grown == "otherwise":
            leaks.append(other_law(facts, node, term))
    return divided, tuple(leaks)


def _possible_roots(facts: Facts, output: Node) -> list[Node]:
    """Where a stream without a lookup may begin, in execution order.

    Products with a weight, computed without attention or additions of their own; and behind them sums with a
    convolution over positions, a position embedding that is computed from the tokens' neighbours. Last, what a stem of
    convolutions or layers makes of them by an activation, and vectors that the caller gives.
    """
    roots, activated = [], []
    made_by: dict[Node, frozenset[Node]] = {}  # plain node -> the products that it is computed by
    cone = facts.behind([output])
    for node in facts.nodes:
        if node not in facts.varies or node not in cone:
            continue
        data = facts.data(node)
        if not all(a in made_by for a in data) or op(node) in ops.SOFTMAX | ops.FUSED_ATTENTION:
            continue
        products = frozenset().union(*(made_by[a] for a in data))
        if op(node) in ops.MATMULS | ops.CONVOLUTIONS and len(data) == 1:
            products |= {node}
            roots.append(node)
        elif op(node) in ops.ADDS and len(data) > 1:
            skips = [a for a in data if any(a in facts.behind([b]) for b in data if b is not a)]
            added = products.difference(*(made_by[a] for a in skips)) if skips else frozenset()
            if not all(op(product) in ops.CONVOLUTIONS for product in added):
                continue
            roots += [node] if added else []
        elif len(data) > 1 and op(node) != "cat":
            continue
        elif op(node) in ops.ZERO_AT_ZERO and products:
            activated.append(node)
        made_by[node] = products
    given = [node for node in facts.trace.inputs if node in facts.varies and node in cone]
    return [*roots[:_ROOTS], *activated[:_ACTIVATED], *given]


def _foreign_output(main: Stream) -> Node | None:
    """What sub-layers of ``main`` read beside the stream itself and that is computed from other inputs, if anything."""
    facts = main.facts
    own = (facts.behind([main.start]) | main.spine) & facts.varies
    for node in facts.nodes:
        if node in facts.varies and any(a in own for a in operands(node)):
            own.add(node)
    inside = {n for term in main.terms for n in term.interior}
    foreign = inside & facts.varies & facts.fed - own  # position biases are looked up by constants
    edge = [n for n in foreign if any(user in own for user in n.users)]
    if len(edge) < 2:
        return None
    common = set.intersection(*(facts.behind([n]) for n in edge)) & foreign
    return max(common, key=facts.order.__getitem__, default=None)


def _first_carriers(facts: Facts, output: Node) -> set[Node]:
    """What carries the stream and is nearest behind ``output``, along the data."""
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


def _spine(facts: Facts, end: Node) -> tuple[set[Node], dict[Node, list[Node]]]:
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


def _entrances(facts: Facts, spine: set[Node], later: Iterable[Node]) -> dict[Node, tuple[Node, ...]]:
    """Where features enter the stream among its tokens, or are added to it behind its start."""
    tokens = frozenset[Node]().union(*(facts.inputs[n] for n in spine if op(n) in ops.LOOKUPS and n in facts.inputs))
    found: dict[Node, tuple[Node, ...]] = {}
    for node in sorted(spine, key=facts.order.__getitem__):
        entering = [a for base in facts.carries[node][:1] for a in facts.entering(node, base)]
        if op(node) in ops.PUT_TOGETHER and entering:
            found[node] = tuple(entering)
        added = [a for a in facts.data(node) if a in later and op(node) in ops.ADDS and tokens]
        alien = [a for a in added if not facts.inputs.get(a, tokens) & tokens]
        # What is added as it came in is a shift, whose size is the caller's.
        if features := [a for a in alien if any(n in facts.trace.parameters for n in facts.behind([a]))]:
            found[node] = tuple(features)
    return found


def _tables(facts: Facts, spine: set[Node], path: set[Node]) -> list[Node]:
    """Lookups on the way to the stream, and learned rows that are added to it without a lookup."""
    both = spine | path
    tables = [n for n in both if op(n) in ops.LOOKUPS]
    added = (a for n in both if op(n) in ops.ADDS and n in facts.varies for a in operands(n) if a in facts.weight)
    rows = {name: shape(node) for node, name in facts.trace.parameters.items()}
    tables += [a for a in added if len(rows[facts.weight[a]]) > 1 and rows[facts.weight[a]][-2] > 1]
    return sorted(set(tables), key=facts.order.__getitem__)


def _summands(facts: Facts, node: Node) -> list[Node]:
    """A sub-layer output that is itself a sum (parallel attention and MLP, routed and shared experts), taken apart."""
    if node not in facts.varies:
        return []
    inner = node
    while op(inner) in ops.VIEWS and not narrows(inner):
        inner = operands(inner)[0]
    parts = facts.data(inner)
    own_skip = any(a in facts.behind([b], stop=facts.carries) for a in parts for b in parts if a is not b)
    if op(inner) in ops.ADDS and len(parts) > 1 and not own_skip:
        return [leaf for a in operands(inner) for leaf in _summands(facts, a)]
    return [node]


def _term(facts: Facts, node: Node, spine: set[Node], beyond: frozenset[Node]) -> Term | None:
    interior = facts.behind([node], stop=spine | beyond)
    reads = {a for n in interior for a in operands(n) if a in spine}
    if not reads:
        return None  # it reads nothing of the stream: part of the embedding, not a sub-layer
    crosses = any(a in beyond for n in interior for a in operands(n))
    made_of = projections(facts, node)
    path: set[Node] = set()
    for inner in sorted(interior, key=facts.order.__getitem__):
        if inner in made_of or any(a in path for a in operands(inner)):
            path.add(inner)
    latest = max(reads, key=facts.order.__getitem__)
    return Term(node, tuple(made_of.items()), frozenset(path), frozenset(interior), latest, crosses)


def _joined(facts: Facts, node: Node) -> list[Node]:
    """What sums and joins of sums put together; a loop over many experts makes a long chain of them."""
    parts: dict[Node, None] = {}
    met: set[Node] = set()
    todo = [node]
    while todo:
        for argument in facts.data(todo.pop()):
            biased = any(a in facts.weight for a in operands(argument))
            if op(behind_views(argument)) in ops.ZERO_FACTORIES:  # rows of it, that others are added to
                continue
            if op(argument) not in ops.JOINS or argument in facts.norm_at or biased:
                parts[argument] = None
            elif argument not in met:
                met.add(argument)
                todo.append(argument)
    return list(parts)


#: Of nodes: the matmuls with a parameter whose products they are sums of, as ``projections`` finds them.
Known = dict[Node, dict[Node, str]]


def projections(facts: Facts, node: Node, known: Known | None = None) -> dict[Node, str]:
    """Nearest matmuls with a parameter, walking back from ``node`` through linear ops; ``{}`` if any way is blocked.

    Args:
        known: what has been found for other nodes; added to.
    """
    known = {} if known is None else known
    if node not in known:
        known[node] = _nearest(facts, node, known)
    return known[node]


def _nearest(facts: Facts, node: Node, known: Known) -> dict[Node, str]:
    name = op(node)
    arguments = facts.data(node)
    if facts.product(node):
        weight = matrix_weight(facts, node)
        if weight is not None:
            return {node: facts.weight[weight]} if len(arguments) == 1 else {}
        # Outputs of experts, summed with computed shares, say: either silences the product, and the longer one that it
        # keeps of both lies along the stream.
        kept = shape(node)[-2:]
        if len(arguments) != 2 or len(kept) != 2 or kept[0] == kept[1]:
            return {}
        return projections(facts, factors(node)[0 if kept[0] > kept[1] else 1], known)
    if name in ops.ADDS and any(a in facts.weight for a in operands(node)) and len(arguments) == 1:
        found = projections(facts, arguments[0], known)  # a bias of its own: cut behind it
        return {node: found[matmul]} if len(found) == 1 and (matmul := behind_views(arguments[0])) in found else found
    if node in facts.norm_at:
        through = [[facts.norm_at[node].input]]
    elif name in ops.JOINS:
        through = [_joined(facts, node)]
    elif name in ops.LINEAR_FIRST | ops.CONVOLUTIONS or name == "masked_fill":
        through = [arguments[:1]]
    elif name in ops.PRODUCTS and not ops.squares(node):
        # Either factor's zero silences the product: prefer the one as wide as the stream, then the later argument.
        sides = arguments if name == "mul" else arguments[:1]
        through = [[a] for a in sorted(sides, key=lambda a: (-last(a), -facts.order[a]))]
    else:
        return {}
    for choice in through:
        parts = [projections(facts, argument, known) for argument in choice]
        if parts and all(parts):
            return {matmul: parameter for part in parts for matmul, parameter in part.items()}
    return {}
