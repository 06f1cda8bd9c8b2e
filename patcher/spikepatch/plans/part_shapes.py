"""What becomes of each part of a model of several modalities: said before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

from spikepatch.plans.plan import PartShape, Reinit
from spikepatch.residual.map import ResidualMap

_DRAWN = {
    "all": "drawn afresh",
    "residual": "kept, but residual projections, which are drawn afresh",
    "none": "kept as they are",
}


def part_shapes(
    residual: ResidualMap,
    shapes: Mapping[str, tuple[int, ...]],
    reinit: Reinit,
    written: Collection[str],
    kept: Collection[str],
) -> Iterator[PartShape]:
    """The language part, the projector and the towers, as far as there are any; nothing for a model of one part.

    Args:
        shapes: of every tensor.
        written: tensors that the recipe writes.
        kept: tensors that are left as they are.
    """
    towers = set(residual.towers)
    projector = {use.parameter for use in residual.uses if use.role == "entrance"} - towers
    if not towers and not projector:
        return
    language = shapes.keys() - towers - projector
    for part, names in (("language", language), ("projector", projector), ("towers", towers)):
        tensors = [name for name in shapes if name in names]
        if not tensors:
            continue
        weights = _DRAWN[reinit]
        if names <= set(kept) or (reinit == "residual" and not names & set(written)):
            weights = _DRAWN["none"]
        elements = sum(math.prod(shapes[name]) for name in tensors)
        yield PartShape(part, len(tensors), elements, tuple(_modules(tensors, shapes)), weights)  # type: ignore[arg-type]


def _modules(tensors: list[str], shapes: Mapping[str, object]) -> Iterator[str]:
    """The outermost modules that hold none but these tensors."""
    others = {path for name in shapes.keys() - set(tensors) for path in _paths(name)}
    found: dict[str, None] = {}
    for name in tensors:
        found[next((path for path in _paths(name) if path not in others), name)] = None
    yield from found


def _paths(name: str) -> Iterator[str]:
    """``a.b.weight``: a, a.b."""
    pieces = name.split(".")
    yield from (".".join(pieces[:i]) for i in range(1, len(pieces)))
