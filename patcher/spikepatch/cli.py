"""The ``spikepatch`` command: parse, call, print. Everything heavy is imported inside the commands."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from spikepatch import __version__
from spikepatch.errors import SpikepatchError

if TYPE_CHECKING:
    from spikepatch.conversion import Conversion, Progress
    from spikepatch.residual.map import ResidualMap

_SOURCE_HELP = """
    SOURCE is a hub id (gpt2), a local folder (with or without weights), or arch:TYPE, that architecture's default
    config, which needs no download (arch:gpt2).
"""


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Errors that are the user's to mend: one message, exit code 2. Our own: exit code 3."""
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            return super().invoke(ctx)
        except SpikepatchError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            click.echo(traceback.format_exc(), err=True)
            click.echo("error: this is a bug in spikepatch; nothing was written. Please report it.", err=True)
            ctx.exit(3)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="spikepatch")
def main() -> None:
    """Put the stable pre-training initialisation of "Spike No More" into any HuggingFace model or checkpoint.

    Loss spikes are kept away by two conditions: small sub-layers (small initial weights, residual projections scaled
    by 1/sqrt(S)) and a large shortcut (embeddings that enter the residual stream with a std near 1). spikepatch finds
    the residual stream by dataflow, proves that it found all of it, and writes a model that meets both.

    \b
        spikepatch convert arch:gpt2 out/     a fresh, patched GPT-2
        spikepatch inspect gpt2               what its residual stream is made of
        spikepatch recipes                    what can be put into it
    """
    # Before the first import of transformers, which reads them once.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@main.command(help=f"Write a patched copy of SOURCE to OUT.\n{_SOURCE_HELP}")
@click.argument("source")
@click.argument("out", type=click.Path())
@click.option("--recipe", default="scaled-embed", show_default=True, help="What to put in; see `spikepatch recipes`.")
@click.option(
    "--reinit",
    type=click.Choice(["all", "residual", "none"]),
    default="all",
    show_default=True,
    help="Weights to draw afresh: all (a model to pre-train), the residual projections, or none (keep all).",
)
@click.option("--factor", type=float, metavar="C", help="Embedding factor.  [default: sqrt(d), or 1/std if learned]")
@click.option("--positions", is_flag=True, help="Scale learned position embeddings too.")
@click.option("--untie", is_flag=True, help="Give a tied head its own matrix.")
@click.option(
    "--storage",
    type=click.Choice(["auto", "plain", "code"]),
    default="auto",
    show_default=True,
    help="plain: the same architecture (re-initialisation only). code: a subclass written beside the weights.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of every random weight.")
