"""The recipes: names for tuples of transforms. Those of this module, TOML files, and a user's own objects."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import sys
from pathlib import Path

from spikepatch.errors import Refused
from spikepatch.plans import Recipe
from spikepatch_transforms.embed_norm import EmbedNorm
from spikepatch_transforms.embed_scale import EmbedScale
from spikepatch_transforms.residual_init import ResidualInit
from spikepatch_transforms.small_init import SmallInit
from spikepatch_transforms.untie import UntieHead

_PAPER = "Takase et al. 2023, arXiv 2312.16903"
_SMALL = "W, E ~ N(0, 2/(5d)); residual projections: std / sqrt(S)"

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "scaled-embed",
            (SmallInit(), ResidualInit(), EmbedScale()),
            equation=f"{_SMALL}; E(x) * sqrt(d)",
            source=f"{_PAPER}, Scaled Embed",
            small_sublayers=True,
            large_shortcut=True,
        ),
        Recipe(
            "embed-ln",
            (SmallInit(), ResidualInit(), EmbedNorm()),
            equation=f"{_SMALL}; LayerNorm(E(x))",
            source=f"{_PAPER}, Embed LN",
            small_sublayers=True,
            large_shortcut=True,
        ),
        Recipe(
            "vanilla",
            (SmallInit(), ResidualInit()),
            equation=_SMALL,
            source=f"{_PAPER}, the baseline",
            small_sublayers=True,
            large_shortcut=False,
        ),
    )
}
DEFAULT = "scaled-embed"


def find(recipe: str | Recipe) -> Recipe:
    """The recipe that is meant: a built-in one by its name, or the user's own.

    Args:
        recipe: a name; a TOML file (``my.toml``); ``module:NAME`` for a ``Recipe`` in a Python module, which is
            imported, so its code runs, from the current directory if it lies there; or a ``Recipe`` itself.

    Raises:
        Refused: there is none.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe.endswith(".toml"):
        from spikepatch.recipe_files import read_recipe

        return read_recipe(Path(recipe))
    if ":" in recipe:
        return _imported(recipe)
    if recipe not in RECIPES:
        near = difflib.get_close_matches(recipe, RECIPES, n=1)
        raise Refused(
            what=f"there is no recipe {recipe!r}",
            where="--recipe",
            why="the recipes are " + ", ".join(RECIPES),
            remedy=f"did you mean {near[0]}?" if near else "`spikepatch recipes` describes them",
        )
    return RECIPES[recipe]


def _imported(place: str) -> Recipe:
    module, _, name = place.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        raise Refused(
            what="the recipe cannot be imported",
            where=place,
            why=f"{type(error).__name__}: {error}",
            remedy="module:NAME is looked for in the current directory and where Python imports from",
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(found, Recipe):
        raise Refused(
            what="this is no recipe",
            where=place,
            why=f"it is a {type(found).__name__}",
            remedy="make it a spikepatch.Recipe(name, transforms)",
        )
    return found


def with_options(
    recipe: Recipe, *, factor: float | None = None, positions: bool = False, replace: bool = False, untie: bool = False
) -> Recipe:
    """The recipe with a call's options in its transforms.

    Raises:
        Refused: it has no transform that takes an option.
    """
    changes = {"factor": factor, "positions": positions, "replace": replace}
    asked = {name: value for name, value in changes.items() if value}
    transforms = recipe.transforms
    if asked:
        transforms = tuple(dataclasses.replace(t, **asked) if isinstance(t, EmbedScale) else t for t in transforms)  # type: ignore[arg-type]
        if not any(isinstance(transform, EmbedScale) for transform in transforms):
            raise Refused(
                what="--factor, --positions and --replace are for recipes that scale the embedding",
                where=recipe.name,
                why="it does not multiply an embedding",
                remedy="leave them out, or use --recipe scaled-embed",
            )
    if untie and not any(isinstance(transform, UntieHead) for transform in transforms):
        transforms = (UntieHead(), *transforms)
    return dataclasses.replace(recipe, transforms=transforms)
