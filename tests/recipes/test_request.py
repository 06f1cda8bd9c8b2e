"""What is asked: read once, and the same for every command that takes a recipe. ``test_plan.py`` has the refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikepatch.cli import main
from spikepatch.errors import Refused
from spikepatch.recipes.built_in import RECIPES
from spikepatch.recipes.request import Options, parse_request, parse_requests, scales
from spikepatch_transforms.embed_scale import EmbedScale
from spikepatch_transforms.untie import UntieHead


def test_options_go_into_the_transforms() -> None:
    asked = parse_request("scaled-embed", reinit="none", seed=3, factor=2.0, positions=True, untie=True)
    (scale,) = (each for each in asked.recipe.transforms if isinstance(each, EmbedScale))
    assert scale == EmbedScale(2.0, positions=True)
    assert isinstance(asked.recipe.transforms[0], UntieHead)
    assert asked.base == RECIPES["scaled-embed"] == parse_request("scaled-embed", reinit="all").recipe
    assert asked.options == {"factor": 2.0, "positions": True, "untie": True}


def test_a_file_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('name = "own"\n[[transform]]\nkind = "embed_scale"\n')
    asked = parse_request(str(file), reinit="all", replace=True)
    file.unlink()
    assert asked.recipe.transforms == (EmbedScale(replace=True),)
    assert (asked.given, asked.base.name) == (str(file), "own")


def test_baselines_are_compared_without_options_for_scaling() -> None:
    """With one that scales beside them; alone, the option would be dropped without a word."""
    first, second = parse_requests(["vanilla", "scaled-embed"], reinit="all", replace=True, untie=True)
    assert (first.scaling, second.scaling) == ({}, {"replace": True})
    assert first.untie
    assert second.untie
    assert [first.given, second.given] == ["vanilla", "scaled-embed"]
    with pytest.raises(Refused, match="for recipes that scale the embedding"):
        parse_requests(["vanilla", "embed-ln"], reinit="all", replace=True)
    assert [name for name, recipe in RECIPES.items() if scales(recipe)] == ["scaled-embed"]
    assert parse_requests([], reinit="all", seed=3, untie=False) == ()
    with pytest.raises(Refused, match="--replace, --part without a recipe"):
        parse_requests([], reinit="all", replace=True, part="language")


def test_what_takes_a_recipe_takes_all_its_options() -> None:
    options = Options.__annotations__.keys()
    for command in ("convert", "check", "train"):
        assert options - {"seed"} <= {parameter.name for parameter in main.commands[command].params}, command
