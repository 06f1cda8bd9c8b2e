"""``spikepatch train``."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from spikepatch.commands import options
from spikepatch.commands.console import bar_on_stderr, is_quiet
from spikepatch.commands.nouns import check_noun
from spikepatch.errors import BadTarget
from spikepatch.progress import Progress, silent
from spikepatch.report.terminal import say
from spikepatch.source.local import local_path

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


def _numbers(kind: type[int] | type[float], least: float) -> Any:
    """A callback for an option of comma-separated numbers."""

    def parse(ctx: click.Context, option: click.Parameter, text: str) -> tuple[float, ...]:
        try:
            found = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
        except ValueError as error:
            raise click.BadParameter(f"{text!r} is no list of numbers, such as 0,1") from error
        if not all(least <= value < float("inf") for value in found):
            raise click.BadParameter(f"each must be at least {least:g}")
        return found

    return parse


class _Finite(click.FloatRange):
    """click takes nan and inf for numbers of any range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not finite", param, ctx)
        return number


_POSITIVE = _Finite(min=0, min_open=True)
_NOT_NEGATIVE = _Finite(min=0)
_BELOW_1 = _Finite(min=0, max=1, max_open=True)


@click.command("train")
@click.argument("models", nargs=-1, metavar="MODEL...", shell_complete=options.complete_source)
@click.option("--data", multiple=True, metavar="DATA", help="What to train on; may be repeated.")
@click.option("--out", type=options.Place(path_type=Path), help="Folder of the runs; new, or with --resume.")
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Optimiser steps of each run.")
@click.option("--lr", type=_POSITIVE, help="Largest learning rate.")
@click.option(
    "--lr-multipliers",
    "multipliers",
    default="1",
    callback=_numbers(float, 1e-9),
    metavar="A,B,...",
    help="Run each model at --lr times these; only 1 counts for the exit code.  [default: 1]",
)
@click.option(
    "--seeds", default="0", callback=_numbers(int, 0), metavar="A,B,...", help="Of weights and data.  [default: 0]"
)
@click.option("--batch-tokens", type=click.IntRange(min=1), default=65536, show_default=True, help="In one step.")
@click.option("--seq-len", type=click.IntRange(min=2), default=512, show_default=True, help="Length of a sequence.")
@click.option(
    "--micro-batch",
    type=click.IntRange(min=1),
    metavar="B",
    help="Sequences of one forward pass on one device; gradients are accumulated.  [default: all of a step's]",
)
@click.option("--warmup", type=_NOT_NEGATIVE, default=0.05, show_default=True, help="Steps, or below 1 a share of all.")
@click.option(
    "--schedule",
    type=click.Choice(["cosine", "constant", "wsd"]),
    default="cosine",
    show_default=True,
    help="Of the learning rate, after the warm-up; wsd falls in the last part only.",
)
@click.option(
    "--weight-decay",
    type=_NOT_NEGATIVE,
    default=0.1,
    show_default=True,
    help="Of matrices; none of vectors, and of embeddings as the recipe says.",
)
@click.option(
    "--betas",
    type=(_BELOW_1, _BELOW_1),
    default=(0.9, 0.95),
    show_default=True,
    help="AdamW's.",
)
@click.option(
    "--precision",
    type=click.Choice(["no", "bf16", "fp16"]),
    default="no",
    show_default=True,
    help="Of the forward pass; weights and optimiser stay float32.",
)
@click.option("--grad-clip", type=_NOT_NEGATIVE, default=1.0, show_default=True, help="Largest gradient norm; 0: any.")
@click.option("--z-loss", type=_NOT_NEGATIVE, default=0.0, show_default=True, help="Its factor, such as 1e-4.")
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=0),
    default=500,
    show_default=True,
    metavar="N",
    help="Steps; 0: never.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the last checkpoint of each run: `train --resume OUT` needs no more; a larger --steps is for"
    " constant and wsd.",
)
@click.option(
    "--on-spike",
    type=click.Choice(["log", "skip", "rewind", "stop"]),
    default="log",
    show_default=True,
    help="log: train on. skip: drop the step's gradients. rewind: go back to the last checkpoint before it, and leave"
    " out the batches since. stop: end the run. A gradient norm alone makes skip act, and no other. Gradients that are"
    " not finite are always dropped.",
)
@options.reading
@click.option(
    "--bos",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Begin each document with the tokenizer's BOS; auto: where the tokenizer itself does.",
)
@click.option("--skip-bad", is_flag=True, help="Leave out rows without a document, and count them.")
@click.option(
    "--reset-positions",
    is_flag=True,
    help="Keep the documents of a sequence apart: positions begin again, and attention does not reach back.",
)
@click.option("--eval-data", multiple=True, metavar="DATA", help="Held out.  [default: the last 5 % of --data]")
@click.option(
    "--log-with",
    multiple=True,
    type=click.Choice(
        ["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
    ),
    help="Send every step there too, through accelerate; may be repeated.",
)
@click.option("--activation-checkpointing", is_flag=True, help="Less memory, more time.")
@click.option("--compile", is_flag=True, help="Compile the models with torch.compile.")
@click.option(
    "--watch-every",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    metavar="N",
    help="Steps between two measurements of stream and gradients in each layer; 0: none.",
)
@options.of_recipes
@options.revision
@options.trust_remote_code
@options.as_json
@click.pass_context
def train_command(
    ctx: click.Context,
    /,
    models: tuple[str, ...],
    out: Path | None,
    resume: bool,
    trust_remote_code: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train each MODEL on the same batches, and say of each run whether it stayed free of loss spikes.

    MODEL is a hub id, a local folder (a converted one, for example), or arch:TYPE. MODEL@RECIPE patches it in memory,
    NAME=MODEL gives it a name. --factor, --positions, --replace, --untie and --part are of the recipes. A model without
    weights is drawn afresh from the seed. DATA is a file or a glob: .txt, .jsonl, .csv (compressed too), .parquet,
    .arrow, tokens (.bin with Megatron's .idx, or with --token-dtype); a folder of save_to_disk; datasets:NAME; or
    builtin:stdlib, the sources of Python's standard library on this machine.

    \b
        spikepatch train arch:gpt2 arch:gpt2@scaled-embed --data builtin:stdlib --out runs/x --steps 2000 --lr 5e-4
        spikepatch train --resume runs/x               # after an interruption: all options are as they were
        accelerate launch -m spikepatch train ...      # on several GPUs; with --use_fsdp, sharded

    Exit code 0: every patched model (every model, if none is patched) is healthy at --lr, or has blips of one step.
    1: the loss of one of them spikes, is unstable, or is not back, or the run is too short to tell. 2: refused, or
    bad input. 3: a bug. Recipes that leave one of the paper's two conditions out, such as vanilla, are baselines.
    """
    import json

    for model in () if resume else models:  # a lone one is then OUT
        check_noun("train", model)
    from spikepatch.training.harness import what_is_asked
    from spikepatch.training.live_line import reporting
    from spikepatch.training.runs import run_all
    from spikepatch.training.tables import print_verdict

    if resume and out is None and len(models) == 1:
        out, models = local_path(models[0]), ()
    if out is None:
        raise click.MissingParameter(ctx=ctx, param=next(p for p in ctx.command.params if p.name == "out"))
    main = int(os.environ.get("RANK", "0")) == 0
    named = {name: value for name, value in given.items() if _is_given(ctx, name)}
    asked = what_is_asked(named | ({"models": models} if models else {}), out, resume=resume)
    count = len(asked.models) * len(asked.multipliers) * len(asked.seeds)
    try:
        with reporting(count, main=main and not is_quiet()) as progress, _steps() as steps:
            verdict = run_all(
                asked, out, resume=resume, trust_remote_code=trust_remote_code,
                command=shlex.join(["spikepatch", *sys.argv[1:]]), steps=steps, progress=progress,
                say=(lambda text: None) if is_quiet() else (lambda text: say(text, err=True)),
            )  # fmt: skip
    except (KeyboardInterrupt, SystemExit):
        if main:
            _say_how_to_go_on(out, trust_remote_code)
        raise
    if main:
        if as_json:
            click.echo(json.dumps(verdict.to_dict(), indent=2, allow_nan=False))
        else:
            print_verdict(verdict)
        _write_page(out)
        if not as_json and not is_quiet():
            click.echo(f"page: {out / 'report.html'}")
    ctx.exit(verdict.exit_code)


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)


def _say_how_to_go_on(out: Path, trusted: bool) -> None:
    from spikepatch.training.folder import RECORD

    if (out / RECORD).exists():
        launcher = "" if os.environ.get("WORLD_SIZE", "1") == "1" else " (by the same launcher)"
        more = " --trust-remote-code" if trusted else ""
        click.echo(f"go on with{launcher}: spikepatch train --resume {shlex.quote(str(out))}{more}", err=True)


def _write_page(out: Path) -> None:
    from spikepatch.report.html import write_page
    from spikepatch.training.page import page

    path = out / "report.html"
    try:
        write_page(page(out), path)
    except BadTarget as error:
        raise BadTarget(
            "the page cannot be written; the training is done, and its verdict stands",
            where=str(path),
            why=f"{error.what}: {error.why}",
            remedy=f"spikepatch report {shlex.quote(str(out))} --out PAGE.html",
        ) from error


@contextlib.contextmanager
def _steps() -> Iterator[Progress]:
    """What is being prepared, on stderr: each step once, and on a terminal a bar for one of known length."""
    if is_quiet():
        yield silent
        return
    seen: set[str] = set()
    with contextlib.ExitStack() as shown:
        bars: list[RichProgress] = []

        def update(step: str, done: int = 0, total: int = 0) -> None:
            if step not in seen:
                seen.add(step)
                shown.close()
                bars.clear()
                click.echo(f"{step} ...", err=True)
            if total and sys.stderr.isatty():
                if not bars:
                    bars.append(shown.enter_context(bar_on_stderr()))
                    bars[0].add_task(step, total=total)
                bars[0].update(bars[0].task_ids[0], completed=done)
                if done >= total:  # the display of a run is to have the terminal for itself
                    shown.close()
                    bars.clear()

        yield update
