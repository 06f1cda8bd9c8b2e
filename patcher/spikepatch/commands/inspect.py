"""``spikepatch inspect``."""

from __future__ import annotations

import click

from spikepatch.commands import options
from spikepatch.commands.console import is_verbose, progress
from spikepatch.report.terminal import print_rows, say
from spikepatch.residual.table import described


@click.command("inspect", help=f"Show the residual map of SOURCE, and whether it is proven.\n{options.SOURCE_HELP}")
@options.source("inspect")
@options.revision
@options.trust_remote_code
@options.example_inputs
@options.as_json
def inspect_command(
    source: str, revision: str | None, trust_remote_code: bool, example_inputs: str | None, as_json: bool
) -> None:
    with progress() as report:
        from spikepatch.apply.generated.patched_source import build_as_it_is
        from spikepatch.residual.feature_size import measured
        from spikepatch.residual.inspect import inspect
        from spikepatch.source.open import open_source

        report("reading the source")
        found = open_source(source, revision=revision, trust_remote_code=trust_remote_code, weights=False)
        report("mapping the residual stream")
        model = build_as_it_is(found)
        residual = inspect(model, example_inputs=example_inputs, source=source)
        if residual.entrances:
            report("measuring the features that enter it")
            residual = measured(model, residual, example_inputs)
    if as_json:
        click.echo(residual.to_json())
        return
    for part in described(residual):
        if isinstance(part, str):
            say(part)
        else:
            print_rows(part)
    if is_verbose():
        for each in (residual, *residual.streams):
            say("with every residual projection cut, the output still depends on:")
            for name in each.reaches:
                click.echo(f"  {name}")
