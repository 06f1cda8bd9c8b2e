"""``spikepatch fold``."""

from __future__ import annotations

import json
from typing import Any

import click

from spikepatch.apply.disk.publish import check_local_target
from spikepatch.apply.folder.loader import loader
from spikepatch.commands import options
from spikepatch.commands.console import is_quiet, progress
from spikepatch.commands.convert import load_line
from spikepatch.commands.nouns import checked
from spikepatch.report.terminal import say
from spikepatch.source.formats import size


@click.command("fold")
@click.argument("trained", shell_complete=options.complete_folder, callback=checked("fold"))
@options.out
@options.revision
@options.trust_remote_code
@options.allow_nonfinite
@options.overwrite
@options.load_test
@options.as_json
def fold_command(trained: str, out: str, *, as_json: bool, **options: Any) -> None:
    """Write TRAINED to OUT as the plain architecture again.

    Its factor or norm goes into the embedding, and a tied head gets a matrix of its own. TRAINED is a patched folder,
    as `convert` or a patched model's save_pretrained wrote it, or a hub id. The logits stay the same; it is meant for
    after training, since training on is not the same. No code that spikepatch wrote is run.
    """
    check_local_target(out, trained, overwrite=options["overwrite"])  # before torch is loaded
    with loader(options["load_test"]), progress() as report:  # its imports go on while ours do
        from spikepatch.apply.folder.fold import fold

        result = fold(trained, out, progress=report, **options)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
        return
    if not is_quiet():
        for note in result.notes:
            say(note)
        if result.untied:
            say("the head has its own matrix now, and the config says so")
    say(f"wrote {result.out}: {result.parameters:,} parameters, {size(result.bytes)}, plain")
    click.echo(load_line(result))
