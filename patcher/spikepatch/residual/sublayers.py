"""Which terms of a stream are one sub-layer, and what it computes."""

from __future__ import annotations

import bisect

from torch.fx import Node

from spikepatch.residual.kinds import kind_of
from spikepatch.residual.map import SublayerKind
from spikepatch.residual.ops import behind_views
from spikepatch.residual.proof import Term
from spikepatch.residual.stream import Stream


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
        keys.append((behind_views(term.reads), bisect.bisect(read, order[addition(stream, term)]), name))
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
