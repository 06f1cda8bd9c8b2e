"""``spikepatch verify``."""

from __future__ import annotations

import json

import click

from spikepatch.commands import options
from spikepatch.commands.console import progress
from spikepatch.source.formats import size


@click.command("verify")
@options.out
@options.allow_nonfinite
@options.as_json
def verify_command(out: str, allow_nonfinite: bool, as_json: bool) -> None:
    """Compare a folder that spikepatch wrote with its manifest.

    What is compared: hashes, headers, and that all values are finite.

    Exit code 0: it is what was written. 2: it is not; everything that differs is named.
    """
    with progress() as report:
        from spikepatch.apply.disk.verify import verify

        found = verify(out, allow_nonfinite=allow_nonfinite, progress=report)
    if as_json:
        click.echo(json.dumps({"folder": out, "files": found.files, "tensors": found.tensors, "bytes": found.bytes}))
    else:
        held = f"{found.files} files, {found.tensors} tensors, {size(found.bytes)}"
        click.echo(f"{out} is what was written: {held}")
