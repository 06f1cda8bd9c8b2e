"""``spikepatch report``."""

from __future__ import annotations

from pathlib import Path

import click

from spikepatch.commands import options
from spikepatch.commands.console import is_quiet


@click.command("report")
@click.argument("folder", type=options.Place(path_type=Path))
@click.option(
    "--out",
    type=options.Place(path_type=Path, dir_okay=False),
    metavar="HTML",
    help="Write the page here.  [default: FOLDER/report.html]",
)
@options.overwrite
@options.as_json
def report_command(folder: Path, out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Show what became of a training: verdicts, and a page with the curves.

    FOLDER is what was --out of spikepatch train; a training that is still under way is shown as far as it is.

    \b
        spikepatch report runs/x
    """
    import json

    from spikepatch.report.html import check_page, write_page
    from spikepatch.training.outcome import outcome
    from spikepatch.training.page import page_of
    from spikepatch.training.tables import print_verdict

    found = outcome(folder)
    path = out or folder / "report.html"
    if as_json:
        click.echo(json.dumps(found.verdict.to_dict(), indent=2, allow_nan=False))
    else:
        print_verdict(found.verdict)
    check_page(path, overwrite=overwrite, sources=found.local_sources)
    write_page(page_of(found), path, overwrite=overwrite)
    if as_json or is_quiet():
        return
    if found.under_way or found.waiting:
        click.echo(f"not finished: {len(found.under_way)} under way, {len(found.waiting)} not begun")
    click.echo(f"page: {path}")
