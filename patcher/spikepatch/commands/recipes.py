"""``spikepatch recipes``."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from spikepatch.commands import options
from spikepatch.commands.console import is_quiet, is_verbose
from spikepatch.commands.nouns import checked
from spikepatch.report.terminal import say

if TYPE_CHECKING:
    from spikepatch.plans.plan import Recipe, Transform
    from spikepatch.recipes.megatron import Expressed


@click.command("recipes")
@click.argument("name", required=False, shell_complete=options.complete_recipe, callback=checked("recipes"))
@click.option("--for", "program", type=click.Choice(["megatron"]), help="Print NAME as options of Megatron-LM.")
@click.option("--width", type=click.IntRange(min=1), metavar="D", help="With --for: width of the residual stream.")
@click.option("--layers", type=click.IntRange(min=1), metavar="N", help="With --for: number of layers.")
@click.option("--vocab", type=click.IntRange(min=1), metavar="V", help="With --for: rows of the embedding, as padded.")
@options.factor
@options.positions
@options.untie
@options.as_json
def recipes_command(
    name: str | None,
    program: str | None,
    width: int | None,
    layers: int | None,
    vocab: int | None,
    factor: float | None,
    positions: bool,
    untie: bool,
    as_json: bool,
) -> None:
    """List the recipes, or show one in detail.

    Each with its equation, the paper's two conditions and its source. NAME may be one of your own, as --recipe takes
    it. With --for megatron it is printed as options of Megatron-LM for a classic decoder of that width and depth, with
    what these cannot say of it.

    \b
        spikepatch recipes scaled-embed
        spikepatch recipes scaled-embed --for megatron --width 2048 --layers 24

    A recipe of your own is a TOML file such as this one; without NAME, the list ends with all that it may hold:

    \b
        name = "mine"
        no_decay_embeddings = true

    \b
        [[transform]]
        kind = "small_init"
        base = "normal"
        std = 0.02

    \b
        [[transform]]
        kind = "embed_scale"
    """
    from spikepatch.recipes.built_in import RECIPES, find

    if program is not None:
        if name is None or width is None or layers is None:
            needed = {"NAME": name, "--width": width, "--layers": layers}
            missing = [option for option, given in needed.items() if given is None]
            raise click.UsageError(f"--for needs {', '.join(missing[:-1])}{' and ' * bool(missing[:-1])}{missing[-1]}.")
        from spikepatch.recipes.megatron import express
        from spikepatch.recipes.request import parse_request

        request = parse_request(name, reinit="all", factor=factor, positions=positions, untie=untie)
        expressed = express(request.recipe, width=width, layers=layers, vocab=vocab)
        data: Any = expressed.to_dict()
        lines = _options(expressed)
    elif width or layers or vocab or factor is not None or positions or untie:
        raise click.UsageError("--width, --layers, --vocab, --factor, --positions and --untie go with --for.")
    elif name is not None:
        recipe = find(name)
        data = _plain(recipe)
        lines = _detail(recipe)
    else:
        data = [_plain(recipe) for recipe in RECIPES.values()]
        lines = _list(list(RECIPES.values()))
    if as_json:
        click.echo(json.dumps(data, indent=2))
        return
    for line in lines:
        say(line)


def _list(recipes: list[Recipe]) -> Iterator[str]:
    if is_quiet():
        yield from (recipe.name for recipe in recipes)
        return
    for recipe in recipes:
        yield from _summary(recipe)
        if is_verbose():
            yield from (f"    {_call(transform, every=True)}" for transform in recipe.transforms)
        yield ""
    yield "W: sub-layer matrices. E: embeddings. d: width of the residual stream. N: number of layers."
    yield "S: number of sub-layers, counted from the map (2N in a classic decoder of N layers)."
    yield ""
    yield from _own()


def _own() -> Iterator[str]:
    """What a recipe of one's own may hold."""
    from spikepatch.plans.plan import Recipe
    from spikepatch.recipes.files import KINDS, options

    texts = [field.name for field in dataclasses.fields(Recipe) if field.name not in {"name", "transforms"}]
    yield "--recipe takes one of your own too: module:NAME in Python, or a TOML file (my.toml) of a name, of tables"
    yield "[[transform]], planned in their order, and of these if you like:"
    yield f"    {', '.join(texts)}"
    yield "Each [[transform]] has a kind, which NAME -v explains for a recipe that has one of it. Options that are left"
    yield "out have the defaults shown:"
    for kind in KINDS:
        yield ""
        yield f'    kind = "{kind}"'
        for option, about in options(kind):
            yield f"        {option:<24}{about}".rstrip()


def _detail(recipe: Recipe) -> Iterator[str]:
    yield from _summary(recipe)
    if is_quiet():
        return
    for transform in recipe.transforms:
        yield ""
        yield _call(transform, every=is_verbose())
        text = inspect.cleandoc(sys.modules[type(transform).__module__].__doc__ or "")
        if not is_verbose():
            text = text.partition("\n\n")[0]
        yield from (f"    {line}".rstrip() for line in text.splitlines())


def _summary(recipe: Recipe) -> Iterator[str]:
    from spikepatch.recipes.built_in import DEFAULT

    yield f"{recipe.name}{' (default)' if recipe.name == DEFAULT else ''}"
    words = {True: "yes", False: "no", None: "not known"}
    conditions = {"small sub-layers": recipe.small_sublayers, "large shortcut": recipe.large_shortcut}
    advice = "no weight decay on embeddings" * recipe.no_decay_embeddings
    conditions_met = ", ".join(f"{name}: {words[met]}" for name, met in conditions.items())
    for text in filter(None, (recipe.equation, conditions_met, advice, recipe.advice, recipe.source)):
        yield f"    {text}"


def _call(transform: Transform, *, every: bool = False) -> str:
    """``small_init(base='normal', std=0.02)``: as a TOML file names it, without the fields that have their defaults
    unless ``every`` one is wanted.
    """
    from spikepatch.recipes.files import KINDS

    kinds = {kind: name for name, kind in KINDS.items()}
    name = kinds.get(type(transform), getattr(transform, "__qualname__", type(transform).__qualname__))
    fields: tuple[dataclasses.Field[Any], ...] = ()
    if dataclasses.is_dataclass(transform):
        fields = dataclasses.fields(transform)
    values = {field.name: (getattr(transform, field.name), field.default) for field in fields}
    shown = [f"{field}={value!r}" for field, (value, default) in values.items() if every or value != default]
    return f"{name}({', '.join(shown)})"


def _plain(recipe: Recipe) -> dict[str, Any]:
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return fields | {"transforms": [_call(transform) for transform in recipe.transforms]}


def _options(expressed: Expressed) -> Iterator[str]:
    yield from (name if value is None else f"{name} {value}" for name, value in expressed.options)
    if is_quiet():
        return
    yield ""
    if expressed.missing:
        yield "Not expressed:"
        yield from (f"  {text}" for text in expressed.missing)
    else:
        yield "This is the whole recipe."
    yield from expressed.notes
