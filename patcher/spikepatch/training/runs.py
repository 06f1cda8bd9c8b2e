"""All runs of one command: every model at every learning rate and seed, on identical batches, and the verdict on them.

OUT/run.json                            what is run: settings, models, data, versions, the exact commands
OUT/data/                               tokens
OUT/NAME/lr5e-4-seed0/log.jsonl         checkpoints/    model/ (the trained model)    result.json (once it is done)
OUT/verdict.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from accelerate.utils import broadcast_object_list
from torch import nn

from spikepatch.apply.live.save import pretrained, save, sharded
from spikepatch.errors import BadTarget, Refused
from spikepatch.progress import Progress, silent
from spikepatch.recipes.request import Options
from spikepatch.residual.points import Points, points_of
from spikepatch.source.open import Source
from spikepatch.source.tokenizer import has_tokenizer, source_tokenizer
from spikepatch.spikes.conclusion import LEAST_ROWS
from spikepatch.training import checkpoints
from spikepatch.training.batches import Tokens, check_enough, prepare
from spikepatch.training.entries import Entry, build, check_causal, parse_entries, split, tokenizer_of
from spikepatch.training.folder import DATA, RECORD, check_out, held, recorded_commits, write_json, write_record
from spikepatch.training.launch import Launch, launched
from spikepatch.training.log import Reporter, read
from spikepatch.training.loop import train
from spikepatch.training.run_identity import Run, all_runs
from spikepatch.training.settings import Settings
from spikepatch.training.tokenizing import BYTES, Tokenizing
from spikepatch.training.trackers import check_installed, tracking
from spikepatch.training.verdict import Verdict, compared, judge_run, rows_of, summarise


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
    steps: Progress = silent,
    progress: Reporter = lambda record: None,
    say: Callable[[str], None] = lambda text: None,
    **options: Unpack[Options],
) -> Verdict:
    """Train every model at every learning rate and seed, one after the other. Called on every process alike.

    Args:
        models: as ``entries.parse_entries`` reads them.
        data, eval_data: as ``data.prepare`` reads them.
        lr, multipliers: a run's learning rate is one times the other.
        log_with: names of ``trackers.TRACKERS``.
        resume: go on with what ``out`` holds; runs that are done are not run again.
        revision, trust_remote_code: of the models. A training stays with the commits that it began with.
        command: the command line, to be recorded.
        steps, progress, say: told what is being prepared; each record of a run's log; and what the user should know. Of
            one process only.
        options: of the models' recipes.

    Raises:
        SpikepatchError: the input cannot be used; or ``out`` holds something, without ``resume``; or with it, something
            else.
    """
    check_installed(log_with)
    with launched(settings) as launch, contextlib.ExitStack() as stack:
        main = launch.accelerator.is_main_process
        check_out(out, resume=resume, sources=[split(model)[1] for model in models])
        launch.accelerator.wait_for_everyone()
        if main:
            stack.enter_context(held(out))
            for note in launch.notes:
                say(note)
        quiet_steps: Progress = steps if main else silent
        quiet_steps("reading the models")
        parse = partial(parse_entries, models, trust_remote_code=trust_remote_code, **options)
        entries = _of_one_commit(partial(parse, revision=revision), recorded_commits(out) if resume else {})
        wanted: dict[str, Any] = {
            "settings": dataclasses.asdict(settings),
            "lr": lr, "multipliers": multipliers, "seeds": seeds,
            "models": {entry.name: _recorded(entry) for entry in entries}, "revision": revision,
        }  # fmt: skip
        runs = tuple(all_runs(wanted))
        _check_apart([run.folder for run in runs])
        _check_models(entries, settings)
        tokenizing = tokenizer_of(entries)
        tokens = prepare(data, tokenizing, out / DATA, eval_data=eval_data, progress=quiet_steps)
        check_enough(tokens, sequences=settings.sequences, length=settings.seq_len)
        if main:
            for note in _notes(tokens, tokenizing, settings):
                say(note)
        wanted |= {
            "data": {"files": data, "evaluation": eval_data, "tokens": tokens.count, "fingerprint": tokens.fingerprint},
            "ranks": launch.accelerator.num_processes, "sharded": launch.shard,
        }  # fmt: skip
        if main:
            write_record(out, wanted, command)
        launch.accelerator.wait_for_everyone()

        results, curves, points = [], [], dict[str, Points]()
        by_name = {entry.name: entry for entry in entries}
        for run in runs:
            folder, entry = out / run.folder, by_name[run.name]
            if (folder / "result.json").exists():
                if main:
                    progress({"type": "run", **dataclasses.asdict(read(folder / "log.jsonl").run)})
            else:
                quiet_steps(f"building {run.name}")
                model = build(entry, seed=run.seed)
                if run.name not in points:
                    check_causal(model, run.source, settings.seq_len)
                    needed = settings.watch_every or launch.shard
                    points[run.name] = points_of(model) if needed else Points((), (), 0)
                _run(
                    run, entry.source, model, tokens, settings, folder, launch, points[run.name], log_with, command,
                    progress,
                )  # fmt: skip
                del model
            launch.accelerator.wait_for_everyone()
            log = read(folder / "log.jsonl")
            results.append(judge_run(log))
            curves.append(rows_of(log))
            if main:
                write_json(folder / "result.json", results[-1].to_dict())
        verdict = summarise(compared(results, curves))
        if main:
            write_json(out / "verdict.json", verdict.to_dict())
        return verdict


def _of_one_commit(parse: Callable[..., tuple[Entry, ...]], known: Mapping[str, str | None]) -> tuple[Entry, ...]:
    """The models, every source at the commit that the first process has found, or that a training began with: a branch
    may move between two openings.
    """
    entries = parse(commits=known)
    here = {entry.model.source: entry.source.commit for entry in entries}
    (first,) = broadcast_object_list([here])
    return entries if first == here else parse(commits=first)


def _recorded(entry: Entry) -> dict[str, Any]:
    """What ``run.json`` says of a model. The config's digest: a folder may have been changed since."""
    source = entry.source
    config = json.dumps(source.config.to_dict(), sort_keys=True, default=str).encode()
    about = {"commit": source.commit, "config": hashlib.sha256(config).hexdigest()[:16]}
    return dataclasses.asdict(entry.model) | about | (entry.request.options if entry.request else {})


