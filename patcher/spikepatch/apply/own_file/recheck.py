"""The edited file checks out: what it builds is compared with the plan, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spikepatch.apply.own_file.build import Built
from spikepatch.apply.own_file.definitions import class_name
from spikepatch.plans.plan import Constant, EmbeddingEdit, Fill, NormEmbedding, Plan, ScaleEmbedding, Untie

#: Standard errors by which a drawn mean or std may miss the plan's: by chance once in 5e8 comparisons.
_ERRORS = 6
#: eps of bfloat16, the coarsest dtype that models are built in.
_EPS = 2**-7


def differences(plan: Plan, original: Built, edited: Built) -> Iterator[str]:
    """What the edited file builds, against the plan made from the original: one sentence for each difference.

    The tensors, the classes of embeddings, the residual stream, the factor as measured on the graph, and that the
    values of every parameter that the recipe writes are a sample of what it draws.
    """
    shapes = _planned_shapes(plan, original)
    for name in sorted(shapes.keys() | edited.shapes.keys()):
        if shapes.get(name) != edited.shapes.get(name):
            yield f"{name} has the shape {edited.shapes.get(name)}, not {shapes.get(name)}"

    wanted = {edit.module: class_name(edit) for edit in plan.select(EmbeddingEdit)}
    for name, kind in edited.embeddings.items():
        if kind != original.embeddings.get(name) and name not in wanted:
            yield f"{name} is a {kind} now"
        if name in wanted and kind.rpartition(".")[2] != wanted[name]:
            yield f"{name} is a {kind}, not a {wanted[name]}"
    residual = edited.residual
    if not residual.proven or (residual.width, residual.sublayers) != (plan.width, len(plan.sublayers)):
        yield f"its residual stream is another one, {'proven' if residual.proven else 'not proven'}"
    before = {embedding.module: embedding.scale for embedding in original.residual.embeddings}
    measured = {embedding.module: embedding for embedding in residual.embeddings}
    for edit in plan.select(EmbeddingEdit):
        if edit.module not in measured:
            yield f"{edit.module} does not enter the stream"
        elif isinstance(edit, ScaleEmbedding):
            scale, expected = measured[edit.module].scale, before[edit.module] * edit.factor
            if not math.isclose(scale, expected, rel_tol=1e-5):  # they are recorded with six digits
                yield f"{edit.module} is multiplied by {scale:g}, not {expected:g}"
        elif isinstance(edit, NormEmbedding) and not measured[edit.module].normed:
            yield f"{edit.module} is not normalised"
    for untied in plan.select(Untie):
        if residual.head is None or residual.head.tied:
            yield f"{untied.head} is still tied"
    yield from _deviations(plan, edited)


def _planned_shapes(plan: Plan, original: Built) -> dict[str, tuple[int, ...]]:
    shapes = dict(original.shapes)
    for edit in plan.select(NormEmbedding):
        width = original.shapes[f"{edit.module}.weight"][1:]
        learned = ("weight", "bias") if edit.kind == "layernorm" else ("weight",)
        shapes |= {f"{edit.module}.norm.{name}": width for name in learned if edit.affine}
    for untied in plan.select(Untie):
        shape = shapes.get(untied.embedding) or shapes[untied.head]  # of two names of one tensor the first is there
        shapes |= {untied.embedding: shape, untied.head: shape}
    return shapes


def _deviations(plan: Plan, edited: Built) -> Iterator[str]:
    """Parameters whose values are not what the plan writes: a sample of a distribution, or a constant."""
    for edit in plan.edits:
        if not isinstance(edit, (Fill, Constant)):
            continue
        if edit.parameter not in edited.moments:
            yield f"{edit.parameter} is no parameter of its own"
            continue
        count, mean, std = edited.moments[edit.parameter]
        if isinstance(edit, Constant):
            value = edit.written
            near = math.isclose(mean, value, rel_tol=_EPS) and math.isclose(std, abs(value), rel_tol=_EPS)
            wanted = f"all {value:.6g}"
        else:
            # Standard errors of the mean and of the std of a normal sample; the other distributions' are smaller.
            near = abs(mean) <= _ERRORS * edit.std / math.sqrt(count)
            near &= abs(std - edit.std) <= _ERRORS * edit.std / math.sqrt(2 * count)
            wanted = f"mean 0 and std {edit.std:.6g}"
        if not near:
            yield f"{edit.parameter} has mean {mean:.3g} and std {std:.6g}, not {wanted}"
