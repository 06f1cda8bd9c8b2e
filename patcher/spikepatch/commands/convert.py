"""``spikepatch convert``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from spikepatch.apply.disk.publish import check_local_target
from spikepatch.apply.folder.loader import loader
from spikepatch.commands import options
from spikepatch.commands.console import is_quiet, is_verbose, progress
from spikepatch.plans import in_words
from spikepatch.plans.plan import Fill
from spikepatch.report.document import Table, number
from spikepatch.report.terminal import print_rows, print_table, say
from spikepatch.residual.map import pattern
from spikepatch.source.formats import size

if TYPE_CHECKING:
    from spikepatch.apply.folder.conversion import Conversion
    from spikepatch.apply.folder.fold import Folded
    from spikepatch.plans.plan import Plan, Skip


@click.command("convert", help=f"Write a patched copy of SOURCE to OUT.\n{options.SOURCE_HELP}")
@options.source("convert")
@options.out
@options.recipe
@options.reinit
@options.of_recipes
@click.option(
    "--storage",
    type=click.Choice(["auto", "plain", "native", "host", "code"]),
    default="auto",
    show_default=True,
    help="plain: the same architecture (re-initialisation only). native: a setting of its config. host: another"
    " architecture with the same tensors. code: a subclass written beside the weights. auto: plain, else native, else"
    " code.",
)
@options.seed
@options.dtype
@click.option("--max-shard-size", metavar="SIZE", help="Such as 2GB.  [default: the source's shards, or 5GB]")
@options.revision
@options.trust_remote_code
@options.allow_nonfinite
@options.example_inputs
@options.overwrite
@options.load_test
@click.option(
    "--dry-run", is_flag=True, help="Plan and check everything, print the plan, and what factors do to learned weights."
)
@options.as_json
@click.pass_context
def convert_command(
    ctx: click.Context, /, source: str, out: str, *, as_json: bool, dry_run: bool, **options: Any
) -> None:
    check_local_target(out, source, overwrite=options["overwrite"])  # before torch is loaded
    # Its imports go on while ours do.
    with loader(options["load_test"] and not dry_run), progress() as report:
        from spikepatch.apply.folder.convert import convert

        result = convert(source, out, dry_run=dry_run, progress=report, **options)
    if is_quiet() and ctx.get_parameter_source("reinit") is ParameterSource.DEFAULT and result.discards:
        say(result.discards, err=True)  # which else has been said before anything was written
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
        return
    if dry_run or not is_quiet():
        _say_about(result, parts=dry_run)
    written = f"{result.parameters:,} parameters, {size(result.bytes)}, {result.dtype}, storage {result.storage}"
    if dry_run:
        say(f"dry run, nothing written: {written}")
    if is_verbose():
        say("left alone:")
        print_rows([(f"  {skip.target}", skip.reason) for skip in result.plan.skips])
    elif dry_run:
        for line in _left_alone(result.plan):
            say(line)
    if not dry_run:
        say(f"wrote {result.out}: {written}")
        click.echo(load_line(result))


def load_line(result: Conversion | Folded) -> str:
    """How to load what was written."""
    trust = ", trust_remote_code=True" if result.trust else ""
    return f"load it with {result.auto_class}.from_pretrained({json.dumps(str(result.out), ensure_ascii=False)}{trust})"


def _say_about(result: Conversion, *, parts: bool) -> None:
    for line in _about(result, parts=parts):
        say(line)
    if result.drift:
        say(f"on a sample text (log V = {result.log_vocab:.1f}):")
        print_table(_drift_table(result))


def _about(result: Conversion, *, parts: bool) -> Iterator[str]:
    """``parts``: with those of a model of several modalities, which else are said before they are drawn."""
    plan = result.plan
    yield from (note for note in result.notes if note != result.discards)
    yield f"{plan.architecture}: {in_words.streams(plan)}, proven"
    yield from (f"  {line}" for line in (*(in_words.parts(plan) if parts else ()), *in_words.changes(plan)))
    filled = {fill.parameter for fill in plan.select(Fill)}
    for entrance in result.residual.entrances:
        if entrance.parameter in filled and not entrance.normed:
            yield f"  features of {', '.join(entrance.inputs)}: std near 1 where they enter, by {entrance.parameter}"


def _left_alone(plan: Plan) -> Iterator[str]:
    """The first of those that have the same reason, but for the number of the layer; -v lists them all."""
    alike: dict[str, list[Skip]] = {}
    for skip in plan.skips:
        alike.setdefault(pattern(skip.reason), []).append(skip)
    if alike:
        yield "left alone:"
    for first, *others in alike.values():
        yield f"  {first.target}" + (f" and {len(others)} more" if others else "") + f": {first.reason}"


def _drift_table(result: Conversion) -> Table:
    """A row for each model; of the layers the first three and the last, where the stream grows and where it ends."""
    count = len(result.drift[0].stream)
    layers = sorted({i for i in (0, 1, 2, count - 1) if 0 <= i < count})
    rows = []
    for row in result.drift:
        stds = (number(row.stream[i] if i < len(row.stream) else None) for i in layers)
        rows.append((row.model, f"{row.loss:.3f}", f"{row.kl:.3f}", *stds))
    return Table("", ("", "loss", "KL", *(f"stream std at layer {i + 1}" for i in layers)), tuple(rows))
