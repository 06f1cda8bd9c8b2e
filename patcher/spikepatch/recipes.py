"""The recipes: a name for a tuple of transforms, with what it satisfies of the paper's two conditions."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from spikepatch.errors import Refused
from spikepatch.plans import Transform


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        name: as given to ``--recipe``.
        equation: what it does to the weights and the embedding, in one line.
        small_sublayers, large_shortcut: whether it satisfies the paper's two conditions.
        source: where it comes from.
        build: options (embedding factor, positions) -> the transforms.
    """

    name: str
    equation: str
    small_sublayers: bool
    large_shortcut: bool
    source: str
    build: Callable[[float | None, bool], tuple[Transform, ...]]


def _scaled(factor: float | None, positions: bool) -> tuple[Transform, ...]:
    from spikepatch_transforms.embed_scale import EmbedScale

    return (*_vanilla(None, False), EmbedScale(factor, positions))


def _normed(factor: float | None, positions: bool) -> tuple[Transform, ...]:
    from spikepatch_transforms.embed_norm import EmbedNorm

    return (*_vanilla(factor, positions), EmbedNorm())


def _vanilla(factor: float | None, positions: bool) -> tuple[Transform, ...]:
    if factor is not None or positions:
        raise Refused(
            what="--factor and --positions are for the recipe scaled-embed",
            where="recipe",
            why="no other recipe multiplies an embedding",
            remedy="leave them out, or use --recipe scaled-embed",
        )
    from spikepatch_transforms.residual_init import ResidualInit
    from spikepatch_transforms.small_init import SmallInit

    return (SmallInit(), ResidualInit())


_SMALL = "W, E ~ N(0, 2/(5d)); residual projections: std / sqrt(S)"
_PAPER = "Takase et al. 2023, arXiv 2312.16903"

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("scaled-embed", f"{_SMALL}; E(x) * sqrt(d)", True, True, f"{_PAPER}, Scaled Embed", _scaled),
        Recipe("embed-ln", f"{_SMALL}; LayerNorm(E(x))", True, True, f"{_PAPER}, Embed LN", _normed),
        Recipe("vanilla", _SMALL, True, False, f"{_PAPER}, the baseline", _vanilla),
    )
}
DEFAULT = "scaled-embed"


def transforms_of(
    name: str, *, factor: float | None = None, positions: bool = False, untie: bool = False
) -> tuple[Transform, ...]:
    """The transforms of a recipe, in the order in which they are planned.

    Raises:
        Refused: no such recipe, or an option that it does not take.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        raise Refused(
            what=f"there is no recipe {name!r}",
            where="--recipe",
            why="the recipes are " + ", ".join(RECIPES),
            remedy=f"did you mean {near[0]}?" if near else "`spikepatch recipes` describes them",
        )
    from spikepatch_transforms.untie import UntieHead

    return (*((UntieHead(),) if untie else ()), *RECIPES[name].build(factor, positions))
