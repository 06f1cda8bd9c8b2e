"""``spikepatch codemod``."""

from __future__ import annotations

from typing import Any

import click

from spikepatch.commands import options
from spikepatch.commands.console import is_quiet, is_verbose, progress
from spikepatch.commands.nouns import checked
from spikepatch.report.terminal import say


@click.command("codemod")
@click.argument("file", type=options.Place(), callback=checked("codemod"))
@click.option("--factory", required=True, metavar="MODULE:FUNCTION", help="What builds the model; see above.")
@options.recipe
@options.factor
@options.positions
@options.replace
@options.untie
@click.option(
    "--write/--diff",
    default=False,
    help="Replace FILE, or print a unified diff and write nothing.  [default: --diff]",
)
def codemod_command(file: str, factory: str, **options: Any) -> None:
    """Write a recipe into FILE, the source of your own model.

    This runs your code: the module of --factory is imported, from the current folder or FILE's, and the function is
    called without arguments, before and after the edit, in processes of their own. It returns the model (an nn.Module
    whose class FILE defines), or a tuple of the model and its example inputs: ids, or a dict of arguments of forward.
    Without them forward is given ids. A small model on the CPU will do: the edit works for any width and depth.

    The embedding's construction becomes that of a class that is added to FILE, with the recipe's factor, norm or damped
    gradient, and the model's __init__ ends with a call that draws the recipe's weights. Every other byte of FILE stays.
    Other classes of FILE that build the same embedding get its change too, but keep their own initialisation. --untie
    takes out the assignment that ties the head to the embedding.

    \b
        spikepatch codemod model.py --factory build:small_model
        spikepatch codemod model.py --factory build:small_model --write
    """
    with progress() as report:
        report("building the model before and after the edit")
        from spikepatch.apply.own_file.codemod import codemod

        result = codemod(file, factory, **options)
    if not is_quiet():
        for note in result.notes:
            say(note, err=True)
    if is_verbose():
        for skip in result.plan.skips:
            say(f"left alone: {skip.target}: {skip.reason}", err=True)
    if options["write"]:
        say(f"wrote {file}: {result.plan.recipe}, checked by building {result.plan.architecture} from it")
    else:
        click.echo(result.diff, nl=False)
