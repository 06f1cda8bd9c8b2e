"""What a sub-layer computes, and what stands between its projections and the stream: told from the operations alone."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from torch.fx import Node

from spikepatch.residual import ops
from spikepatch.residual.example import TOKENS
from spikepatch.residual.facts import Facts, floating
from spikepatch.residual.map import Between, SublayerKind
from spikepatch.residual.multipliers import number_in
from spikepatch.residual.ops import behind_views, op, operands, shape
from spikepatch.residual.proof import Term
from spikepatch.residual.stream import Stream
from spikepatch.residual.weights import gain

#: They pick an entry by its value, and say which.
_CHOICES = frozenset("topk argmax argmin max min sort argsort multinomial".split())


def kind_of(facts: Facts, term: Term) -> SublayerKind:
    """Attention weighs values by a softmax of products; a MoE picks experts; other products of tokens are a mixer's."""
    inside = [n for n in term.interior if n in facts.varies]
    names = {op(n) for n in inside}
    if names & ops.FUSED_ATTENTION or _attends(facts, inside):
        return "cross-attention" if term.crosses else "attention"
    if any(_chooses(n) for n in inside):
        return "moe"
    before = [n for n in inside if n not in term.path]  # a convolution of the sub-layer's output is no part of it
    mixes = any(_is_product(facts, n) or _moves(n) for n in before) or bool(names & ops.SCANS)
    return "mixer" if mixes or _is_loop(facts, inside) else "mlp"


def _is_loop(facts: Facts, inside: Iterable[Node]) -> bool:
    """A loop over the positions: as many entries are picked as the example has tokens, from an axis of that length."""
    tokens = [x.shape[-1] for x in facts.trace.inputs.values() if x.ndim > 1 and not x.is_floating_point()]
    length = min(tokens, default=TOKENS)
    axes = [shape(operands(n)[0])[n.args[1]] for n in inside if op(n) == "select" and isinstance(n.args[1], int)]
    return 1 < length <= axes.count(length)


def _moves(node: Node) -> bool:
    """A convolution over more than one position."""
    return op(node) in ops.CONVOLUTIONS and any(size > 1 for size in shape(operands(node)[1])[2:])


def _is_product(facts: Facts, node: Node) -> bool:
    """A matrix product of two activations."""
    return op(node) in ops.MATMULS and len(facts.data(node)) > 1


def _attends(facts: Facts, inside: Iterable[Node]) -> bool:
    """Some softmax is of a product of activations, and what it yields is multiplied with another activation."""
    scores: set[Node] = set()
    weights: set[Node] = set()
    for node in sorted(inside, key=facts.order.__getitem__):
        data = facts.data(node)
        if _is_product(facts, node):
            if any(a in weights for a in data):
                return True
            scores.add(node)
        elif _is_softmax(node) and any(a in scores for a in data):
            weights.add(node)
        elif op(node) not in ops.MATMULS:  # a product with a weight is neither
            scores |= {node} if any(a in scores for a in data) else set()
            weights |= {node} if any(a in weights for a in data) else set()
    return False


def _is_softmax(node: Node) -> bool:
    """Fused, or written out as exp(x - logsumexp(x))."""
    shifted = operands(node)[0] if op(node) == "exp" else None
    written_out = shifted is not None and op(shifted) == "sub" and op(operands(shifted)[-1]) == "logsumexp"
    return op(node) in ops.SOFTMAX or written_out


def _chooses(node: Node) -> bool:
    """Integers that say which of several computed values is the largest: a routing, if anything reads them."""
    source = operands(node)[0] if op(node) == "getitem" else node
    return op(source) in _CHOICES and bool(operands(source)) and bool(node.users) and not floating(node)


def steps(facts: Facts, term: Node, matmul: Node) -> list[Node]:
    """Nodes from the projection (exclusive) to the addition's operand ``term``, along the data; a norm is one node."""

    def before(node: Node) -> list[Node]:
        norm = facts.norm_at.get(node)
        return [norm.input] if norm is not None else facts.data(node)

    behind, todo = {matmul}, [matmul]
    while todo:
        node = todo.pop()
        for reader in (*node.users, *facts.normed.get(node, ())):
            if reader not in behind and facts.order[reader] <= facts.order[term] and node in before(reader):
                behind.add(reader)
                todo.append(reader)
    on_way, todo = {term} & behind, [term]
    while todo:
        more = behind.intersection(before(todo.pop())) - on_way
        on_way |= more
        todo.extend(more)
    return sorted(on_way - {matmul}, key=facts.order.__getitem__)


