"""Recipes by name, from TOML files and from a user's own module; what is refused of them."""

from __future__ import annotations

import dataclasses
import json
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from spikepatch.cli import main
from spikepatch.errors import Refused
from spikepatch.plans.plan import Fill, Recipe, Transform
from spikepatch.recipes import files as recipe_files
from spikepatch.recipes.built_in import RECIPES, find
from spikepatch.recipes.files import KINDS, read_recipe
from spikepatch_transforms.embed_norm import EmbedNorm
from spikepatch_transforms.embed_scale import EmbedScale
from spikepatch_transforms.residual_init import ResidualInit
from spikepatch_transforms.small_init import SmallInit
from tests.residual.maps import plan_of


def write(folder: Path, text: str) -> Path:
    path = folder / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


# Built-in ones.


def test_the_two_conditions() -> None:
    """The paper's table for its five methods; OLMo 2 and NeoX by the same criteria."""
    conditions = {name: (recipe.small_sublayers, recipe.large_shortcut) for name, recipe in RECIPES.items()}
    assert conditions == {
        "scaled-embed": (True, True),
        "embed-ln": (True, True),
        "embed-detach": (True, False),
        "vanilla": (True, False),
        "xavier": (False, False),
        "wang": (True, False),
        "unit-embed": (True, True),
        "olmo2-init": (False, False),
    }
    assert {name for name, recipe in RECIPES.items() if recipe.no_decay_embeddings} == {"unit-embed", "olmo2-init"}


def test_the_command_lists_them_all() -> None:
    result = CliRunner().invoke(main, ["recipes"])
    assert result.exit_code == 0
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert recipe.equation
        assert recipe.source
        for text in (name, recipe.equation, recipe.source, recipe.advice):
            assert text in result.output
    assert result.output.count("no weight decay on embeddings") == 2


def test_a_misspelt_name() -> None:
    with pytest.raises(Refused, match="did you mean scaled-embed"):
        find("scaled_embed")
    with pytest.raises(Refused, match="spikepatch recipes"):
        find("xyzzy")


# TOML files.

TEXT = """
name = "scaled-002"
equation = "W ~ N(0, 0.02^2)"
no_decay_embeddings = true

[[transform]]
kind = "small_init"
base = "normal"
std = 0.02
cut = 3  # a whole number is a number

[[transform]]
kind = "residual_init"
scale = "wang"

[[transform]]
kind = "embed_norm"
norm = "rmsnorm"
affine = false
"""


def test_a_file_is_what_the_objects_are(tmp_path: Path) -> None:
    assert read_recipe(write(tmp_path, TEXT)) == Recipe(
        "scaled-002",
        (SmallInit("normal", 0.02, 3), ResidualInit(scale="wang"), EmbedNorm(norm="rmsnorm", affine=False)),
        equation="W ~ N(0, 0.02^2)",
        no_decay_embeddings=True,
    )


def test_the_example_in_the_docstring(tmp_path: Path) -> None:
    """It is what the help points to."""
    assert recipe_files.__doc__ is not None
    text = "\n".join(line[4:] for line in recipe_files.__doc__.splitlines() if line.startswith("    "))
    assert len(tomllib.loads(text)["transform"]) == 2
    assert len(read_recipe(write(tmp_path, text)).transforms) == 2


def test_every_transform_has_its_kind(tmp_path: Path) -> None:
    """The kinds are the modules, and every field that a config has can be given in a file."""
    folder = Path(sys.modules["spikepatch_transforms.small_init"].__file__ or "").parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "distributions"}
    assert KINDS.keys() == modules
    for kind, config in KINDS.items():
        assert config.__module__ == f"spikepatch_transforms.{kind}"
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        lines = [f"{name} = {json.dumps(value)}" for name, value in defaults.items() if value is not None]
        path = write(tmp_path, "\n".join(['name = "x"', "[[transform]]", f'kind = "{kind}"', *lines]))
        assert read_recipe(path).transforms == (config(),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "cannot be read"),
        ("[[transform]]\nkind = 'small_init'", "has no name"),
        ("name = 'x'\ntransform = 3", "no list of transforms"),
        ("name = 'x'\nequaton = 'y'", r"no field 'equaton'(.|\n)*did you mean equation"),
        (
            "name = 'x'\ntransforms = []",
            r"no field 'transforms'(.|\n)*name, transform, (.|\n)*did you mean transform\?",
        ),
        ("name = 'x'\n[[transforms]]\nkind = 'untie'", r"no field 'transforms'(.|\n)*did you mean transform\?"),
        ("name = 'x'\nsteps = []", r"no field 'steps'(.|\n)*name, transform, "),
        ("name = 'x'", r"no list of transforms(.|\n)*\[\[transform\]\](.|\n)*spikepatch recipes --help"),
        ("name = 'x'\ntransform = []", "no list of transforms"),
        ("name = 3", r"name = 3 does not fit(.|\n)*a text"),
        (
            "name = 'x'\n[[transform]]\nstd = 1.0",
            r"transform 1: the transform has no kind(.|\n)*small_init, residual_init, (.|\n)*add kind = \"small_init\"",
        ),
        ("name = 'x'\n[[transform]]\nkind = 'xyz'", r"no transform 'xyz'(.|\n)*small_init, (.|\n)*recipes --help"),
        ("name = 'x'\n[[transform]]\nkind = 'small-init'", r"no transform 'small-init'(.|\n)*did you mean small_init"),
        ("name = 'x'\n[[transform]]\nkind = 'embed_scale'\nfaktor = 2.0", r"'faktor'(.|\n)*did you mean factor"),
        ("name = 'x'\n[[transform]]\nkind = 'embed_scale'\nfactor = '2'", r"factor = '2' does not fit(.|\n)*a number"),
        ("name = 'x'\n[[transform]]\nkind = 'embed_scale'\nfactor = true", r"factor = True does not fit"),
        ("name = 'x'\n[[transform]]\nkind = 'untie'\nfresh = 1", r"fresh = 1 does not fit(.|\n)*true or false"),
        ("name = 'x'\n[[transform]]\nkind = 'embed_norm'\nnorm = 'ln'", r"'layernorm' or 'rmsnorm'"),
        ("name = 'x'\n[[transform]]\nkind = 'small_init'\nbase = 'normal'", r"no distribution(.|\n)*needs one"),
    ],
)
def test_what_a_file_cannot_say(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=message) as refused:
        read_recipe(write(tmp_path, text))
    assert str(tmp_path / "my.toml") in str(refused.value) or "no distribution" in message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"cannot be read(.|\n)*No such file(.|\n)*spikepatch recipes --help"):
        read_recipe(tmp_path / "missing.toml")


