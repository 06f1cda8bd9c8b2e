"""``spikepatch spikes``."""

from __future__ import annotations

from pathlib import Path

import click

from spikepatch.commands import options
from spikepatch.commands.console import is_quiet
from spikepatch.commands.nouns import checked

#: Events that are printed; the page has all.
_PRINTED = 20


@click.command("spikes")
@click.argument(
    "logs", nargs=-1, required=True, metavar="LOG...", type=options.Place(path_type=Path), callback=checked("spikes")
)
@click.option("--loss", metavar="KEY", help="What the loss is called in the log.  [default: found]")
@click.option("--norm", metavar="KEY", help="What the gradient norm is called, before clipping.  [default: found]")
@click.option("--step", metavar="KEY", help="What the step is called.  [default: found]")
@click.option(
    "--against",
    type=options.Place(path_type=Path),
    metavar="LOG2",
    help="Another run on the same batches: events that both have are the data's.",
)
@click.option(
    "--report", type=options.Place(path_type=Path, dir_okay=False), metavar="HTML", help="Write a page with the curves."
)
@options.overwrite
@options.as_json
@click.pass_context
def spikes_command(
    ctx: click.Context,
    logs: tuple[Path, ...],
    loss: str | None,
    norm: str | None,
    step: str | None,
    against: Path | None,
    report: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Find the loss spikes in anybody's training log, and say what cannot be seen in it.

    LOG is the output of a trainer (nanoGPT, llm.c, modded-nanogpt, Megatron-LM, nanochat, torchtitan, OLMo-core ...),
    JSON lines, a CSV, text of your own ("step 1: loss 7.9"), a trainer_state.json, a folder of TensorBoard's event
    files, of a Trainer's output or of a run of spikepatch train.

    \b
        spikepatch spikes log.txt
        spikepatch spikes metrics.csv --loss "train/ce" --step iter --report page.html
        spikepatch spikes a/log.jsonl --against b/log.jsonl

    Exit code 0: every log is healthy, or has blips (single rows) only. 1: one has spikes, is unstable, is not back, or
    it cannot be told. 2: bad input. The gradient norm is told, and decides nothing.
    """
    import json

    from spikepatch.report.html import check_page, write_page
    from spikepatch.spikes.read_log import read_log
    from spikepatch.spikes.spike_page import spike_page
    from spikepatch.spikes.spike_report import judge

    if report is not None:
        check_page(report, overwrite=overwrite, sources=[log for log in (*logs, against) if log and log.is_file()])
    twin = None if against is None else read_log(against, loss=loss, norm=norm, step=step)
    read = [read_log(log, loss=loss, norm=norm, step=step) for log in logs]
    reports = [judge(log, against=twin) for log in read]
    if as_json:
        found = [one.to_dict() for one in reports]
        click.echo(json.dumps(found[0] if len(found) == 1 else found, indent=2, allow_nan=False))
    else:
        for i, one in enumerate(reports):
            _print(one, first=i == 0)
    if report is not None:
        write_page(spike_page(reports), report, overwrite=overwrite)
        if not as_json and not is_quiet():
            click.echo(f"page: {report}")
    ctx.exit(0 if all(one.passed for one in reports) else 1)


def _print(report: object, *, first: bool) -> None:
    """What was read, what cannot be judged, events, verdict."""
    import dataclasses

    from spikepatch.report.terminal import print_table, say
    from spikepatch.spikes.spike_page import event_table
    from spikepatch.spikes.spike_report import SpikeReport

    assert isinstance(report, SpikeReport)
    if not first:
        click.echo()
    if not is_quiet():
        for line in report.log.describe():
            say(line)
        for line in report.log.limits():
            say(f"cannot be judged: {line}")
        if report.events:
            table = event_table(report, narrow=True)
            shown = dataclasses.replace(table, rows=table.rows[:_PRINTED])
            print_table(shown)
            if more := len(table.rows) - len(shown.rows):
                click.echo(f"and {more} more events, which --json and --report have")
    for line in report.lines():
        say(line)
