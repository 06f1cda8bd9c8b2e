"""``spikepatch verify``."""

from __future__ import annotations

import dataclasses
import json

import click

from spikepatch.commands import options
from spikepatch.commands.console import progress
from spikepatch.commands.nouns import checked
from spikepatch.report.terminal import say
from spikepatch.source.formats import size


@click.command("verify")
@click.argument("out", type=options.Place(), callback=checked("verify"))
@options.allow_nonfinite
@options.as_json
def verify_command(out: str, allow_nonfinite: bool, as_json: bool) -> None:
    """Compare a folder that spikepatch wrote with its manifest.

    What is compared: every file by its hash, the manifest and its plan, headers, and that all values are finite. A file
    that was not written is named. Of a checkpoint that a trainer saved of a patched model, which has no manifest: that
    the patch and its code are whole, that the tensors are the model's, and finite.

    Exit code 0: it is what was written. 2: it is not; everything that differs is named.
    """
    with progress() as report:
        from spikepatch.apply.folder.verify import verify

        found = verify(out, allow_nonfinite=allow_nonfinite, progress=report)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found) | {"folder": out}))
    elif not found.manifest:
        held = f"{found.tensors} tensors, {size(found.bytes)}"
        say(f"{out} is a checkpoint of a patched model, whole and finite: {held}; it has no manifest of its files")
    else:
        held = f"{found.files} files, {found.tensors} tensors, {size(found.bytes)}"
        say(f"{out} is what was written: {held}")
