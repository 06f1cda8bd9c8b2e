"""``spikepatch check``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spikepatch.commands import options
from spikepatch.commands.console import is_quiet, is_verbose, progress
from spikepatch.errors import Refused
from spikepatch.source.local import local_path

if TYPE_CHECKING:
    from spikepatch.preflight.judge import Thresholds
    from spikepatch.preflight.result import StabilityReport

#: Endings of what --report writes: a page, or a picture.
_REPORTS = (".html", ".htm", ".svg")

_THRESHOLDS = (
    "Change a limit of the verdict: stream_low, stream_high, excess, ratio_at_risk, ratio_unstable, loss or gaussian."
)


@click.command("check")
@options.sources("check")
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    shell_complete=options.complete_recipe,
    help="Compare with this recipe, as `spikepatch convert` takes it; may be repeated.",
)
@options.reinit
@options.of_recipes
@click.option("--tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Length of a sequence.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Number of sequences.")
@click.option("--text", metavar="DATA", help="Take the tokens from data, as `train` does.  [default: random tokens]")
@options.reading
@options.seed
@click.option("--device", default="auto", show_default=True, help="auto: a GPU where there is one.")
@click.option("--deep", is_flag=True, help="Measure every sub-layer's Jacobian too, and the attention bounds.")
@click.option("--steps", type=click.IntRange(min=0), default=0, metavar="N", help="Run N AdamW steps as well.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Learning rate of --steps.")
@click.option(
    "--layers",
    type=click.IntRange(min=2),
    metavar="L",
    help="Run the first L layers only, at full width, and extrapolate by their growth.  [default: all]",
)
@click.option("--threshold", "thresholds", multiple=True, metavar="NAME=X", help=_THRESHOLDS)
@click.option(
    "--report",
    type=options.Place(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a page with curves here (.html), or the curves that matter most (.svg).",
)
@options.overwrite
@options.as_json
@click.option(
    "--fail-on", type=click.Choice(["at-risk", "unstable"]), help="Exit with 1 where the verdict is that bad, or worse."
)
@options.example_inputs
@options.revision
@options.trust_remote_code
@click.pass_context
def check_command(
    ctx: click.Context,
    /,
    sources: tuple[str, ...],
    thresholds: tuple[str, ...],
    report: Path | None,
    overwrite: bool,
    as_json: bool,
    fail_on: Any,
    **options: Any,
) -> None:
    """Measure whether each SOURCE is at risk, before it is trained.

    First its weights are audited, as by `spikepatch audit`. Then is measured: the size of its residual stream, of its
    gradients through the layers, and the paper's bounds. Weights that have been trained get no verdict by limits that
    hold for fresh ones: the audit, what was measured, and what continued training can do.

    SOURCE is a hub id (gpt2), a local folder (with or without weights), or arch:TYPE (arch:gpt2). Without weights it is
    checked as its own initialiser makes it. --reinit, --factor, --positions, --replace, --untie and --part are of the
    recipes. -v prints every layer, and --report draws them.

    \b
        spikepatch check arch:gpt2
        spikepatch check gpt2 --recipe scaled-embed --recipe embed-ln --report report.html

    --json prints one object, for several sources a list. With --fail-on the exit code is 1 where any compared model is
    that bad; with recipes the source itself does not count, and a recipe that does not apply does. 2: refused, or bad
    input. 3: a bug.
    """
    from spikepatch.preflight.check import check
    from spikepatch.preflight.judge import PROMISE, Thresholds, at_or_above
    from spikepatch.report.terminal import say

    changes = _parse(thresholds)
    limits = Thresholds.changed(changes)
    if report is not None:
        _check_report(report, sources, overwrite)
    with progress() as told:
        found = [check(source, thresholds=changes, progress=told, **options) for source in sources]
    if as_json:
        data = [each.to_dict() for each in found]
        click.echo(json.dumps(data if data[1:] else data[0], indent=2, allow_nan=False))
    for each in () if as_json else found:
        _print(each, limits, named=len(found) > 1)
    if not as_json and not is_quiet():
        say(PROMISE)
    if report is not None:
        _write_report(found[0], report, limits, overwrite)
        if not is_quiet():
            click.echo(f"wrote {report}", err=as_json)
    judged = [model for each in found for model in each.models or (each,)]
    if fail_on is not None and any(at_or_above(model, fail_on) for model in judged):
        ctx.exit(1)


def _check_report(path: Path, sources: tuple[str, ...], overwrite: bool) -> None:
    """Refuse before anything is measured what could not be written after it."""
    from spikepatch.report.html import check_page

    if len(sources) > 1:
        raise Refused(
            what="one report cannot hold several sources",
            where=f"--report {path}",
            why=f"{len(sources)} sources were given",
            remedy="run the command once for each, with a report of its own",
        )
    if path.suffix.lower() not in _REPORTS:
        raise Refused(
            what="the report cannot be of this kind",
            where=f"--report {path}",
            why=f"it is written as {' or '.join(_REPORTS)}, by the end of its name",
            remedy="such as --report report.html",
        )
    check_page(path, overwrite=overwrite, sources=filter(os.path.isdir, map(local_path, sources)))


def _write_report(found: StabilityReport, path: Path, thresholds: Thresholds, overwrite: bool) -> None:
    from spikepatch.preflight.present import figure, page
    from spikepatch.report.html import write_page, write_picture

    if path.suffix.lower() == ".svg":
        write_picture(figure(found), path, overwrite=overwrite)
    else:
        write_page(page(found, thresholds), path, overwrite=overwrite)


def _print(report: StabilityReport, limits: Thresholds, *, named: bool) -> None:
    """``named``: with the source, where there are several."""
    from spikepatch.preflight.present import embedding_table, findings, layer_table, not_covered, summary_table
    from spikepatch.report.terminal import print_table, say

    source = f"{report.source}: " if named else ""
    if is_quiet():
        for model in (report, *report.models):
            click.echo(f"{source}{model.name}: {model.verdict}")
        return
    say(
        f"{source}{report.architecture}: {report.placement}, width d = {report.width}, S = {report.sublayers}"
        f" sub-layers; {report.batch} x {report.tokens} tokens, float32 on {report.device}"
    )
    print_table(summary_table(report, limits, details=is_verbose()))
    for model in report.every if is_verbose() else ():
        for table in (embedding_table(model), layer_table(model)):
            if table.rows:  # a refused recipe has none
                print_table(table)
    for model in report.every:
        click.echo(f"{model.name}: {model.verdict}")
        for line in findings(model):
            say(f"  {line}")
    for line in not_covered(report):
        say(line)


def _parse(thresholds: tuple[str, ...]) -> dict[str, float]:
    changes = {}
    for text in thresholds:
        name, _, value = text.partition("=")
        try:
            changes[name] = float(value)
        except ValueError as error:
            raise Refused(
                what=f"{text!r} sets no threshold",
                where="--threshold",
                why="it is not of the form NAME=NUMBER",
                remedy="such as --threshold ratio_at_risk=10",
            ) from error
    return changes