@click.option(
    "--dtype", metavar="DTYPE", help="float32, bfloat16, float16 or float64.  [default: the source's, else float32]"
)
@click.option("--max-shard-size", metavar="SIZE", help="Such as 2GB.  [default: the source's shards, or 5GB]")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Allow the Python code that comes with SOURCE to run.")
@click.option("--overwrite", is_flag=True, help="Replace a folder at OUT, once the new one is complete.")
@click.option("--dry-run", is_flag=True, help="Plan and check everything, print the plan, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, on stdout.")
def convert(source: str, out: str, *, as_json: bool, dry_run: bool, **options: Any) -> None:
    with _progress() as progress:
        from spikepatch.conversion import convert as run

        result = run(source, out, dry_run=dry_run, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
    else:
        _print_conversion(result, dry_run=dry_run)


@main.command(help=f"Show the residual map of SOURCE, and whether it is proven.\n{_SOURCE_HELP}")
@click.argument("source")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Allow the Python code that comes with SOURCE to run.")
@click.option("--json", "as_json", is_flag=True, help="Print the map as one JSON object, and nothing else, on stdout.")
def inspect(source: str, revision: str | None, trust_remote_code: bool, as_json: bool) -> None:
    with _progress() as progress:
        progress("mapping the residual stream", 0, 0)
        from spikepatch.residual.inspect import inspect as run
        from spikepatch.source import build_meta, open_source

        found = open_source(source, revision=revision, trust_remote_code=trust_remote_code, weights=False)
        residual = run(build_meta(found), source=source)
    if as_json:
        click.echo(residual.to_json())
    else:
        _print_map(residual)


@main.command()
def recipes() -> None:
    """List the recipes: equation, the paper's two conditions, source."""
    from rich.console import Console
    from rich.table import Table

    from spikepatch.recipes import DEFAULT, RECIPES

    table = Table("recipe", "equation", "small sub-layers", "large shortcut", "source")
    for recipe in RECIPES.values():
        name = f"{recipe.name} (default)" if recipe.name == DEFAULT else recipe.name
        marks = ["yes" if met else "no" for met in (recipe.small_sublayers, recipe.large_shortcut)]
        table.add_row(name, recipe.equation, *marks, recipe.source)
    console = Console()
    console.print(table)
    console.print(
        "d: width of the residual stream. S: number of sub-layers, counted from the map (2N in a classic decoder)."
    )


def _print_conversion(result: Conversion, *, dry_run: bool) -> None:
    from spikepatch.plans import Fill, NormEmbedding, ScaleEmbedding, Untie

    plan = result.plan
    for note in result.notes:
        click.echo(note)
    click.echo(
        f"{plan.architecture}: d = {plan.width}, S = {len(plan.sublayers)} sub-layers, proven;"
        f" {len(plan.select(Fill))} parameters drawn, {len(plan.skips)} left as they are"
    )
    for edit in plan.edits:
        if isinstance(edit, ScaleEmbedding):
            click.echo(f"  {edit.module}: output * {edit.factor:.6g}" + (" = sqrt(d)" if edit.per_width else ""))
        elif isinstance(edit, NormEmbedding):
            click.echo(f"  {edit.module}: output through a LayerNorm")
        elif isinstance(edit, Untie):
            click.echo(f"  {edit.head}: its own matrix")
    for std in sorted({fill.std for fill in plan.select(Fill)}):
        names = [fill.parameter for fill in plan.select(Fill) if fill.std == std]
        click.echo(f"  std {std:.6g}: {len(names)} parameters, such as {names[-1]}")
    if result.loss_before is not None and result.loss_after is not None:
        click.echo(f"loss on a sample text: {result.loss_before:.3f} before, {result.loss_after:.3f} after")
    size = f"{result.parameters:,} parameters, {result.bytes / 1e9:.2f} GB, {result.dtype}, storage {result.storage}"
    click.echo(f"{'dry run, nothing written: ' if dry_run else f'wrote {result.out}: '}{size}")
    if dry_run:
        for skip in plan.skips:
            click.echo(f"  left: {skip.target} ({skip.reason})")


def _print_map(residual: ResidualMap) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    state = "proven" if residual.proven else "NOT proven"
    console.print(
        f"{residual.architecture} ({residual.model_type}): {residual.placement}, d = {residual.width},"
        f" N = {residual.layers} layers, S = {residual.sublayers} sub-layers, {state}"
    )
    for leak in residual.leaks:
        console.print(f"  leak: {leak}", highlight=False)
    table = Table("part", "name", "detail", title="residual stream")
    for e in residual.embeddings:
        applied = "normed" if e.normed else f"x {e.scale:g}"
        table.add_row("embedding", e.parameter, f"{e.kind}, {applied}")
    for name, kinds, layers, detail in _by_place(residual):
        table.add_row(kinds, name, f"layers {layers}{detail}")
    if residual.head is not None:
        table.add_row("head", residual.head.parameter, "tied" if residual.head.tied else "own matrix")
    console.print(table)


def _by_place(residual: ResidualMap) -> Iterator[tuple[str, str, str, str]]:
    """(name with * for the layer, part, layers, detail) of projections and norms, equal ones of all layers together."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for p in residual.residual_projections:
        detail = f", branch norm {p.branch_norm.rpartition('.')[2]}" if p.branch_norm else ""
        detail += f", x {p.multiplier:g}" if p.multiplier != 1 else ""
        rows.setdefault((_starred(p.parameter), f"residual projection ({p.kind})", detail), []).append(p.layer or 0)
    for n in residual.norms:
        if n.layer is not None:
            key = (_starred(n.module), f"norm ({n.role})", f", {n.kind}, eps {n.eps:g}")
            rows.setdefault(key, []).append(n.layer)
    for (name, part, detail), layers in rows.items():
        yield name, part, f"{min(layers)}-{max(layers)}" if len(layers) > 1 else str(layers[0]), detail
    for n in residual.norms:
        if n.layer is None:
            yield n.module, f"norm ({n.role})", "-", f", {n.kind}, eps {n.eps:g}"


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, plain lines otherwise; on stderr, so that stdout holds the result alone."""
    if not sys.stderr.isatty():
        seen: set[str] = set()

        def line(step: str, done: int, total: int) -> None:
            if step not in seen:
                seen.add(step)
                click.echo(f"{step} ...", err=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def update(step: str, done: int, total: int) -> None:
            bar.update(task, description=step, completed=done, total=total or None)

        yield update
