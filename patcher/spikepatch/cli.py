"""The ``spikepatch`` command: parse, call, print. Everything heavy is imported inside the commands."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from spikepatch import __version__
from spikepatch.architectures import architectures_command
from spikepatch.errors import SpikepatchError
from spikepatch.preflight.command import check_command

if TYPE_CHECKING:
    from spikepatch.conversion import Conversion, Progress
    from spikepatch.plans import Plan
    from spikepatch.residual.map import ResidualMap

_SOURCE_HELP = """
    SOURCE is a hub id (gpt2), a local folder (with or without weights), or arch:TYPE, that architecture's default
    config, which needs no download (arch:gpt2).
"""


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Errors that are the user's to mend: one message, exit code 2. Our own: exit code 3."""
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            return super().invoke(ctx)
        except SpikepatchError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            click.echo(traceback.format_exc(), err=True)
            click.echo(
                "error: this is a bug in spikepatch; nothing was written. Please report it with the lines above.",
                err=True,
            )
            ctx.exit(3)
        finally:
            signal.signal(signal.SIGTERM, before)


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
        spikepatch check gpt2                 whether it is at risk, measured
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
        progress("mapping the residual stream")
        from spikepatch.residual.inspect import inspect as run
        from spikepatch.source import build_meta, open_source

        found = open_source(source, revision=revision, trust_remote_code=trust_remote_code, weights=False)
        residual = run(build_meta(found), source=source)
    if as_json:
        click.echo(residual.to_json())
    else:
        _print_map(residual)


main.add_command(architectures_command)
main.add_command(check_command)


@main.command()
def recipes() -> None:
    """List the recipes: equation, the paper's two conditions, source."""
    from spikepatch.recipes import DEFAULT, RECIPES

    for recipe in RECIPES.values():
        conditions = [
            f"{name}: {'yes' if met else 'no'}"
            for name, met in (("small sub-layers", recipe.small_sublayers), ("large shortcut", recipe.large_shortcut))
        ]
        click.echo(f"{recipe.name}{' (default)' if recipe.name == DEFAULT else ''}")
        click.echo(f"    {recipe.equation}")
        click.echo(f"    {', '.join(conditions)}")
        click.echo(f"    {recipe.source}\n")
    click.echo("W: sub-layer matrices. E: embeddings. d: width of the residual stream.")
    click.echo("S: number of sub-layers, counted from the map (2N in a classic decoder of N layers).")


def _print_conversion(result: Conversion, *, dry_run: bool) -> None:
    plan = result.plan
    for note in result.notes:
        click.echo(note)
    click.echo(f"{plan.architecture}: width d = {plan.width}, S = {len(plan.sublayers)} sub-layers, proven")
    for line in _changes(plan):
        click.echo(f"  {line}")
    if result.loss_before is not None:
        click.echo(
            f"loss on a sample text: {result.loss_before:.3f} before, {result.loss_after:.3f} after;"
            f" log V = {result.log_vocab:.1f}, KL divergence {result.kl:.3f}"
        )
    size = f"{result.parameters:,} parameters, {result.bytes / 1e9:.2f} GB, {result.dtype}, storage {result.storage}"
    if dry_run:
        click.echo(f"dry run, nothing written: {size}")
        _print_columns([("left alone:", "")] + [(f"  {skip.target}", skip.reason) for skip in plan.skips])
        return
    click.echo(f"wrote {result.out}: {size}")
    trust = ", trust_remote_code=True" if result.storage == "code" else ""
    click.echo(f'load it with {result.auto_class}.from_pretrained("{result.out}"{trust})')


def _changes(plan: Plan) -> Iterator[str]:
    from spikepatch.plans import Fill, NormEmbedding, ScaleEmbedding, Untie

    for edit in plan.edits:
        if isinstance(edit, ScaleEmbedding):
            yield f"{edit.module}: output * {edit.factor:.6g}" + (" = sqrt(d)" if edit.per_width else "")
        elif isinstance(edit, NormEmbedding):
            yield f"{edit.module}: output through a LayerNorm"
        elif isinstance(edit, Untie):
            yield f"{edit.head}: its own matrix"
    fills = plan.select(Fill)
    for std in sorted({fill.std for fill in fills}):
        names = [fill.parameter for fill in fills if fill.std == std]
        yield f"std {std:.6g}: {len(names)} parameters, such as {names[-1]}"
    others = {skip.target for skip in plan.skips} - {fill.parameter for fill in fills}
    yield f"{len(others)} other tensors: " + (
        "by the architecture's own initialiser" if plan.reinit == "all" else "kept as learned"
    )


def _print_map(residual: ResidualMap) -> None:
    state = "proven" if residual.proven else "NOT proven"
    click.echo(
        f"{residual.architecture} ({residual.model_type}): {residual.placement}, width d = {residual.width},"
        f" N = {residual.layers} layers, S = {residual.sublayers} sub-layers, {state}"
    )
    for leak in residual.leaks:
        click.echo(f"  leak: {leak}")
    rows = [
        ("embedding", e.parameter, "", f"{e.kind}, {'normed' if e.normed else f'times {e.scale:g}'}")
        for e in residual.embeddings
    ]
    rows += _by_place(residual)
    if residual.head is not None:
        rows.append(("head", residual.head.parameter, "", "tied" if residual.head.tied else "its own matrix"))
    _print_columns(rows)


def _by_place(residual: ResidualMap) -> Iterator[tuple[str, str, str, str]]:
    """(part, name with * for the layer, layers, detail) of projections and norms, equal ones of all layers together."""
    rows: dict[tuple[str, str, str], list[int | None]] = {}
    for p in residual.residual_projections:
        detail: list[str] = [p.kind]
        detail += [f"then the norm {p.branch_norm.rpartition('.')[2]}"] if p.branch_norm else []
        detail += [f"times {p.multiplier:g}"] if p.multiplier != 1 else []
        rows.setdefault(("residual projection", _starred(p.parameter), ", ".join(detail)), []).append(p.layer)
    for n in residual.norms:
        key = (f"{n.role} norm", _starred(n.module), f"{n.kind}, eps {n.eps:.6g}")
        rows.setdefault(key, []).append(n.layer)
    for (part, name, details), layers in rows.items():
        yield part, name, _ranges(sorted({layer for layer in layers if layer is not None})), details


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _ranges(layers: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``layers 0-2, 5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "layers " + ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs) if runs else ""


def _print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    """Rows of plain text, each column as wide as its longest entry: names are there to be copied, so none is cut."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(entry.ljust(width) for entry, width in zip(row, widths, strict=True)).rstrip())


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, plain lines otherwise; on stderr, so that stdout holds the result alone."""
    if not sys.stderr.isatty():
        seen: set[str] = set()

        def line(step: str, done: int = 0, total: int = 0) -> None:
            if step not in seen:
                seen.add(step)
                click.echo(f"{step} ...", err=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def update(step: str, done: int = 0, total: int = 0) -> None:
            bar.update(task, description=step, completed=done, total=total or None)

        yield update
