"""The arguments and options that several commands share, each said once: one name, one meaning everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem

from spikepatch.commands.nouns import checked
from spikepatch.source.local import in_utf8


class Place(click.Path):
    """A path: ``~`` in it is the home folder, it is not empty, as an unset variable is, and it is text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            self.fail("it is empty, as a variable is that is not set", param, ctx)
        if not in_utf8(value):
            self.fail(f"{value!r} has bytes that are no UTF-8; rename it, or give a link to it", param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


#: Of a command's function.
Decorator = Callable[[Any], Any]

SOURCE_HELP = """
    SOURCE is a hub id (gpt2), a local folder (with or without weights), or arch:TYPE, that architecture's default
    config, which needs no download (arch:gpt2).
"""


def complete_recipe(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of recipes, each with its equation; where none begins so, files."""
    from spikepatch.recipes.built_in import RECIPES

    found = [CompletionItem(r.name, help=r.equation) for r in RECIPES.values() if r.name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def complete_source(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """``arch:TYPE``, once it is begun, and folders."""
    from spikepatch.source.type_names import model_types

    names = [f"arch:{name}" for name in model_types()] if incomplete else []
    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return found if incomplete.startswith("arch:") else [*found, *complete_folder(context, parameter, incomplete)]


def _complete_dtype(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from spikepatch.source.formats import STORED

    return [name for name in STORED if name.startswith(incomplete)]


def source(command: str) -> Decorator:
    """The SOURCE of a command."""
    return click.argument("source", shell_complete=complete_source, callback=checked(command))


def sources(command: str) -> Decorator:
    """One SOURCE or several."""
    return click.argument(
        "sources", metavar="SOURCE...", nargs=-1, required=True, shell_complete=complete_source,
        callback=checked(command),
    )  # fmt: skip


def complete_folder(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="dir")]


out: Decorator = click.argument("out", type=Place())
recipe: Decorator = click.option(
    "--recipe",
    default="scaled-embed",
    show_default=True,
    shell_complete=complete_recipe,
    help="What to put in: a name that `spikepatch recipes` lists, a TOML file, or module:NAME of your own.",
)
reinit: Decorator = click.option(
    "--reinit",
    type=click.Choice(["all", "residual", "none"]),
    default="all",
    show_default=True,
    help="Weights to draw afresh: all (a model to pre-train), the residual projections, or none (keep all).",
)
factor: Decorator = click.option(
    "--factor", type=float, metavar="C", help="Embedding factor.  [default: sqrt(d), or 1/std if learned]"
)
positions: Decorator = click.option("--positions", is_flag=True, help="Scale learned position embeddings too.")
replace: Decorator = click.option(
    "--replace", is_flag=True, help="Divide out a factor that the model applies to its embedding already."
)
untie: Decorator = click.option("--untie", is_flag=True, help="Give a tied head its own matrix.")
part: Decorator = click.option(
    "--part",
    type=click.Choice(["language", "all"]),
    help="Of a model of several modalities: all of it; or all but towers, which compute features of images and sounds."
    "  [default: language where towers have learned weights]",
)


_text_column: Decorator = click.option(
    "--text-column", metavar="NAME", help="Where the documents are.  [default: text, else input_ids, as tokens]"
)
_split: Decorator = click.option("--split", metavar="NAME", help="Of a data set that has several.  [default: train]")
_token_dtype: Decorator = click.option(
    "--token-dtype", type=click.Choice(["uint16", "uint32"]), help="Of files of raw token ids (.bin, .npy)."
)


def reading(command: Any) -> Any:
    """How data are read."""
    for option in (_token_dtype, _split, _text_column):
        command = option(command)
    return command


def of_recipes(command: Any) -> Any:
    """What goes with a recipe."""
    for option in (part, untie, replace, positions, factor):
        command = option(command)
    return command


seed: Decorator = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything that is drawn at random."
)
dtype: Decorator = click.option(
    "--dtype",
    metavar="DTYPE",
    shell_complete=_complete_dtype,
    help="float32, bfloat16, float16 or float64.  [default: the source's, else float32]",
)
revision: Decorator = click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
trust_remote_code: Decorator = click.option(
    "--trust-remote-code", is_flag=True, help="Allow the Python code that comes with the model to run."
)
example_inputs: Decorator = click.option(
    "--example-inputs",
    metavar="MODULE:NAME",
    help="What the model is run on to map it: a dict of tensors, or a function of the model that returns one.",
)
allow_nonfinite: Decorator = click.option(
    "--allow-nonfinite", is_flag=True, help="Weights may be NaN or infinite, which is refused otherwise."
)
overwrite: Decorator = click.option(
    "--overwrite", is_flag=True, help="Replace what is there, once the new one is complete."
)
load_test: Decorator = click.option(
    "--load-test/--no-load-test",
    default=True,
    show_default=True,
    help="Before OUT appears, load it in a fresh process, and compare it with the model that was meant.",
)
as_json: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout.")
