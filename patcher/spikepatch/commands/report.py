"""``spikepatch report``."""

from __future__ import annotations

from pathlib import Path

import click

from spikepatch.commands import options
from spikepatch.commands.console import is_quiet
from spikepatch.commands.nouns import checked


@click.command("report")
@click.argument(
    "folders", nargs=-1, required=True, type=options.Place(path_type=Path), metavar="FOLDER...",
    callback=checked("report"),
)  # fmt: skip
@click.option(
    "--out",
    type=options.Place(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the page here; or if it ends in .svg, a picture: loss and gradient norm of all seeds, a row for each"
    " model and learning rate.  [default: FOLDER/report.html; of several folders, no page]",
)
@options.overwrite
@options.as_json
def report_command(folders: tuple[Path, ...], out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Show what became of a training: verdicts, and a page with the curves.

    FOLDER is what was --out of spikepatch train; a training that is still under way is shown as far as it is. Several
    folders are shown as one training, such as the seeds of one that ran side by side: settings, data and versions must
    be the same.

    \b
        spikepatch report runs/x
        spikepatch report runs/seed0 runs/seed1 --out both.html
    """
    import json

    from spikepatch.report.html import check_page, write_page, write_panels
    from spikepatch.report.terminal import say
    from spikepatch.training.curves import arm_panels
    from spikepatch.training.outcome import outcome
    from spikepatch.training.page import page_of
    from spikepatch.training.tables import print_verdict

    found = outcome(*folders)
    path = out or (folders[0] / "report.html" if len(folders) == 1 else None)
    if as_json:
        click.echo(json.dumps(found.verdict.to_dict(), indent=2, allow_nan=False))
    else:
        print_verdict(found.verdict)
    if path is not None:
        check_page(path, overwrite=overwrite, sources=found.local_sources)
        if path.suffix.lower() == ".svg":
            write_panels(arm_panels(found.logs, found.verdict), path, overwrite=overwrite)
        else:
            write_page(page_of(found), path, overwrite=overwrite)
    if as_json or is_quiet():
        return
    if found.under_way or found.waiting:
        say(f"not finished: {len(found.under_way)} under way, {len(found.waiting)} not begun")
    if path is not None:
        click.echo(f"page: {path}")
