"""Whether a plan's numbers have a meaning in the dtype that they are stored and computed in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from spikepatch.errors import Refused
from spikepatch.plans.plan import Constant, Fill, NormEmbedding, Plan, ScaleEmbedding
from spikepatch.source.formats import some

#: No draw of a million million is larger, in units of the std.
_TAIL = 7.5


def check_numbers(plan: Plan, dtypes: Mapping[str, torch.dtype], largest: Callable[[str], float]) -> None:
    """Refuse what would be written as 0 or infinite though it is neither, or makes a stream that overflows.

    A value is lost where its std is less than 8 steps of the dtype's smallest number. An embedding multiplied by c is
    too large where c times an element of it is not finite in the dtype, or its square not in float32, in which norms
    are computed.

    Args:
        dtypes: of each parameter that the plan writes or scales, by its name.
        largest: the largest absolute value of a learned parameter; asked for scaled embeddings that are kept.

    Raises:
        Refused: with all that has no meaning.
    """
    found = [*_values(plan, dtypes), *_scales(plan, dtypes, largest)]
    if found:
        raise Refused(
            what="numbers of the plan have no meaning in the dtype of the weights",
            where=plan.source,
            why=some(dict.fromkeys(found), 5),
            remedy="give another --factor or recipe, or a wider --dtype (in Python, factor= or dtype=)",
        )


def _values(plan: Plan, dtypes: Mapping[str, torch.dtype]) -> Iterator[str]:
    for edit in plan.edits:
        match edit:
            case Fill(parameter=name) if name in dtypes:
                limits = torch.finfo(dtypes[name])
                if edit.std < 8 * limits.smallest_normal * limits.eps:
                    yield f"values of std {edit.std:.3g} are rounded to 0 in {_named(dtypes[name])} ({name})"
                elif _TAIL * edit.std > limits.max:
                    yield f"values of std {edit.std:.3g} are infinite in {_named(dtypes[name])} ({name})"
            case Constant(parameter=name) if name in dtypes:
                if not _keeps(edit.written, dtypes[name]):
                    yield f"{edit.written:.3g} is no number of {_named(dtypes[name])} ({name})"
            case NormEmbedding(module=name, eps=eps):
                if not _keeps(eps, torch.float32) or eps <= 0:
                    yield f"a norm's eps of {eps:.3g} is none in float32 ({name})"


def _scales(plan: Plan, dtypes: Mapping[str, torch.dtype], largest: Callable[[str], float]) -> Iterator[str]:
    stds = {fill.parameter: fill.std for fill in plan.select(Fill)}
    for edit in plan.select(ScaleEmbedding):
        name = f"{edit.module}.weight"
        if name not in dtypes:
            continue
        dtype = dtypes[name]
        if not _keeps(edit.factor, dtype):
            yield f"the factor {edit.factor:.3g} is no number of {_named(dtype)} ({edit.module})"
            continue
        most = _TAIL * stds[name] if name in stds else largest(name)
        bound = min(torch.finfo(dtype).max, math.sqrt(torch.finfo(torch.float32).max))
        if edit.factor * most >= bound:
            yield f"{edit.module} times {edit.factor:.3g} is up to {edit.factor * most:.3g}, which overflows"
        elif most and edit.factor * most < 8 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps:
            yield f"{edit.module} times {edit.factor:.3g} is rounded to 0 in {_named(dtype)}"


def absolute_maximum(pieces: Iterable[torch.Tensor]) -> float:
    """Of all elements, given as ``pieces`` or ``loaded_pieces``; those that are not finite left out."""
    return max((float(piece.abs().nan_to_num(0.0, 0.0, 0.0).max()) for piece in pieces if piece.numel()), default=0.0)


def _keeps(value: float, dtype: torch.dtype) -> bool:
    """It is finite in ``dtype``, and 0 only if it is 0."""
    stored = float(torch.tensor(value, dtype=torch.float64).to(dtype))
    return math.isfinite(stored) and (stored != 0) == (value != 0)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
