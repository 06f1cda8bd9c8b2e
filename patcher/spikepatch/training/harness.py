"""``spikepatch.train``: all runs of a command, from Python; ``spikepatch train`` is its twin."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from spikepatch.data.rows import Reading
from spikepatch.data.tokenizing import Bos
from spikepatch.errors import Refused
from spikepatch.plans.plan import ModelPart
from spikepatch.progress import Progress, silent
from spikepatch.source.local import target_path
from spikepatch.source.typed import parsed
from spikepatch.training.folder import RECORD, read_record
from spikepatch.training.going_on import recorded
from spikepatch.training.log import Reporter, begun, read
from spikepatch.training.settings import Settings, TrainingCommand
from spikepatch.training.verdict import Verdict

#: Parts of what is asked, by the names of their fields.
_SETTINGS = frozenset(field.name for field in dataclasses.fields(Settings))
_READING = frozenset(field.name for field in dataclasses.fields(Reading))
_ASKED = frozenset(field.name for field in dataclasses.fields(TrainingCommand)) - {"settings", "reading", "options"}

#: Options of a command that have another name, and what cannot be done without.
_OPTIONS = {"multipliers": "--lr-multipliers", "models": "MODEL"}
_NEEDED = ("models", "data", "steps", "lr")


def train(
    models: str | Sequence[str] | None = None,
    data: str | Sequence[str] | None = None,
    out: str | os.PathLike[str] = "",
    *,
    steps: int | None = None,
    lr: float | None = None,
    multipliers: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    batch_tokens: int | None = None,
    seq_len: int | None = None,
    micro_batch: int | None = None,
    warmup: float | None = None,
    schedule: Literal["cosine", "constant", "wsd"] | None = None,
    weight_decay: float | None = None,
    betas: tuple[float, float] | None = None,
    precision: Literal["no", "bf16", "fp16"] | None = None,
    grad_clip: float | None = None,
    z_loss: float | None = None,
    checkpoint_every: int | None = None,
    on_spike: Literal["log", "skip", "rewind", "stop"] | None = None,
    watch_every: int | None = None,
    activation_checkpointing: bool | None = None,
    compile: bool | None = None,  # noqa: A002 - the option's name
    reset_positions: bool | None = None,
    eval_data: str | Sequence[str] | None = None,
    text_column: str | None = None,
    split: str | None = None,
    token_dtype: Literal["uint16", "uint32"] | None = None,
    skip_bad: bool | None = None,
    bos: Bos | None = None,
    log_with: Sequence[str] | None = None,
    factor: float | None = None,
    positions: bool | None = None,
    replace: bool | None = None,
    untie: bool | None = None,
    part: ModelPart | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = False,
    command: str = "spikepatch.train",
    preparing: Progress = silent,
    progress: Reporter = lambda record: None,
    say: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Train every model at every learning rate and seed on the same batches, and judge whether the losses spike.

    The arguments are the options of ``spikepatch train``, by their names; None is what the command takes where an
    option is not given. ``spikepatch.train(out="runs/x", resume=True)`` goes on with what ``out`` holds, as it began;
    ``steps`` may be more than before, where the schedule of the steps that are done does not depend on it.

    Processes that ``torchrun`` or ``accelerate launch`` has started each call this alike.

    Args:
        models: ``[NAME=]SOURCE[@RECIPE]``.
        data, eval_data: files, globs, data sets; see ``spikepatch.data.documents.inputs``.
        out: the folder of the runs; new, or with ``resume``.
        steps: of the optimiser, in each run.
        lr, multipliers, seeds: a run for each product of the first two and each seed.
        batch_tokens, seq_len, micro_batch: tokens of a step, tokens of a sequence, sequences of a forward pass.
        warmup, schedule: steps (or below 1 a share of all) until the rate is ``lr``, and how it goes on.
        weight_decay, betas, grad_clip, z_loss: of AdamW and of the loss.
        precision, activation_checkpointing, compile: of the forward and the backward pass.
        checkpoint_every, watch_every: steps between checkpoints, and between measurements inside the model; 0: none.
        on_spike: what a flagged step leads to.
        text_column, split, token_dtype, skip_bad, bos, reset_positions: how the data are read and packed.
        log_with: names of accelerate's trackers, such as tensorboard or wandb.
        factor, positions, replace, untie, part: of the recipes, as in ``spikepatch.plan``.
        revision, trust_remote_code: of the models.
        resume: go on with what ``out`` holds.
        command: what is recorded as the command.
        preparing, progress, say: told what is being prepared; each record of a run's log; what one should know.

    Returns:
        The verdict on all runs, which is in ``out/verdict.json`` too.

    Raises:
        BadSource, BadTarget, Refused: what is asked for cannot be done; nothing has been trained.
    """
    from spikepatch.training.runs import run_all

    given: dict[str, Any] = {
        "models": _several(models), "data": _several(data), "steps": steps, "lr": lr, "multipliers": multipliers,
        "seeds": seeds, "batch_tokens": batch_tokens, "seq_len": seq_len, "micro_batch": micro_batch, "warmup": warmup,
        "schedule": schedule, "weight_decay": weight_decay, "betas": betas, "precision": precision,
        "grad_clip": grad_clip, "z_loss": z_loss, "checkpoint_every": checkpoint_every, "on_spike": on_spike,
        "watch_every": watch_every, "activation_checkpointing": activation_checkpointing, "compile": compile,
        "reset_positions": reset_positions, "eval_data": _several(eval_data), "text_column": text_column,
        "split": split, "token_dtype": token_dtype, "skip_bad": skip_bad, "bos": bos, "log_with": log_with,
        "factor": factor, "positions": positions, "replace": replace, "untie": untie, "part": part,
        "revision": revision,
    }  # fmt: skip
    place = target_path(out)
    asked = what_is_asked({name: value for name, value in given.items() if value is not None}, place, resume=resume)
    return run_all(
        asked, place, resume=resume, trust_remote_code=trust_remote_code, command=command, steps=preparing,
        progress=progress, say=say,
    )  # fmt: skip


