"""The recipes: names for tuples of transforms. Those of this module, TOML files, and a user's own objects."""

from __future__ import annotations

from pathlib import Path

from spikepatch.errors import Refused, did_you_mean
from spikepatch.plans.plan import Recipe, cut_std
from spikepatch.recipes.files import check_choices, read_recipe
from spikepatch.source.own_object import imported
from spikepatch_transforms.embed_detach import EmbedDetach
from spikepatch_transforms.embed_init import EmbedInit
from spikepatch_transforms.embed_norm import EmbedNorm
from spikepatch_transforms.embed_scale import EmbedScale
from spikepatch_transforms.residual_init import ResidualInit
from spikepatch_transforms.small_init import SmallInit
from spikepatch_transforms.untie import UntieHead

_PAPER = "Takase et al. 2023, arXiv 2312.16903"
_SMALL = "W, E ~ N(0, 2/(5d)); residual projections: std / sqrt(S)"

#: OLMo 2 cuts N(0, 0.02^2) off at three of its stds; this is the std of what is left.
_OLMO2 = 0.02 * cut_std(3.0)

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
            "embed-detach",
            (SmallInit(), ResidualInit(), EmbedDetach()),
            equation=f"{_SMALL}; 0.1 of the embedding's gradient",
            source=f"{_PAPER}, Embed Detach; GLM-130B",
            small_sublayers=True,
            large_shortcut=False,
        ),
        Recipe(
            "vanilla",
            (SmallInit(), ResidualInit()),
            equation=_SMALL,
            source=f"{_PAPER}, the baseline",
            small_sublayers=True,
            large_shortcut=False,
        ),
        Recipe(
            "xavier",
            (SmallInit(base="xavier"), ResidualInit(base="xavier", scale="none")),
            equation="W, E ~ N(0, 2/(fan_in + fan_out))",
            source=f"{_PAPER}, Xavier; Glorot and Bengio 2010",
            small_sublayers=False,
            large_shortcut=False,
        ),
        Recipe(
            "wang",
            (SmallInit(), ResidualInit(scale="wang")),
            equation="W, E ~ N(0, 2/(5d)); residual projections: std 2 / (N sqrt(d))",
            source="GPT-NeoX and Pythia (Wang and Komatsuzaki 2021)",
            small_sublayers=True,
            large_shortcut=False,
        ),
        Recipe(
            "unit-embed",
            (UntieHead(if_tied=True), SmallInit(token_embedding=False), ResidualInit(), EmbedInit(1.0)),
            equation="W ~ N(0, 2/(5d)), E ~ N(0, 1), untied; residual projections: std / sqrt(S)",
            source=f"{_PAPER}, a footnote; Megatron-LM, BioNeMo",
            small_sublayers=True,
            large_shortcut=True,
            no_decay_embeddings=True,
            advice="Adam's relative step on embeddings is lr, where with scaled-embed it is lr / sqrt(2/(5d))",
        ),
        Recipe(
            "olmo2-init",
            (
                SmallInit(base="normal", std=_OLMO2, cut=3.0),
                ResidualInit(base="normal", std=_OLMO2, cut=3.0, scale="none"),
            ),
            equation="W, E ~ N(0, 0.02^2), cut off at 3 of its stds",
            source="OLMo 2 (2025), arXiv 2501.00656",
            small_sublayers=False,
            large_shortcut=False,
            no_decay_embeddings=True,
            advice="OLMo 2 also normalises branches, queries and keys, and adds a z-loss",
        ),
    )
}
#: Where none is named.
DEFAULT = "scaled-embed"


def find(recipe: str | Recipe, where: str = "recipe") -> Recipe:
    """The recipe that is meant: a built-in one by its name, or the user's own.

    Args:
        recipe: a name; a TOML file (``my.toml``); ``module:NAME`` for a ``Recipe`` in a Python module, which is
            imported, so its code runs; or a ``Recipe`` itself. Modules are looked for where Python imports from, and
            after that in the current directory, so that nothing there hides an installed package.
        where: the name was given, for the error.

    Raises:
        Refused: there is none.
    """
    if isinstance(recipe, Recipe):
        return _own(recipe, "recipe")
    if recipe.endswith(".toml"):
        return _own(read_recipe(Path(recipe)), recipe)
    if ":" in recipe:
        return _own(_imported(recipe), recipe)
    if recipe not in RECIPES:
        raise Refused(
            what=f"there is no recipe {recipe!r}",
            where=where,
            why="the recipes are " + ", ".join(RECIPES),
            remedy=did_you_mean(recipe, RECIPES, "`spikepatch recipes` describes them"),
        )
    return RECIPES[recipe]


def _own(recipe: Recipe, where: str) -> Recipe:
    """A user's recipe, if it makes sense and its name is its own: plans, manifests and cards tell recipes by names."""
    known = RECIPES.get(recipe.name, recipe)
    if not recipe.name.replace("-", "").replace("_", "").replace(".", "").isalnum() or known != recipe:
        raise Refused(
            what=f"{recipe.name!r} cannot be the name of this recipe",
            where=where,
            why="spikepatch has another recipe of this name" if known != recipe else "it is not a plain name",
            remedy="use another name, of letters, digits, - _ and .",
        )
    for transform in recipe.transforms:
        check_choices(transform, where)
    return recipe


def _imported(place: str) -> Recipe:
    found = imported(place, "the recipe")
    if not isinstance(found, Recipe):
        raise Refused(
            what="this is no recipe",
            where=place,
            why=f"it is of type {type(found).__name__}",
            remedy="make it a spikepatch.Recipe(name, transforms)",
        )
    return found