def test_a_recipe_without_transforms() -> None:
    with pytest.raises(Refused, match="the recipe empty changes nothing"):
        plan_of("gpt2", Recipe("empty", ()))


def test_the_command_shows_what_a_file_may_hold(tmp_path: Path) -> None:
    """The file in its help is one; the list ends with every kind and its options, as files of their own."""
    shown = CliRunner().invoke(main, ["recipes", "--help"], terminal_width=100).output
    lines = [line.strip() for line in shown[: shown.index("Options:")].splitlines()]
    help_file = write(tmp_path, "\n".join(lines[lines.index('name = "mine"') :]))
    assert read_recipe(help_file).transforms == (SmallInit(base="normal", std=0.02), EmbedScale())

    blocks = CliRunner().invoke(main, ["recipes"]).output.split("\n\n    kind = ")[1:]
    assert len(blocks) == len(KINDS)
    for block, (kind, config) in zip(blocks, KINDS.items(), strict=True):
        name, *options = (line.split("  ")[0] for line in map(str.strip, block.splitlines()))
        assert name == json.dumps(kind)
        assert [option.partition(" = ")[0] for option in options] == [f.name for f in dataclasses.fields(config)]
        defaults = [option for option in options if " = " in option]
        path = write(tmp_path, "\n".join(['name = "x"', "[[transform]]", f"kind = {name}", *defaults]))
        assert read_recipe(path).transforms == (config(),)


def test_verbose_shows_every_option(tmp_path: Path) -> None:
    short, long = (CliRunner().invoke(main, ["recipes", "vanilla", *more]).output for more in ([], ["-v"]))
    assert "\nsmall_init()\n" in short
    assert "\nsmall_init(base='small', std=None, cut=0.0, uniform=False, token_embedding=True)\n" in long


# A user's own objects.


def test_an_own_transform_from_the_current_directory(own_module: str) -> None:
    path = list(sys.path)
    plan = plan_of("gpt2", f"{own_module}:RECIPE")
    assert sys.path == path
    assert plan.recipe == "ramp"
    assert [fill.std for fill in plan.select(Fill)] == pytest.approx([0.01 * (1 + i) for i in range(6)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_ramp:MISSING", r"cannot be imported(.|\n)*AttributeError(.|\n)*MISSING"),
        ("own_missing:RECIPE", r"cannot be imported(.|\n)*ModuleNotFoundError"),
        ("own_ramp:NUMBER", r"no recipe(.|\n)*of type int"),
        ("own_ramp:TAKEN", r"'vanilla' cannot be the name(.|\n)*another recipe of this name"),
        ("own_ramp:BAD", r"cannot be the name(.|\n)*not a plain name"),
    ],
)
def test_what_is_no_recipe(name: str, message: str, own_module: str) -> None:
    with pytest.raises(Refused, match=message):
        find(name)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (SmallInit("smal"), r"base = 'smal' does not fit(.|\n)*'small' or 'xavier'"),  # type: ignore[arg-type]
        (ResidualInit(scale="1/sqrt(s)"), r"scale = '1/sqrt\(s\)' does not fit(.|\n)*'mitchell'"),  # type: ignore[arg-type]
        (EmbedNorm(norm="ln"), r"norm = 'ln' does not fit(.|\n)*'rmsnorm'"),  # type: ignore[arg-type]
    ],
)
def test_a_choice_that_there_is_not(transform: Transform, message: str) -> None:
    """What a type checker would have said."""
    with pytest.raises(Refused, match=message):
        plan_of("gpt2", Recipe("mine", (transform,)))


def test_an_error_in_the_users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=r"own_broken:X: the recipe cannot be imported(.|\n)*ZeroDivisionError"):
        find("own_broken:X")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"a=" + b"[" * 50_000, "nested too deeply"),
        (b"a=" + b"{x=" * 16_000, "nested too deeply"),
        (b".".join([b"a"] * 40_000) + b"=1", "a key has more than 100 parts"),
        (b" . ".join([b"a"] * 20_000) + b"=1", "a key has more than 100 parts"),
        (b"x={" + b".".join([b"a"] * 40_000) + b"=1}", "a key has more than 100 parts"),
        (b"a=" + b"9" * 90_000, "4300 digits"),
        (b"#" * 100_001, "it has more than 100,000 bytes"),
        (b"name='\xff'", "can't decode byte 0xff"),
    ],
)
def test_a_file_that_would_take_for_ever(text: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(text)
    with pytest.raises(Refused, match=why):
        read_recipe(tmp_path / "x.toml")


def test_a_byte_order_mark(tmp_path: Path) -> None:
    text = "name='x'\n[[transform]]\nkind='small_init'\n"
    (tmp_path / "x.toml").write_text(text, encoding="utf-8-sig")
    assert read_recipe(tmp_path / "x.toml").name == "x"
