"""Why a model is refused whose stream is no sum, in its own terms: copies of a stream, mixed states, other products."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch.fx import Node

from spikepatch.residual import ops
from spikepatch.residual.facts import Facts
from spikepatch.residual.ops import last, op, operands, place, shape


def no_sum(facts: Facts, output: Node) -> str:
    """Why the stream is no sum, in the model's own terms."""
    cone = sorted(facts.behind([output]), key=facts.order.__getitem__)
    if reason := copies(n for n in cone if n in facts.carries) or _mixture(facts, cone) or _gated(facts, cone):
        return reason
    if not facts.carries:
        return "nothing in it is an embedding, or a product of its input, that sub-layers add to up to the output"
    ends = [n for n in cone if n in facts.varies and n not in facts.carries and facts.carries.keys() & facts.data(n)]
    others = [n for n in ends if not facts.product(n)]
    of = others if others and not any(facts.product(n) for n in ends[-2:]) else [n for n in ends if facts.product(n)]
    places = ", ".join(dict.fromkeys(place(n) or "the model itself" for n in of[-2:])) or "nothing"
    through = "products with weights" if of is not others else op(others[-1]).replace("_", " ")
    return (
        "no sum of an embedding and sub-layer outputs reaches the output: the input is not a term of it,"
        f" but goes through {through} ({places})"
    )


def _gated(facts: Facts, cone: Iterable[Node]) -> str | None:
    """The reason to refuse a stream that is multiplied by what is computed from it, as in a highway or a GRU."""
    for node in cone:
        if op(node) not in ops.ADDS or len(facts.data(node)) < 2:
            continue
        for factor in facts.data(node):
            gates = facts.data(factor) if op(factor) == "mul" else []
            if len(gates) > 1 and any(a in facts.carries for a in gates):
                made = [n for n in facts.behind(a for a in gates if a not in facts.carries) if facts.product(n)]
                where = place(max(made, key=facts.order.__getitem__)) if made else place(node)
                return f"the stream is multiplied by a gate that {where or 'the model'} computes, so it is not a sum"
    return None


def _mixture(facts: Facts, cone: Iterable[Node]) -> str | None:
    """The reason to refuse states that are stacked along a new axis and then weighted by computed factors."""
    widths = {last(node) for node in facts.carries}
    for node in cone:
        states = facts.data(node)
        if op(node) not in {"stack", "cat"} or len(states) < 2 or len(shape(node)) < 4:
            continue
        if last(node) not in widths or last(node) != last(states[0]):
            continue
        if mixer := _first_mixing(facts, node):
            return (
                f"the stream is a set of states that {place(mixer) or 'the model'} mixes by computed weights, not a sum"
            )
    return None


def _first_mixing(facts: Facts, node: Node) -> Node | None:
    """The first product of ``node``, seen through views, with something else that depends on the input."""
    todo = [node]
    normed = {norm.input: norm.output for norm in facts.norm_at.values()}
    for reader in todo:
        if reader in normed:
            todo.append(normed[reader])
        for user in reader.users:
            if op(user) in ops.PRODUCTS | ops.MATMULS and len(facts.data(user)) > 1 and user not in facts.norm_at:
                return user
            if op(user) in ops.VIEWS | {"cat"} and user not in todo:
                todo.append(user)
    return None


def copies(carriers: Iterable[Node]) -> str | None:
    """The reason to refuse a stream that is kept in several copies, broadcast from the embedding along a new axis."""
    for node in carriers:
        if op(node) not in {"expand", "repeat", "repeat_interleave"}:
            continue
        before, after = shape(operands(node)[0]), shape(node)
        along_width = len(after) > 2 and after[-1] > before[-1]
        new_axis = len(after) > 3 and after[-1] == before[-1] and after[-2] > before[-2] == 1
        new_axis = new_axis and not _repeats_tokens(node)
        beside_texts = len(after) > 3 and after[-2:] == before[-2:] and after[-3] > before[-3] == 1
        if along_width or new_axis or beside_texts:
            count = after[-1] // before[-1] if along_width else after[-2] if new_axis else after[-3]
            return f"hyper-connections: the stream is a set of {count} mixed copies, not a sum"
    return None


def in_part(spine: Collection[Node]) -> Iterator[str]:
    """What adds sub-layers to a part of the stream alone, and puts that back."""
    for node in spine:
        if op(node) in {"slice_scatter", "select_scatter"} and sum(a in spine for a in operands(node)) > 1:
            yield f"the stream goes through a write into a part of it, in {place(node) or 'the model itself'}"


def _repeats_tokens(node: Node) -> bool:
    """The new axis is merged with that of the tokens at once: each token is there several times in a row."""
    *outer, tokens, count, width = shape(node)
    readers = list(node.users)
    while len(readers) == 1 and op(readers[0]) in {"clone", "contiguous"}:
        readers = list(readers[0].users)
    return bool(readers) and all(shape(reader) == (*outer, tokens * count, width) for reader in readers)
