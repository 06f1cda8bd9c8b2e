"""All rules, in their order: what is broken before what is odd, and each parameter's first reason only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from spikepatch.auditing.attention import attention, product_factors, unscaled_queries
from spikepatch.auditing.broken import broken, copies
from spikepatch.auditing.contents import Contents
from spikepatch.auditing.depth import best_scheme, depth, scaled_on_purpose
from spikepatch.auditing.expected import expected
from spikepatch.auditing.fault import Audit, Fault, sorted_faults
from spikepatch.auditing.groups import Evidence, evidence
from spikepatch.auditing.laws import Scheme, torch_default
from spikepatch.auditing.outputs import buffers, head, tables, ties
from spikepatch.auditing.roles import roles
from spikepatch.auditing.spread import left_at_default, other_groups, other_layers, sizes, wrong_formulas
from spikepatch.auditing.vectors import vectors
from spikepatch.plans.plan import Plan
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.stream import Stream


def examine(
    contents: Mapping[str, Contents],
    *,
    source: str,
    architecture: str,
    weights: str,
    residual: ResidualMap | None,
    stream: Stream | None,
    vocabulary: int | None = None,
    tied: Mapping[str, str],
    live_buffers: Mapping[str, torch.Tensor],
    built_buffers: Mapping[str, torch.Tensor],
    not_said: Iterable[str] = (),
    planned: tuple[Plan, bool] | None = None,
    logits: Callable[[], float | None] = lambda: None,
) -> Audit:
    """Every rule on one model.

    Args:
        contents: of every float parameter.
        residual, stream: the proven map and the stream that feeds the output; None where there is none.
        vocabulary: number of tokens, where the output holds logits.
        tied: names that are to be one tensor with others, by the config and the class.
        logits: the std of the first ones, from a forward pass.
        planned: what it is to be like, and whether that plan takes out a factor of the model's own.
        live_buffers: the model's; ``built_buffers``: those that its constructor makes.
    """
    known = evidence(
        residual,
        contents,
        roles(stream.facts) if stream is not None else {},
        unscaled_queries(stream) if stream is not None else {},
        product_factors(stream.facts) if stream is not None else {},
    )
    found: list[Fault] = [
        *broken(known),
        *copies(known),
        *ties(known, tied),
        *buffers(live_buffers, built_buffers, learned=known.learned),
    ]
    claimed = {name for f in found if f.name not in {"copies", "copied-blocks", "tie"} for name in f.parameters}
    sound = known.without(claimed)
    found += vectors(sound)
    scheme: Scheme | None = None
    if not known.learned:
        if stream is not None:
            found += head(sound, stream, vocabulary, logits)
            found += attention(sound, stream)
        scheme = best_scheme(sound)
        found += tables(sound, scheme)
        found += _of_stds(sound)
    if planned is not None:
        found += expected(known, planned[0], replaced=planned[1])
    return Audit(
        source=source,
        architecture=architecture,
        weights=weights,
        learned=known.learned,
        scheme=scheme.text if scheme is not None else "",
        findings=sorted_faults(found),
        not_said=tuple(not_said),
    )


def _of_stds(sound: Evidence) -> Iterator[Fault]:
    left = list(left_at_default(sound))
    yield from left
    sound = sound.without({name for f in left for name in f.parameters})
    wrong = list(wrong_formulas(sound, best_scheme(sound)))
    yield from wrong
    sound = sound.without({name for f in wrong if f.name not in {"fused-fan", "uneven"} for name in f.parameters})
    large = list(sizes(sound))
    yield from large
    sound = sound.without({name for f in large for name in f.parameters})
    yield from other_layers(sound)
    scheme = best_scheme(sound)
    if scheme is None:
        by_default = torch_default(sound)
        if by_default is not None:
            yield from depth(sound, by_default)
        return
    yield from depth(sound, scheme)
    yield from other_groups(sound, scheme, scaled_on_purpose(sound, scheme))
