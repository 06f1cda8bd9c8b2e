"""``spikepatch audit``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from spikepatch.commands import options
from spikepatch.commands.console import is_quiet, is_verbose, progress
from spikepatch.report.terminal import columns_of

if TYPE_CHECKING:
    from spikepatch.auditing.fault import Audit


@click.command("audit")
@options.sources("audit")
@click.option(
    "--expect",
    metavar="RECIPE",
    shell_complete=options.complete_recipe,
    help="The weights are to be as this recipe draws them; what is not is at-risk.",
)
@options.seed
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "github", "junit"]),
    default="text",
    show_default=True,
    help="github: annotations of a workflow; junit: XML for a CI server.",
)
@options.as_json
@click.option(
    "--fail-on", type=click.Choice(["note", "at-risk", "unstable"]), help="Exit with 1 where a finding is that bad."
)
@options.revision
@options.trust_remote_code
@click.pass_context
def audit_command(
    ctx: click.Context, /, sources: tuple[str, ...], style: str, as_json: bool, fail_on: Any, **settings: Any
) -> None:
    """Name the parameters of each SOURCE that were initialised wrongly.

    Read once, in bounded memory: NaN, zeros, garbage and copies; gains, biases, steps and decays; stds against those of
    other layers, of other matrices, and of the known schemes; depth scaling; the head, positions, ties and buffers.
    Nothing is run: `spikepatch check` does that, and begins with this.

    SOURCE is a hub id (gpt2), a local folder, or arch:TYPE. Without weights its own initialiser is audited. -v prints
    notes in full.

    \b
        spikepatch audit ./my-init
        spikepatch audit ./my-init --expect scaled-embed --fail-on at-risk
        spikepatch audit arch:llama arch:gpt2 --json

    --json prints one object, for several sources a list. With --fail-on the exit code is 1 where any finding is that
    bad, or worse. 2: refused, or bad input. 3: a bug.
    """
    from spikepatch.preflight.audit import audit

    with progress() as told:
        found = [audit(source, progress=told, **settings) for source in sources]
    _print(found, style, as_json)
    if fail_on is not None and any(each.at_least(fail_on) for each in found):
        ctx.exit(1)


def _print(found: list[Audit], style: str, as_json: bool) -> None:
    from spikepatch.auditing.words import github, junit, lines

    if as_json:
        data = [each.to_dict() for each in found]
        click.echo(json.dumps(data if data[1:] else data[0], indent=2, allow_nan=False))
    elif style == "junit":
        click.echo(junit(found))
    elif style == "github":
        for line in github(found):
            click.echo(line)
    elif is_quiet():
        for each in found:
            click.echo(f"{each.source}: {each.worst or 'nothing found'}")
    else:
        width = columns_of(sys.stdout) or 80
        for each in found:
            for line in lines(each, width=width, details=is_verbose()):
                click.echo(line)
