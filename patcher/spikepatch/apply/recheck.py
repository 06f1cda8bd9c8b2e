"""The edited file checks out: what it builds is compared with the plan, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spikepatch.apply.construction import Built
from spikepatch.apply.inserted import class_name
from spikepatch.plans import Fill, NormEmbedding, Plan, ScaleEmbedding, Untie

#: Standard errors by which a drawn mean or std may miss the plan's: by chance once in 5e8 comparisons.
_ERRORS = 6


def differences(original: Built, edited: Built) -> Iterator[str]:
    """What the edited file builds, against the plan made from the original: one sentence for each difference.

    The state dict, the classes of embeddings, the residual stream, the factor as measured on the graph, and that the
    values of every parameter that the recipe fills are a sample of what it draws.
    """
    plan, residual = original.plan, edited.residual
    assert plan is not None
    assert residual is not None
    shapes = dict(original.shapes)
    for edit in plan.select(NormEmbedding):
        shapes |= {f"{edit.module}.norm.{name}": (plan.width,) for name in ("weight", "bias")}
    for name in sorted(shapes.keys() | edited.shapes.keys()):
        if shapes.get(name) != edited.shapes.get(name):
            yield f"{name} has the shape {edited.shapes.get(name)}, not {shapes.get(name)}"

    wanted = {edit.module: class_name(edit) for edit in plan.edits if isinstance(edit, (ScaleEmbedding, NormEmbedding))}
    for name, kind in edited.embeddings.items():
        if kind != original.embeddings.get(name) and name not in wanted:
            yield f"{name} is a {kind} now"
        if name in wanted and kind.rpartition(".")[2] != wanted[name]:
            yield f"{name} is a {kind}, not a {wanted[name]}"
    if not residual.proven or (residual.width, residual.sublayers) != (plan.width, len(plan.sublayers)):
        yield f"its residual stream is another one, {'proven' if residual.proven else 'not proven'}"
    measured = {embedding.module: embedding for embedding in residual.embeddings}
    for edit in plan.edits:
        if isinstance(edit, (ScaleEmbedding, NormEmbedding)) and edit.module not in measured:
            yield f"{edit.module} does not enter the stream"
        elif isinstance(edit, ScaleEmbedding):
            scale = measured[edit.module].scale
            if not math.isclose(scale, edit.factor, rel_tol=1e-5):  # it is recorded with six digits
                yield f"{edit.module} is multiplied by {scale:g}, not {edit.factor:g}"
        elif isinstance(edit, NormEmbedding) and not measured[edit.module].normed:
            yield f"{edit.module} is not normalised"
        elif isinstance(edit, Untie) and (residual.head is None or residual.head.tied):
            yield f"{edit.head} is still tied"
    yield from _deviations(plan, edited)


def _deviations(plan: Plan, edited: Built) -> Iterator[str]:
    """Parameters whose values are not a sample of what the plan draws."""
    for fill in plan.select(Fill):
        if fill.parameter not in edited.moments:
            yield f"{fill.parameter} is no parameter of its own"
            continue
        count, mean, std = edited.moments[fill.parameter]
        # Standard errors of the mean and of the std of a normal sample.
        near = abs(mean) <= _ERRORS * fill.std / math.sqrt(count)
        if not near or abs(std - fill.std) > _ERRORS * fill.std / math.sqrt(2 * count):
            yield f"{fill.parameter} has mean {mean:.3g} and std {std:.6g}, not 0 and {fill.std:.6g}"
