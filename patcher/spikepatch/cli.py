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
from spikepatch.architectures import architectures_command
from spikepatch.errors import SpikepatchError
from spikepatch.map_table import columns, lines
from spikepatch.preflight.command import check_command

if TYPE_CHECKING:
    from spikepatch.apply.shards import Progress
    from spikepatch.conversion import Conversion
    from spikepatch.folding import Folded
    from spikepatch.plans import Plan

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
        spikepatch check arch:gpt2            whether it is at risk, before it is trained
        spikepatch convert arch:gpt2 out/     a fresh, patched GPT-2
        spikepatch fold trained/ plain/       after training: the plain architecture again
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
@click.option(
    "--recipe",
    default="scaled-embed",
    show_default=True,
    help="What to put in: a name that `spikepatch recipes` lists, a TOML file, or module:NAME of your own.",
)
@click.option(
    "--reinit",
    type=click.Choice(["all", "residual", "none"]),
    default="all",
    show_default=True,
    help="Weights to draw afresh: all (a model to pre-train), the residual projections, or none (keep all).",
)
@click.option("--factor", type=float, metavar="C", help="Embedding factor.  [default: sqrt(d), or 1/std if learned]")
@click.option("--positions", is_flag=True, help="Scale learned position embeddings too.")
@click.option("--replace", is_flag=True, help="Divide out a factor that SOURCE applies to its embedding already.")
@click.option("--untie", is_flag=True, help="Give a tied head its own matrix.")
@click.option(
    "--storage",
    type=click.Choice(["auto", "plain", "native", "host", "code"]),
    default="auto",
    show_default=True,
    help="plain: the same architecture (re-initialisation only). native: a setting of its config. host: another"
    " architecture with the same tensors. code: a subclass written beside the weights. auto: plain, else native, else"
    " code.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of every random weight.")
