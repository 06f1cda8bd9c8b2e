"""How large the first attention logits are, in closed form: queries and keys are products of a normed stream.

std(q . k) = std(W_Q) sqrt(in) std(W_K) sqrt(in) sqrt(h) a     h: size of a head, a: the attention's own factor
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.fx import Node

from spikepatch.auditing.fault import Fault
from spikepatch.auditing.groups import Evidence, Group
from spikepatch.residual import ops
from spikepatch.residual.facts import Facts
from spikepatch.residual.multipliers import number_in
from spikepatch.residual.ops import argument, op, operands
from spikepatch.residual.stream import Stream
from spikepatch.residual.weights import matrix_weight

#: A softmax over logits with this std puts nearly all of its weight on one token.
_SATURATED = 3.0


class _Scores(NamedTuple):
    """The product of queries and keys, and the constant that it is multiplied with."""

    query: Node
    key: Node
    factor: float


def attention(evidence: Evidence, stream: Stream) -> Iterator[Fault]:
    """Queries or keys that saturate the softmax at the first step."""
    groups = {name: group for group in evidence.of("matrix") for name in group.names}
    found: dict[tuple[str, ...], tuple[float, float]] = {}
    for scores in _scores(stream.facts):
        query, key = _weight(stream.facts, scores.query), _weight(stream.facts, scores.key)
        if query not in groups or key not in groups or query is None or key is None:
            continue
        sizes = [_size(groups[name]) for name in (query, key)]
        size = math.prod(sizes) * math.sqrt(ops.last(scores.query)) * abs(scores.factor)
        if 0.0 in sizes or size <= _SATURATED:
            continue
        guilty = {query} if math.isclose(abs(scores.factor), 1) or sizes[0] > 1.5 * sizes[1] else {query, key}
        guilty = {key} if sizes[1] > 1.5 * sizes[0] else guilty
        names = tuple(n for name in sorted(guilty) for n in groups[name].names)
        found.setdefault(names, (size, scores.factor))
    yield from _position_biases(evidence, stream.facts)
    for names, (size, factor) in found.items():
        missing = (
            ", and the attention does not divide by sqrt(h): a factor is missing in the queries"
            if math.isclose(abs(factor), 1)
            else ""
        )
        yield Fault(
            "attention",
            "at-risk",
            names,
            f"the std is too large: attention logits begin at {size:.3g}, which saturates the softmax{missing}",
            "logits with a std of about 1 or less",
            f"{size:.3g}",
            "draw queries and keys smaller" + (", the queries by 1/sqrt(h)" if missing else ""),
        )


def _position_biases(evidence: Evidence, facts: Facts) -> Iterator[Fault]:
    """Tables of biases by position, added to the logits, that saturate the softmax alone."""
    for name, factor in _added_tables(facts).items():
        contents = evidence.contents.get(name)
        if contents is not None and contents.std * factor > _SATURATED:
            yield Fault(
                "attention",
                "at-risk",
                (name,),
                f"the position bias of attention logits has a std of {contents.std * factor:.3g}, which saturates the"
                " softmax: what the tokens are does not count",
                "logits with a std of about 1 or less",
                f"{contents.std * factor:.3g}",
                "draw it with a std of 0.02, or 1/sqrt(d) as T5 does, or begin at 0",
            )


def _added_tables(facts: Facts) -> dict[str, float]:
    """Tables whose rows are added to attention logits -> the factor that they get on the way."""
    todo: list[tuple[Any, float]] = []
    for node in facts.nodes:
        if op(node) in ops.FUSED_ATTENTION:
            todo.append((argument(node, "attn_mask"), 1.0))
        elif op(node) in ops.SOFTMAX and _product_behind(facts, node) is not None:
            todo.append((operands(node)[0], 1.0))
    found: dict[str, float] = {}
    seen: set[object] = set()
    while todo:
        node, factor = todo.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if op(node) in ops.LOOKUPS and (name := facts.trace.parameters.get(ops.table_of(node))) is not None:
            found[name] = abs(factor)
        elif op(node) in ops.PRODUCTS and (number := number_in(facts, node)) is not None:
            todo += [(each, factor * number if op(node) == "mul" else factor / number) for each in operands(node)]
        elif op(node) in ops.VIEWS | ops.ADDS | {"masked_fill", "where"}:
            todo += [(each, factor) for each in operands(node)]
    return found


def product_factors(facts: Facts) -> dict[str, float]:
    """Matrices whose product is multiplied by a number at once (unit-scaled weights, NTK) -> that number."""
    found: dict[str, float] = {}
    for node in facts.nodes:
        weight = matrix_weight(facts, node)
        if weight is None:
            continue
        factor, each = 1.0, node
        while len(each.users) == 1 and op(user := next(iter(each.users))) in ops.VIEWS | ops.PRODUCTS:
            number = number_in(facts, user) if op(user) in ops.PRODUCTS else None
            if op(user) in ops.PRODUCTS and (number is None or facts.data(user) != [each]):
                break
            if number is not None:
                factor = factor * number if op(user) == "mul" else factor / number
            each = user
        found[facts.weight[weight]] = max(abs(factor), found.get(facts.weight[weight], 0.0))
    return found


def unscaled_queries(stream: Stream) -> dict[str, int]:
    """Matrices of queries whose attention does not divide by the root of a head's size: that size."""
    facts = stream.facts
    found = [(_weight(facts, s.query), s.query) for s in _scores(facts) if math.isclose(abs(s.factor), 1)]
    return {name: ops.last(query) for name, query in found if name is not None}


