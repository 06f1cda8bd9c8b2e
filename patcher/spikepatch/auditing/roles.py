"""What a vector or a small tensor is for, by what the graph does with it: nothing is told from names.

step    a bias that reaches a softplus: a state-space model's step is softplus(x + b)
decay   a parameter w of which the graph takes -exp(w): the rate at which a state decays
rate    a matrix whose product reaches the softplus too: what makes steps of the input
bias    it is added to what depends on the tokens
gain    it is multiplied with what depends on the tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from torch.fx import Node

from spikepatch.residual import ops
from spikepatch.residual.facts import Facts
from spikepatch.residual.ops import op, operands

VectorRole = Literal["step", "rate", "decay", "bias", "gain"]

#: Seen through on the way to a softplus.
_ON_THE_WAY = ops.VIEWS | {"clamp", "clamp_min"}
#: Views of all of a value.
_WHOLE = ops.VIEWS - frozenset("split split_with_sizes chunk slice narrow".split())
#: log(1 + exp(x)) is written out in a few models.
_SOFTPLUS = frozenset(("softplus", "logaddexp"))


def roles(facts: Facts) -> Mapping[str, VectorRole]:
    """Name of each parameter whose role is clear -> its role."""
    found: dict[str, VectorRole] = {}
    for node, name in facts.trace.parameters.items():
        uses = set(_uses(facts, node))
        if len(uses) == 1:
            found[name] = uses.pop()
    return found


def _uses(facts: Facts, node: Node) -> Iterator[VectorRole]:
    for user, before in _consumers(node):
        name = op(user)
        if name == "exp":
            if any(op(u) == "neg" for u, _ in _consumers(user)):
                yield "decay"
        elif name == "neg":
            if any(op(u) == "exp" for u, _ in _consumers(user)):
                yield "decay"
        elif (name in ops.ADDS and any(a in facts.varies for a in operands(user))) or _is_bias(user, before):
            yield "step" if _is_step(user) else "bias"
        elif name in ops.MATMULS and _is_rate(user):
            yield "rate"
        elif name in ops.PRODUCTS and any(a in facts.varies for a in operands(user)):
            yield "gain"


def _consumers(node: Node, through: frozenset[str] = ops.VIEWS) -> Iterator[tuple[Node, Node]]:
    """What reads the node, past views: (the reader, the operand that it reads)."""
    todo = [node]
    while todo:
        each = todo.pop()
        for user in each.users:
            if op(user) in through and operands(user)[:1] == [each]:
                todo.append(user)
            else:
                yield user, each


def _is_bias(user: Node, operand: Node) -> bool:
    """The operand is the third argument of a product, or the first of one that adds."""
    position = {"linear": 2, "addmm": 0, "baddbmm": 0}.get(op(user), 2 if op(user) in ops.CONVOLUTIONS else None)
    return position is not None and len(user.args) > position and user.args[position] is operand


def _is_step(added: Node) -> bool:
    return any(op(user) in _SOFTPLUS for user, _ in _consumers(added, frozenset(_ON_THE_WAY)))


def _is_rate(product: Node) -> bool:
    """All of the product, with a bias or without, reaches a softplus."""
    readers = [user for user, _ in _consumers(product, _WHOLE)]
    added = [user for reader in readers if op(reader) in ops.ADDS for user, _ in _consumers(reader, _WHOLE)]
    return any(op(user) in _SOFTPLUS for user in (*readers, *added))
