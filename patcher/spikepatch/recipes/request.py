"""What is asked of a model: a recipe with its options, which weights are drawn afresh, and the seed. Parsed once."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypedDict, Unpack

from spikepatch.errors import Refused, did_you_mean
from spikepatch.plans.plan import REINITS, ModelPart, Recipe, Reinit
from spikepatch.recipes.built_in import find
from spikepatch_transforms.embed_scale import EmbedScale
from spikepatch_transforms.untie import UntieHead


class Options(TypedDict, total=False):
    """What goes with a recipe; see ``spikepatch.plan``."""

    seed: int
    factor: float | None
    positions: bool
    replace: bool
    untie: bool
    part: ModelPart | None


@dataclass(frozen=True)
class Request:
    """What ``parse_request`` has found sensible; see ``spikepatch.plan``.

    Attributes:
        given: the recipe as it was named, or the caller's own.
        base: that recipe, without the options.
        reinit, seed, factor, positions, replace, untie, part: as in ``spikepatch.plan``.
    """

    given: str | Recipe
    base: Recipe
    reinit: Reinit
    seed: int = 0
    factor: float | None = None
    positions: bool = False
    replace: bool = False
    untie: bool = False
    part: ModelPart | None = None

    @functools.cached_property
    def recipe(self) -> Recipe:
        """``base``, with the options in its transforms.

        Raises:
            Refused: it has no transform that takes an option, or the option makes no sense.
        """
        transforms = self.base.transforms
        if scaling := self.scaling:
            if not scales(self.base):
                raise Refused(
                    what="--factor, --positions and --replace are for recipes that scale the embedding",
                    where=self.base.name,
                    why="it does not multiply an embedding",
                    remedy="leave them out, or use the recipe scaled-embed",
                )
            transforms = tuple(replace(t, **scaling) if isinstance(t, EmbedScale) else t for t in transforms)
        if self.untie and not any(isinstance(transform, UntieHead) for transform in transforms):
            transforms = (UntieHead(), *transforms)
        return replace(self.base, transforms=transforms)

    @property
    def scaling(self) -> dict[str, Any]:
        """The options given of those that only a recipe takes that scales the embedding."""
        options = {"factor": self.factor, "positions": self.positions, "replace": self.replace}
        return {name: value for name, value in options.items() if value is not None and value is not False}

    @property
    def options(self) -> dict[str, Any]:
        """All that were given, by their names; with their defaults they are left out."""
        return self.scaling | ({"untie": True} if self.untie else {}) | ({"part": self.part} if self.part else {})


def parse_request(recipe: str | Recipe, *, reinit: Reinit, **options: Unpack[Options]) -> Request:
    """The request, once all of it is found to be sensible.

    Args:
        recipe: as ``built_in.find`` takes it.

    Raises:
        Refused: something is not, or there is no such recipe.
    """
    if reinit not in REINITS:
        raise Refused(
            what=f"there is no reinit mode {reinit!r}",
            where="reinit",
            why="the modes are " + ", ".join(REINITS),
            remedy=did_you_mean(
                reinit, REINITS, "all: a fresh model to pre-train; residual or none: learned weights are kept"
            ),
        )
    request = Request(recipe, find(recipe), reinit, **options)
    if request.seed < 0:
        raise Refused(
            what="a negative seed", where=f"seed={request.seed}", why="seeds count from 0", remedy="give 0 or more"
        )
    assert request.recipe  # takes the options, or refuses
    return request


def parse_requests(
    recipes: Sequence[str],
    where: Mapping[str, str] = MappingProxyType({}),
    *,
    reinit: Reinit,
    **options: Unpack[Options],
) -> tuple[Request, ...]:
    """One request for each of several recipes that are compared. Of ``factor``, ``positions`` and ``replace`` those
    that scale no embedding get none, as long as another one of them scales it.

    Args:
        where: recipe -> where it was named, for the error.

    Raises:
        Refused: as ``parse_request``.
    """
    asked = [name for name, value in options.items() if name != "seed" and value is not None and value is not False]
    if asked and not recipes:
        raise Refused(
            what=f"{', '.join(f'--{name}' for name in asked)} without a recipe",
            where="recipe",
            why="it is an option of recipes, and there is none",
            remedy="name a recipe, or leave it out",
        )
    found = [find(recipe, where.get(recipe, "recipe")) for recipe in recipes]
    others: Options = {**options, "factor": None, "positions": False, "replace": False}
    return tuple(
        replace(parse_request(base, reinit=reinit, **given), given=recipe)
        for recipe, base in zip(recipes, found, strict=True)
        for given in [options if scales(base) or not any(map(scales, found)) else others]
    )


def scales(recipe: Recipe) -> bool:
    """It has a transform that multiplies an embedding."""
    return any(isinstance(transform, EmbedScale) for transform in recipe.transforms)