def _size(group: Group) -> float:
    """std of the product of a unit input."""
    if group.matrix is None or not group.matrix.reads_stream:
        return 0.0
    return group.std * math.sqrt(group.matrix.fan_in)


def _scores(facts: Facts) -> Iterator[_Scores]:
    for node in facts.nodes:
        if op(node) in ops.FUSED_ATTENTION:
            query, key = operands(node)[:2]
            scale = argument(node, "scale")
            yield _Scores(query, key, float(scale) if isinstance(scale, (int, float)) else ops.last(query) ** -0.5)
        elif op(node) in ops.SOFTMAX and (found := _product_behind(facts, node)) is not None:
            yield found


def _product_behind(facts: Facts, softmax: Node) -> _Scores | None:
    """Past masks, biases by position, and constant factors."""
    todo = [(operands(softmax)[0], 1.0)]
    while todo:
        node, factor = todo.pop()
        data = facts.data(node)
        if op(node) in ops.MATMULS and len(data) == 2:
            return _Scores(data[0], data[1], factor * _own_factors(facts, data))
        number = number_in(facts, node) if op(node) in ops.PRODUCTS else None
        if number is not None and len(data) == 1:
            todo.append((data[0], factor * number if op(node) == "mul" else factor / number))
        elif op(node) in ops.VIEWS | ops.ADDS | {"masked_fill", "where"}:
            todo += [(each, factor) for each in data]
    return None


def _own_factors(facts: Facts, data: list[Node]) -> float:
    """Constants that queries or keys are multiplied with before their product."""
    factor = 1.0
    for first in data:
        node = first
        while len(before := facts.data(node)) == 1 and op(node) in ops.VIEWS | ops.PRODUCTS:
            number = number_in(facts, node) if op(node) in ops.PRODUCTS else None
            if number is not None:
                factor = factor * number if op(node) == "mul" else factor / number
            node = before[0]
    return factor


def _weight(facts: Facts, node: Node) -> str | None:
    """The one matrix that queries or keys are products of; None behind a norm, or where there are several."""
    found: set[str] = set()
    seen: set[Node] = set()
    todo = [node]
    while todo:
        each = todo.pop()
        if each in seen:
            continue
        seen.add(each)
        if each in facts.norm_at or op(each) in ops.LOOKUPS:
            return None
        weight = matrix_weight(facts, each)
        if weight is not None:
            found.add(facts.weight[weight])
        else:
            todo += facts.data(each)
    return found.pop() if len(found) == 1 else None
