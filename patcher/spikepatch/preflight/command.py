"""The command ``spikepatch check``: parse, call, print."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from spikepatch.errors import BadTarget, Refused

if TYPE_CHECKING:
    from spikepatch.preflight.result import StabilityReport


@click.command("check")
@click.argument("source")
@click.option("--recipe", "recipes", multiple=True, metavar="R", help="Compare with this recipe; may be repeated.")
@click.option(
    "--reinit",
    type=click.Choice(["all", "residual", "none"]),
    default="all",
    show_default=True,
    help="Of the recipes: weights to draw afresh.",
)
@click.option("--factor", type=float, metavar="C", help="Of the recipes: embedding factor.")
@click.option("--positions", is_flag=True, help="Of the recipes: scale learned position embeddings too.")
@click.option("--untie", is_flag=True, help="Of the recipes: give a tied head its own matrix.")
@click.option("--tokens", type=click.IntRange(min=2), default=256, show_default=True, help="Length of a sequence.")
@click.option("--batch", type=click.IntRange(min=1), default=2, show_default=True, help="Number of sequences.")
@click.option("--text", type=click.Path(), metavar="FILE", help="Take the tokens from here.  [default: random tokens]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of tokens and random weights.")
@click.option("--device", default="auto", show_default=True, help="auto: a GPU where there is one.")
@click.option("--deep", is_flag=True, help="Measure every sub-layer's Jacobian too, and the attention bounds.")
@click.option("--steps", type=click.IntRange(min=0), default=0, metavar="N", help="Run N AdamW steps as well.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Learning rate of --steps.")
@click.option("--threshold", "thresholds", multiple=True, metavar="NAME=X", help="Change a threshold of the verdict.")
@click.option("--report", type=click.Path(dir_okay=False), metavar="HTML", help="Write a page with curves here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, on stdout.")
@click.option(
    "--fail-on", type=click.Choice(["at-risk", "unstable"]), help="Exit with 1 where the verdict is that bad, or worse."
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Allow the Python code that comes with SOURCE to run.")
@click.pass_context
def check_command(
    ctx: click.Context,
    /,
    source: str,
    thresholds: tuple[str, ...],
    report: str | None,
    as_json: bool,
    fail_on: Any,
    **options: Any,
) -> None:
    """Measure whether SOURCE is at risk of loss spikes, before it is trained: the size of its residual stream, of its
    gradients through the layers, and the paper's bounds.

    SOURCE is a hub id (gpt2), a local folder (with or without weights), or arch:TYPE (arch:gpt2). Without weights it is
    checked as its own initialiser makes it.

    \b
        spikepatch check arch:gpt2
        spikepatch check gpt2 --recipe scaled-embed --recipe embed-ln --report report.html

    With --fail-on the exit code is 1 where any compared model is that bad; with recipes the source itself does not
    count. 2: refused, or bad input. 3: a bug.
    """
    from spikepatch.preflight.check import check
    from spikepatch.preflight.verdict import Thresholds, at_or_above

    changes = _parse(thresholds)
    found = check(source, thresholds=changes, progress=_say(), **options)
    if report is not None:
        from spikepatch.preflight.present import page
        from spikepatch.report.html import write_page

        try:
            write_page(page(found, Thresholds.changed(changes)), report)
        except OSError as error:
            raise BadTarget(
                "the report cannot be written", where=report, why=str(error), remedy="give another path"
            ) from error
    if as_json:
        click.echo(found.to_json())
    else:
        _print(found)
    judged = found.models or (found,)
    if fail_on is not None and any(at_or_above(model, fail_on) for model in judged):
        ctx.exit(1)


def _print(report: StabilityReport) -> None:
    from rich.console import Console

    from spikepatch.preflight.present import embedding_table, findings, layer_table, summary_table
    from spikepatch.preflight.verdict import PROMISE
    from spikepatch.report.terminal import print_table

    console = Console(highlight=False)
    width = max(console.width, 100) if not console.is_terminal else console.width
    console = Console(highlight=False, width=width)
    click.echo(
        f"{report.architecture}: {report.placement}, width d = {report.width}, S = {report.sublayers} sub-layers;"
        f" {report.batch} x {report.tokens} tokens, float32 on {report.device}"
    )
    print_table(summary_table(report), console)
    for model in report.every:
        print_table(embedding_table(model), console)
        print_table(layer_table(model), console)
    for model in report.every:
        click.echo(f"{model.name}: {model.verdict}")
        for line in findings(model):
            click.echo(f"  {line}")
    click.echo(PROMISE)


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


def _say() -> Any:
    """Each step once, on stderr."""
    seen: set[str] = set()

    def line(step: str, done: int, total: int) -> None:
        if step not in seen:
            seen.add(step)
            click.echo(f"{step} ...", err=True)
        elif sys.stderr.isatty() and total:
            click.echo(f"\r{step} {done + 1}/{total}", err=True, nl=False)

    return line