def what_is_asked(given: Mapping[str, Any], out: Path, *, resume: bool) -> TrainingCommand:
    """All of it: what is given, and the rest by default, or with ``resume`` as ``out`` began.

    Raises:
        Refused: something is missing, or ``steps`` cannot be other ones.
        BadSource: the record in ``out`` cannot be read.
    """
    missing = [_OPTIONS.get(name, f"--{name}") for name in _NEEDED if not given.get(name)]
    if resume and (out / RECORD).exists():
        start = TrainingCommand((), (), Settings(given["steps"]), given["lr"]) if not missing else None
        before = recorded(out, otherwise=start)
        asked = _with(before, given)
        steps = read_record(out)["settings"]["steps"]
        return _checked(_lengthened(before, asked, out) if asked.settings.steps != steps else asked)
    if missing:
        raise Refused(
            what=f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            where=str(out),
            why=f"{out} holds no training that could say" if resume else "a new training needs to be told",
            remedy="spikepatch train MODEL ... --data DATA --out OUT --steps N --lr LR; a training that has begun goes"
            " on by: spikepatch train --resume OUT",
        )
    return _checked(_with(TrainingCommand((), (), Settings(given["steps"]), given["lr"]), given))


def _with(asked: TrainingCommand, given: Mapping[str, Any]) -> TrainingCommand:
    chosen = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    parts: list[dict[str, Any]] = [
        {name: chosen[name] for name in chosen.keys() & names} for names in (_SETTINGS, _READING, _ASKED)
    ]
    options = {name: value for name, value in chosen.items() if name not in _SETTINGS | _READING | _ASKED}
    return dataclasses.replace(
        asked,
        settings=dataclasses.replace(asked.settings, **parts[0]),
        reading=dataclasses.replace(asked.reading, **parts[1]),
        options={**asked.options, **options},
        **parts[2],
    )


def _checked(asked: TrainingCommand) -> TrainingCommand:
    """Of types and in ranges that make sense; the command's options have been held against theirs already.

    Raises:
        Refused: one is not.
    """
    try:
        parsed(TrainingCommand, dataclasses.asdict(asked))
    except TypeError as error:
        raise Refused(
            what="an argument is not of its type",
            where="spikepatch.train",
            why=str(error),
            remedy="see help(spikepatch.train)",
        ) from error
    settings = asked.settings
    least = {
        "steps": 1, "batch_tokens": 1, "seq_len": 2, "micro_batch": 1, "warmup": 0, "weight_decay": 0, "grad_clip": 0,
        "z_loss": 0, "checkpoint_every": 0, "watch_every": 0,
    }  # fmt: skip
    found: list[tuple[str, Any, float, float]] = [
        (name, getattr(settings, name), low, math.inf) for name, low in least.items()
    ]
    found += [("betas", beta, 0, 1) for beta in settings.betas] + [("lr", asked.lr, 1e-300, math.inf)]
    found += [("multipliers", factor, 1e-9, math.inf) for factor in asked.multipliers]
    found += [("lr times multipliers", asked.lr * factor, 1e-300, math.inf) for factor in asked.multipliers]
    found += [("seeds", seed, 0, math.inf) for seed in asked.seeds]
    for name, value, low, below in found:
        if value is not None and not low <= value < below:
            raise Refused(
                what=f"{name} cannot be {value}",
                where="spikepatch.train",
                why=f"it is at least {low:g}, and " + ("finite" if below == math.inf else f"below {below:g}"),
                remedy="give another number",
            )
    return asked


def _lengthened(before: TrainingCommand, asked: TrainingCommand, out: Path) -> TrainingCommand:
    """With more steps, and a warm-up of as many as before."""
    old, new = before.settings, asked.settings

    def refused(why: str) -> Refused:
        return Refused(
            what="--steps cannot be changed to that",
            where=str(out),
            why=why,
            remedy=f"--steps {old.steps}, or leave it out; for another length give a new folder",
        )

    if new.steps < old.steps:
        raise refused(f"it was {old.steps}, and can only be raised: steps that are done are not undone")
    if new.schedule == "cosine":
        raise refused(f"with --schedule cosine the rate of every step depends on it, and it was {old.steps}")
    if new.schedule == "wsd":
        falls = old.steps - round(0.2 * old.steps)
        for name, done in _progress(out).items():
            if done > falls:
                raise refused(f"{name} is at step {done}, and with --schedule wsd the rate falls from step {falls} on")
    settings = dataclasses.replace(new, warmup=float(old.warmup_steps))
    return dataclasses.replace(asked, settings=settings)


def _progress(out: Path) -> dict[str, int]:
    """The last step of every run that has begun."""
    found = {}
    for path in sorted(out.glob("*/*/log.jsonl")):
        if begun(path) and (steps := read(path).kept):
            found[path.parent.relative_to(out).as_posix()] = steps[-1].step
    return found


def _several(value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return (value,) if isinstance(value, str) else None if value is None else tuple(value)
