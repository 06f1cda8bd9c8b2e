"""Right maps, made wrong: a projection left out, a weight too many, another weight, the end moved by one addition.

Each must be refused: by the cut, by minimality, or by an addition that is left over.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator

from torch.fx import Node

from spikepatch.residual.facts import Facts
from spikepatch.residual.proof import Term, left_over, prove
from spikepatch.residual.stream import Stream, find
from spikepatch.residual.trace import trace
from spikepatch.residual.weights import matrix_weight
from tests.architectures import tiny_model
from tests.residual.generator import Model, example, truth
from tests.residual.test_generated import draw


def leaks(stream: Stream, terms: list[Term], spine: frozenset[Node] | None = None) -> tuple[str, ...]:
    facts, output = stream.facts, stream.facts.trace.output
    nodes = set(stream.spine) if spine is None else {n for n in stream.spine if n in spine}
    features = frozenset(node for each in stream.entrances.values() for node in each)
    lost = left_over(facts, output, nodes, stream.start, terms, features)
    return (*lost, *prove(facts, output, nodes, stream.start, terms).leaks)


def others(facts: Facts, term: Term) -> list[tuple[Node, str]]:
    """Products inside the sub-layer that are no residual projections."""
    own = {matmul for matmul, _ in term.projections}
    weighted = ((node, matrix_weight(facts, node)) for node in term.interior if facts.product(node) and node not in own)
    return sorted(((node, facts.weight[weight]) for node, weight in weighted if weight is not None), key=str)


def mutations(stream: Stream) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What was done, and the leaks that come of it."""
    terms = list(stream.terms)
    for i, term in enumerate(terms):
        before, behind = terms[:i], terms[i + 1 :]
        left_out = dataclasses.replace(term, projections=term.projections[1:])
        yield "a projection left out", leaks(stream, [*before, left_out, *behind])
        for inner in others(stream.facts, term)[:1]:
            added = dataclasses.replace(term, projections=(*term.projections, inner))
            yield "a weight too many", leaks(stream, [*before, added, *behind])
            another = dataclasses.replace(term, projections=(inner,))
            yield "another weight", leaks(stream, [*before, another, *behind])
    order = stream.facts.order
    last = max(stream.additions, key=order.__getitem__)
    kept = frozenset(node for node in stream.spine if order[node] < order[last])
    short = [term for term in terms if order[term.node] < order[last] and last not in term.node.users]
    if short and len(stream.additions) > 1:
        yield "the end moved by one addition", leaks(stream, short, kept)


def test_every_mutation_of_a_right_map_is_caught() -> None:
    rng, tried = random.Random(0), Counter[str]()
    streams: list[Stream] = []
    while len(streams) < 40:
        spec = draw(rng)
        true = truth(spec)
        if true.is_sum and true.always and not true.spare and not spec.shared:
            found = find(trace(Model(spec), example()))
            assert not isinstance(found, str)
            streams += [stream for stream in found if not stream.leaks]
    for model_type in ("gpt2", "llama", "mixtral", "mamba", "bloom", "falcon"):
        found = find(trace(tiny_model(model_type)))
        assert not isinstance(found, str)
        streams += found
    for stream in streams:
        assert leaks(stream, list(stream.terms)) == ()
        for name, found_leaks in mutations(stream):
            tried[name] += 1
            assert found_leaks, (name, [t.projections for t in stream.terms], spec)
    assert min(tried.values()) > 20, tried
    assert len(tried) == 4