def between(stream: Stream, term: Term, matmul: Node, times: float) -> tuple[Between, ...]:
    """What changes the product of ``matmul`` on its way to the stream, in order; see ``residual.map.Between``.

    ``times``: the ``multiplier`` of all of it.
    """
    facts, divided = stream.facts, stream.divided.get(term.node)
    found = [Between("bias", bias) for bias in _own_bias(facts, matmul)]
    of_norm: set[str | None] = set()  # gain and bias of a norm are part of it
    for node in steps(facts, term.node, matmul):
        name = op(node)
        others = [a for a in operands(node) if a not in facts.varies]
        learned = _learned(facts, others)
        if node in facts.norm_at:
            norm = gain(facts, facts.norm_at[node])
            of_norm = {norm.parameter, norm.bias}
            found.append(Between("norm", norm.parameter))
        elif node is divided:
            found.append(Between("norm", None))
        elif learned in of_norm and learned is not None:
            continue
        elif name in ops.CONVOLUTIONS:
            found.append(Between("convolution", learned))
        elif name in ops.ADDS and learned is not None:
            found.append(Between("bias", learned))
        elif name in ops.PRODUCTS and learned is not None:
            found.append(Between("gain", learned))
        elif name in ops.PRODUCTS and len(facts.data(node)) > 1:
            found.append(Between("gate", None))
        elif name in ops.PRODUCTS and number_in(facts, node) not in {None, 1.0}:
            found.append(Between("multiplier", None))
    if times != 1 and all(step.kind != "multiplier" for step in found):  # on the weight, or by other operations
        found.append(Between("multiplier", None))
    return tuple(found)


def _own_bias(facts: Facts, matmul: Node) -> list[str]:
    """The bias that a fused matmul adds, or that is added right behind it and cut with it."""
    if op(matmul) in ops.ADDS:
        bias: object = next((a for a in operands(matmul) if a not in facts.varies), None)
    else:
        position = 2 if op(matmul) in ops.CONVOLUTIONS else {"linear": 2, "addmm": 0, "baddbmm": 0}.get(op(matmul))
        bias = matmul.args[position] if position is not None and len(matmul.args) > position else None
    name = _learned(facts, [bias] if isinstance(bias, Node) else [])
    return [name] if name is not None else []


def _learned(facts: Facts, nodes: Iterable[Node]) -> str | None:
    """The parameter nearest behind the nodes, which are computed from parameters and constants."""
    todo = list(nodes)
    seen: set[Node] = set()
    while todo:
        node = todo.pop(0)
        if node in facts.weight:
            return facts.weight[node]
        if node not in seen:
            seen.add(node)
            todo.extend(a for a in operands(node) if a not in facts.varies)
    return None


def sublayers_of(stream: Stream) -> tuple[list[SublayerKind], list[int]]:
    """For each term of ``stream``: what its sub-layer computes, and the index of that.

    Feed-forward terms with one input, added before the stream is read again, are one: routed, shared experts.
    """
    order = stream.facts.order
    kinds = [kind_of(stream.facts, term) for term in stream.terms]
    read = sorted(order[term.reads] for term in stream.terms)
    keys = []
    for term, kind in zip(stream.terms, kinds, strict=True):
        name = "feed-forward" if kind in {"mlp", "moe"} else kind
        keys.append((behind_views(term.reads), bisect.bisect_left(read, order[addition(stream, term)]), name))
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    routed = {key for key, kind in zip(keys, kinds, strict=True) if kind == "moe"}
    return ["moe" if key in routed else kind for key, kind in zip(keys, kinds, strict=True)], [number[k] for k in keys]


def addition(stream: Stream, term: Term) -> Node:
    """Where the term joins the stream."""
    seen: set[Node] = set()
    todo = [term.node]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.users if node not in stream.additions else ())
    return min(seen & stream.additions, key=stream.facts.order.__getitem__)