def _check_apart(folders: Sequence[str]) -> None:
    """Every run has a folder of its own."""
    twice = sorted({folder for folder in folders if folders.count(folder) > 1})
    if twice:
        raise Refused(
            what="two runs would be the same",
            where="learning rates and seeds",
            why=f"{', '.join(twice[:3])} would be trained twice",
            remedy="give every learning rate and every seed once",
        )


def _notes(tokens: Tokens, tokenizing: Tokenizing, settings: Settings) -> Iterator[str]:
    """What there is to train on, and whether it is enough for a verdict."""
    means = f"{tokenizing.name}, since no model has a tokenizer" if tokenizing.name == BYTES else tokenizing.name
    yield (
        f"{tokens.count:,} tokens of {tokens.documents:,} document{'' if tokens.documents == 1 else 's'} ({means});"
        f" {tokens.held_out:,} of them are held out for evaluation"
    )
    after = settings.steps - settings.warmup_steps
    if after < LEAST_ROWS:
        yield f"{after} steps after warm-up will be too few to tell: {LEAST_ROWS} are needed for a verdict"


def _run(
    run: Run,
    source: Source,
    model: nn.Module,
    tokens: Tokens,
    settings: Settings,
    folder: Path,
    launch: Launch,
    points: Points,
    log_with: Sequence[str],
    command: str,
    progress: Reporter,
) -> None:
    """Train, and write the trained model to ``folder/model``: one that was stopped before its last step has none."""
    main = launch.accelerator.is_main_process
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.sweep(folder / "checkpoints")
    versions = json.loads((folder.parents[1] / RECORD).read_text())["versions"]
    about = {
        **dataclasses.asdict(run), "steps": settings.steps,
        "parameters": sum(p.numel() for p in model.parameters()), "versions": versions, "command": command,
    }  # fmt: skip
    try:
        with tracking(log_with if main else (), run.folder, folder, about) as track:

            def observe(record: Mapping[str, Any]) -> None:
                progress(record)
                track(record)

            stop = train(
                model, tokens, settings, folder, accelerator=launch.accelerator, lr=run.lr, seed=run.seed, about=about,
                points=points, shard=launch.shard, progress=observe,
            )  # fmt: skip
        if stop is None:
            _save(model, folder / "model", source, main)
    except OSError as error:
        raise BadTarget(
            "the run cannot be written",
            where=str(folder),
            why=str(error),
            remedy="check the disk's free space and the folder's permissions, and go on with --resume",
        ) from error
    launch.accelerator.free_memory()


def _save(model: nn.Module, out: Path, source: Source, main: bool) -> None:
    """The trained model with its tokenizer, and with the plan that it was patched by; gathered if it is sharded."""
    if not main and not sharded(model):
        return
    files = {path.relative_to(source.folder).as_posix(): path for path in source.copied_files if source.folder}
    original = source_tokenizer(source) if has_tokenizer(source.copied_files) else None
    tokenizer = None if isinstance(original, str) else original
    if hasattr(model, "_spikepatch_plan"):
        save(model, out, files=files, tokenizer=tokenizer, overwrite=True)
    else:
        with pretrained(model, out, files=files, tokenizer=tokenizer, overwrite=True):
            pass


def _check_models(entries: Sequence[Entry], settings: Settings) -> None:
    for source in (entry.source for entry in entries):
        longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and longest < settings.seq_len:
            raise Refused(
                what=f"sequences of {settings.seq_len} tokens are too long for the model",
                where=source.name,
                why=f"its config has {longest} positions",
                remedy=f"--seq-len {longest}, or less",
            )
        if settings.activation_checkpointing and not source.model_class.supports_gradient_checkpointing:
            raise Refused(
                what="its activations cannot be recomputed",
                where=source.name,
                why=f"{source.model_class.__name__} does not support it",
                remedy="leave --activation-checkpointing out",
            )
