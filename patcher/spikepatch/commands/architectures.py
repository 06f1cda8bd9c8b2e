"""``spikepatch architectures``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from spikepatch.commands import options
from spikepatch.commands.console import progress

if TYPE_CHECKING:
    from spikepatch.residual.survey import Row


@click.command("architectures")
@click.option("--filter", "text", default="", metavar="TEXT", help="Only types that contain TEXT.")
@options.as_json
def architectures_command(text: str, as_json: bool) -> None:
    """List which types of the installed transformers are proven.

    The residual map of each type's default config is made now, with one layer of each kind: a second or two for each. A
    type whose default config cannot be built may well work: give the real model to `spikepatch inspect`.
    """
    with progress() as report:
        from spikepatch.residual.survey import survey, types

        total = len(types(text))
        if not total:
            raise click.BadParameter(f"no type contains {text!r}", param_hint="--filter")
        rows = []
        report("mapping", 0, total)
        for row in survey(text):
            rows.append(row)
            report("mapping", len(rows), total)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        _print(rows)


def _print(rows: Sequence[Row]) -> None:
    import transformers

    from spikepatch.report.document import Table
    from spikepatch.report.terminal import print_table, say

    entries = (
        (
            row.type,
            row.task,
            ", ".join([row.placement, *row.kinds]) if row.placement else "",
            _per_layer(row.sublayers, row.layers),
            ", ".join(row.embeddings),
            row.reason or ("for some inputs" if row.conditions else "yes"),
        )
        for row in rows
    )
    headers = ("type", "task", "structure", "sub-layers per layer", "embedding as found", "proven")
    print_table(Table("", headers, tuple(entries)))
    proven = sum(row.proven for row in rows)
    say(f"{proven} of {len(rows)} proven, by default configs of transformers {transformers.__version__}")


def _per_layer(sublayers: int | None, layers: int | None) -> str:
    if not sublayers or not layers:
        return ""
    return str(sublayers // layers) if sublayers % layers == 0 else f"{sublayers} in {layers}"