@click.option(
    "--dtype", metavar="DTYPE", help="float32, bfloat16, float16 or float64.  [default: the source's, else float32]"
)
@click.option("--max-shard-size", metavar="SIZE", help="Such as 2GB.  [default: the source's shards, or 5GB]")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Allow the Python code that comes with SOURCE to run.")
@click.option("--allow-nonfinite", is_flag=True, help="Keep learned weights that are NaN or infinite.")
@click.option("--overwrite", is_flag=True, help="Replace a folder at OUT, once the new one is complete.")
@click.option(
    "--dry-run", is_flag=True, help="Plan and check everything, print the plan, and what factors do to learned weights."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, on stdout.")
def convert(source: str, out: str, *, as_json: bool, dry_run: bool, **options: Any) -> None:
    with _progress() as progress:
        from spikepatch.conversion import convert as run

        result = run(source, out, dry_run=dry_run, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
    else:
        _print_conversion(result, dry_run=dry_run)


@main.command()
@click.argument("trained")
@click.argument("out", type=click.Path())
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Allow the Python code that the original came with to run.")
@click.option("--overwrite", is_flag=True, help="Replace a folder at OUT, once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, on stdout.")
def fold(trained: str, out: str, *, as_json: bool, **options: Any) -> None:
    """Put the factor or norm of TRAINED into its embedding, and write the plain architecture to OUT.

    TRAINED is a patched folder, as `convert` or a patched model's save_pretrained wrote it, or a hub id. A tied head
    gets a matrix of its own. The logits stay the same; it is meant for after training, since training on is not the
    same. No code of TRAINED is run.
    """
    with _progress() as progress:
        from spikepatch.folding import fold as run

        result = run(trained, out, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
        return
    for note in result.notes:
        click.echo(note)
    for table in result.tables:
        click.echo(f"{table}: rows times their factor, or behind their norm")
    if result.untied:
        click.echo("the head has its own matrix now, and the config says so")
    click.echo(f"wrote {result.out}: {result.parameters:,} parameters, {result.bytes / 1e9:.2f} GB, plain")
    click.echo(_load_line(result))


@main.command(help=f"Show the residual map of SOURCE, and whether it is proven.\n{_SOURCE_HELP}")
@click.argument("source")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Allow the Python code that comes with SOURCE to run.")
@click.option("--json", "as_json", is_flag=True, help="Print the map as one JSON object, and nothing else, on stdout.")
def inspect(source: str, revision: str | None, trust_remote_code: bool, as_json: bool) -> None:
    with _progress() as progress:
        progress("mapping the residual stream")
        from spikepatch.apply.patched import build_as_it_is
        from spikepatch.residual.inspect import inspect as run
        from spikepatch.source import open_source

        found = open_source(source, revision=revision, trust_remote_code=trust_remote_code, weights=False)
        residual = run(build_as_it_is(found), source=source)
    if as_json:
        click.echo(residual.to_json())
    else:
        for line in lines(residual):
            click.echo(line)


@main.command()
@click.argument("out", type=click.Path())
@click.option("--allow-nonfinite", is_flag=True, help="Weights may be NaN or infinite.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, on stdout.")
def verify(out: str, allow_nonfinite: bool, as_json: bool) -> None:
    """Compare a folder that spikepatch wrote with its manifest: hashes, headers, finite values.

    Exit code 0: it is what was written. 2: it is not; everything that differs is named.
    """
    with _progress() as progress:
        from spikepatch.storage.verify import verify as run

        found = run(out, allow_nonfinite=allow_nonfinite, progress=progress)
    if as_json:
        click.echo(json.dumps({"folder": out, "files": found.files, "tensors": found.tensors, "bytes": found.bytes}))
    else:
        size = f"{found.files} files, {found.tensors} tensors, {found.bytes / 1e9:.2f} GB"
        click.echo(f"{out} is what was written: {size}")


main.add_command(architectures_command)
main.add_command(check_command)


@main.command()
@click.argument("file", type=click.Path())
@click.option("--factory", required=True, metavar="MODULE:FUNCTION", help="What builds the model; see above.")
@click.option(
    "--recipe",
    default="scaled-embed",
    show_default=True,
    help="What to put in: a name that `spikepatch recipes` lists, a TOML file, or module:NAME of your own.",
)
@click.option("--factor", type=float, metavar="C", help="Embedding factor.  [default: sqrt(d)]")
@click.option("--positions", is_flag=True, help="Scale learned position embeddings too.")
@click.option("--replace", is_flag=True, help="Divide out a factor that the model applies to its embedding already.")
@click.option("--untie", is_flag=True, help="Take out the assignment that ties the head to the embedding.")
@click.option(
    "--write/--diff",
    default=False,
    help="Replace FILE, or print a unified diff and write nothing.  [default: --diff]",
)
def codemod(file: str, factory: str, **options: Any) -> None:
    """Write a recipe into FILE, the Python source of a model of your own.

    This runs your code: the module of --factory is imported, from the current folder or FILE's, and the function is
    called without arguments, before and after the edit, in processes of their own. It returns the model (an nn.Module
    whose class FILE defines), or a tuple of the model and its example inputs: ids, or a dict of arguments of forward.
    Without them forward is given ids. A small model on the CPU will do: the edit works for any width and depth.

    The embedding's construction becomes that of a class that is added to FILE, with the recipe's factor, norm or damped
    gradient, and the model's __init__ ends with a call that draws the recipe's weights. Every other byte of FILE stays.
    Other classes of FILE that build the same embedding get its change too, but keep their own initialisation.

    \b
        spikepatch codemod model.py --factory build:small_model
        spikepatch codemod model.py --factory build:small_model --write
    """
    with _progress() as progress:
        progress("building the model before and after the edit")
        from spikepatch.apply.codemod import codemod as run

        result = run(file, factory, **options)
    for note in result.notes:
        click.echo(note, err=True)
    if options["write"]:
        click.echo(f"wrote {file}: {result.plan.recipe}, checked by building {result.plan.architecture} from it")
    else:
        click.echo(result.diff, nl=False)


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
        for advice in filter(None, ("no weight decay on embeddings" * recipe.no_decay_embeddings, recipe.advice)):
            click.echo(f"    {advice}")
        click.echo(f"    {recipe.source}\n")
    click.echo("W: sub-layer matrices. E: embeddings. d: width of the residual stream. N: number of layers.")
    click.echo("S: number of sub-layers, counted from the map (2N in a classic decoder of N layers).")
    click.echo("--recipe takes one of your own too: a TOML file of transforms (my.toml), or module:NAME in Python.")


def _print_conversion(result: Conversion, *, dry_run: bool) -> None:
    plan = result.plan
    for note in result.notes:
        click.echo(note)
    streams = "; ".join(f"width d = {s.width}, S = {len(s.sublayers)} sub-layers" for s in plan.streams)
    click.echo(f"{plan.architecture}: {streams}, proven")
    for line in _changes(plan):
        click.echo(f"  {line}")
    if result.drift:
        click.echo(f"on a sample text (log V = {result.log_vocab:.1f}):")
        for row in columns(list(_drift_rows(result))):
            click.echo(row)
    size = f"{result.parameters:,} parameters, {result.bytes / 1e9:.2f} GB, {result.dtype}, storage {result.storage}"
    if dry_run:
        click.echo(f"dry run, nothing written: {size}")
        for row in columns([("left alone:", ""), *((f"  {skip.target}", skip.reason) for skip in plan.skips)]):
            click.echo(row)
        return
    click.echo(f"wrote {result.out}: {size}")
    click.echo(_load_line(result))


def _load_line(result: Conversion | Folded) -> str:
    trust = ", trust_remote_code=True" if result.trust else ""
    return f'load it with {result.auto_class}.from_pretrained("{result.out}"{trust})'


def _drift_rows(result: Conversion) -> Iterator[tuple[str, ...]]:
    """A row for each model; of the layers the first three and the last, where the stream grows and where it ends."""
    count = len(result.drift[0].stream)
    layers = sorted({i for i in (0, 1, 2, count - 1) if 0 <= i < count})
    named = f"stream std at layers {', '.join(str(i + 1) for i in layers)}" if layers else ""
    yield "", "loss", "KL", named
    for row in result.drift:
        stds = (f"{row.stream[i]:<6.3g}" for i in layers if i < len(row.stream))
        yield row.model, f"{row.loss:.3f}", f"{row.kl:.3f}", " ".join(stds)


def _changes(plan: Plan) -> Iterator[str]:
    from spikepatch.plans import NORM_NAMES, Constant, DetachEmbedding, Fill, NormEmbedding, ScaleEmbedding, Untie

    for edit in plan.edits:
        match edit:
            case ScaleEmbedding():
                yield f"{edit.module}: output * {edit.factor:.6g}" + (" = sqrt(d)" if edit.per_width else "")
            case NormEmbedding():
                yield f"{edit.module}: output through a {NORM_NAMES[edit.kind]}" + (
                    "" if edit.affine else " without gain"
                )
            case DetachEmbedding():
                yield f"{edit.module}: {edit.gradient:g} of its gradient"
            case Untie():
                yield f"{edit.head}: its own matrix"
    fills = plan.select(Fill)
    for std in sorted({fill.std for fill in fills}):
        names = [fill.parameter for fill in fills if fill.std == std]
        yield f"std {std:.6g}: {len(names)} parameters, such as {names[-1]}"
    constants = plan.select(Constant)
    for value in sorted({constant.value + constant.offset for constant in constants}):
        names = [constant.parameter for constant in constants if constant.value + constant.offset == value]
        yield f"all {value:.6g}: {len(names)} parameters, such as {names[-1]}"
    others = {skip.target for skip in plan.skips} - plan.written
    yield f"{len(others)} other tensors: " + (
        "by the architecture's own initialiser" if plan.reinit == "all" else "kept as learned"
    )


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
            new = step != bar.tasks[task].description  # shown at once, however short it is
            bar.update(task, description=step, completed=done, total=total or None, refresh=new)

        yield update
