"""All runs of one command: every model at every learning rate and seed, on identical batches, and the verdict on them.

    OUT/run.json                            what is run: settings, models, data, versions, the exact command
    OUT/data/                               tokens
    OUT/NAME/lr5e-4-seed0/log.jsonl         checkpoints/    model/ (the trained model)    result.json (once it is done)
    OUT/verdict.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import get_available_trackers
from torch import nn

from spikepatch import __version__
from spikepatch.apply.module import save
from spikepatch.errors import BadTarget, Refused
from spikepatch.quiet import quiet
from spikepatch.source import open_source
from spikepatch.storage.publish import publishing
from spikepatch.storage.write import sync, write_text
from spikepatch.training import checkpoints
from spikepatch.training.data import Tokens, check_enough, prepare
from spikepatch.training.entries import Entry, build, parse_entries, tokenizer_of
from spikepatch.training.log import read
from spikepatch.training.loop import Progress, Settings, train
from spikepatch.training.verdict import Verdict, judge, summarise
from spikepatch.training.watch import Points, points_of

if TYPE_CHECKING:
    from spikepatch.apply.shards import Progress as Steps


@dataclass(frozen=True)
class Run:
    """One model at one learning rate and seed."""

    entry: Entry
    multiplier: float
    lr: float
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.entry.name}/lr{short(self.lr)}-seed{self.seed}"


def run_all(
    models: Sequence[str],
    data: Sequence[str],
    out: Path,
    settings: Settings,
    *,
    lr: float,
    multipliers: Sequence[float] = (1.0,),
    seeds: Sequence[int] = (0,),
    eval_data: Sequence[str] = (),
    log_with: Sequence[str] = (),
    resume: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    command: str = "",
    steps: Steps = lambda step, done=0, total=0: None,
    progress: Progress = lambda record: None,
    say: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Train every model at every learning rate and seed, one after the other. Called on every rank alike.

    Args:
        models: as ``entries.parse_entries`` reads them.
        data, eval_data: as ``data.prepare`` reads them.
        lr, multipliers: a run's learning rate is one times the other.
        resume: go on with what ``out`` holds; runs that are done are not run again.
        command: the command line, to be recorded.
        steps, progress, say: what is being prepared; each record of a run's log; and what the user should know. On the
            main process only.

    Raises:
        SpikepatchError: the input cannot be used; or ``out`` holds something, without ``resume``; or with it, something
            else.
    """
    access: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    accelerator, shard, notes = start(settings, log_with, out)
    main = accelerator.is_main_process
    if main:
        for note in notes:
            say(note)
    check(settings, accelerator, shard)
    check_folder(out, resume)
    steps("reading the models")
    entries = parse_entries(models, **access)
    tokens = prepare(data, tokenizer_of(entries, **access), out / "data", eval_data=eval_data, progress=steps)
    check_enough(tokens, sequences=settings.sequences, length=settings.seq_len)
    runs = [Run(e, m, lr * m, seed) for m in multipliers for seed in seeds for e in entries]
    wanted = {
        "settings": dataclasses.asdict(settings),
        "lr": lr, "multipliers": list(multipliers), "seeds": list(seeds),
        "models": {e.name: {**dataclasses.asdict(e), "config": config_of(e, access)} for e in entries},
        "data": {"given": list(data), "evaluation": list(eval_data), "tokens": tokens.count, "fingerprint": tokens.fingerprint},
        "ranks": accelerator.num_processes, "sharded": shard,
    }  # fmt: skip
    check_length(entries, settings, access)
    if main:
        record(out, wanted, command)
    accelerator.wait_for_everyone()

    results, points = [], dict[str, Points]()
    for run in runs:
        folder = out / run.folder
        if not (folder / "result.json").exists():
            steps(f"building {run.entry.name}")
            model = build(run.entry, seed=run.seed, **access)
            if run.entry.name not in points:
                points[run.entry.name] = points_of(model)
            one(run, model, tokens, settings, folder, accelerator, points[run.entry.name], shard, command, access, progress)
            del model
            accelerator.free_memory()
        results.append(judge(read(folder / "log.jsonl")))
        if main:
            write_json(folder / "result.json", results[-1].to_dict())
    verdict = summarise(results)
    if main:
        write_json(out / "verdict.json", verdict.to_dict())
    accelerator.wait_for_everyone()
    return verdict


def one(
    run: Run,
    model: nn.Module,
    tokens: Tokens,
    settings: Settings,
    folder: Path,
    accelerator: Accelerator,
    points: Points,
    shard: bool,
    command: str,
    access: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Train, and write the trained model to ``folder/model``: one that was stopped before its last step has none."""
    main = accelerator.is_main_process
    if main:
        folder.mkdir(parents=True, exist_ok=True)
    checkpoints.sweep(folder / "checkpoints")
    about = {
        **dataclasses.asdict(run.entry),
        "lr": run.lr, "multiplier": run.multiplier, "seed": run.seed, "steps": settings.steps,
        "parameters": sum(p.numel() for p in model.parameters()), "versions": versions(), "command": command,
    }  # fmt: skip
    with tracked(accelerator, run.folder, about, progress) as observe:
        train(
            model, tokens, settings, folder, accelerator=accelerator, lr=run.lr, seed=run.seed, about=about,
            points=points, shard=shard, resume=True, progress=observe,
        )  # fmt: skip
    if read(folder / "log.jsonl").stop is None:
        source = open_source(run.entry.source, **access, weights=False)
        save_trained(model, folder / "model", source.copied_files, main)
    accelerator.wait_for_everyone()
