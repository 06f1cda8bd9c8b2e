"""All runs of one command: every model at every learning rate and seed, on identical batches, and the verdict on them.

OUT/run.json                            what is run: settings, models, data, versions, the exact commands
OUT/data/                               tokens
OUT/NAME/lr5e-4-seed0/log.jsonl         checkpoints/    model/ (the trained model)    result.json (once it is done)
OUT/verdict.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn

from spikepatch.apply.live.save import pretrained, save, sharded
from spikepatch.data.tokenizing import BYTES
from spikepatch.errors import BadTarget, Refused
from spikepatch.progress import Progress, silent
from spikepatch.residual.points import Points, points_of
from spikepatch.source.open import Source
from spikepatch.source.tokenizer import has_tokenizer, source_tokenizer
from spikepatch.spikes.conclusion import LEAST_ROWS
from spikepatch.training import checkpoints
from spikepatch.training.batches import check_enough
from spikepatch.training.entries import Entry, build, check_causal, parse_entries, split, tokenizer_of
from spikepatch.training.folder import DATA, RECORD, check_out, check_places, held, write_json
from spikepatch.training.going_on import check_record, recorded_commits, write_record
from spikepatch.training.launch import Launch, launched
from spikepatch.training.log import Reporter, begun, read
from spikepatch.training.loop import train
from spikepatch.training.resets import check_boundaries, check_resets
from spikepatch.training.run_identity import Run, all_runs
from spikepatch.training.settings import Settings, TrainingCommand
from spikepatch.training.tokens import Tokens, prepare
from spikepatch.training.trackers import check_installed, tracking
from spikepatch.training.verdict import Verdict, compared, judge_run, rows_of, summarise


def run_all(
    asked: TrainingCommand,
    out: Path,
    *,
    resume: bool = False,
    trust_remote_code: bool = False,
    command: str = "",
    steps: Progress = silent,
    progress: Reporter = lambda record: None,
    say: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Train every model at every learning rate and seed, one after the other. Called on every process alike.

    Args:
        resume: go on with what ``out`` holds; runs that are done are not run again.
        trust_remote_code: of the models. A training stays with the commits that it began with.
        command: the command line, to be recorded.
        steps, progress, say: told what is being prepared; each record of a run's log; and what the user should know. Of
            one process only.

    Raises:
        SpikepatchError: the input cannot be used; or ``out`` holds something, without ``resume``; or with it, something
            else.
    """
    settings = asked.settings
    check_installed(asked.log_with)
    with launched(settings) as launch, contextlib.ExitStack() as stack:
        main = launch.accelerator.is_main_process
        check_out(out, resume=resume, sources=[split(model)[1] for model in asked.models])
        launch.accelerator.wait_for_everyone()
        told = say if main else lambda text: None
        if main:
            stack.enter_context(held(out))
        for note in launch.notes:
            told(note)
        quiet_steps: Progress = steps if main else silent
        quiet_steps("reading the models")
        parse = partial(parse_entries, asked.models, trust_remote_code=trust_remote_code, **asked.options)
        entries = _of_one_commit(partial(parse, revision=asked.revision), recorded_commits(out) if resume else {})
        wanted: dict[str, Any] = {
            "settings": dataclasses.asdict(settings),
            "lr": asked.lr, "multipliers": asked.multipliers, "seeds": asked.seeds,
            "models": {entry.name: _recorded(entry) for entry in entries}, "revision": asked.revision,
            "ranks": launch.accelerator.num_processes, "sharded": launch.shard,
            "reading": dataclasses.asdict(asked.reading), "bos": asked.bos,
        }  # fmt: skip
        runs = tuple(all_runs(wanted))
        _check_apart([run.folder for run in runs])
        _check_models(entries, settings)
        check_places(out, [run.folder for run in runs])
        if resume:
            check_record(out, wanted)
        tokens = prepare(
            asked.data, lambda text: tokenizer_of(entries, for_text=text), out / DATA, eval_data=asked.eval_data,
            reading=asked.reading, bos=asked.bos, progress=quiet_steps, say=told,
        )  # fmt: skip
        check_enough(tokens, sequences=settings.sequences, length=settings.seq_len)
        check_boundaries(tokens, settings)
        for note in _notes(tokens, settings):
            told(note)
        wanted["data"] = {
            "files": asked.data, "evaluation": asked.eval_data, "tokens": tokens.count,
            "fingerprint": tokens.fingerprint,
        }  # fmt: skip
        if main:
            write_record(out, wanted, asked, command, told)
        launch.accelerator.wait_for_everyone()

        results, curves, points = [], [], dict[str, Points]()
        by_name = {entry.name: entry for entry in entries}
        for run in runs:
            folder, entry = out / run.folder, by_name[run.name]
            if _is_done(folder, settings):
                if main:
                    progress({"type": "run", **dataclasses.asdict(read(folder / "log.jsonl").run)})
            else:
                quiet_steps(f"building {run.name}")
                model = build(entry, seed=run.seed)
                if run.name not in points:
                    check_causal(model, run.source, settings.seq_len)
                    if settings.reset_positions:
                        check_resets(model, run.source, settings.seq_len)
                    needed = settings.watch_every or launch.shard
                    points[run.name] = points_of(model) if needed else Points((), (), 0)
                _run(
                    run, entry.source, model, tokens, settings, folder, launch, points[run.name], asked.log_with,
                    command, progress, told,
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


def _is_done(folder: Path, settings: Settings) -> bool:
    """It has ended, and not before the last step that is asked for; or for good."""
    if not (folder / "result.json").exists() or not begun(folder / "log.jsonl"):
        return False
    log = read(folder / "log.jsonl")
    return log.stop is not None or (bool(log.evals) and log.run.steps >= settings.steps)


def _notes(tokens: Tokens, settings: Settings) -> Iterator[str]:
    """What there is to train on, and whether it is enough for a verdict."""
    means = f"{BYTES}, since no model has a tokenizer" if tokens.tokenizer == BYTES else tokens.tokenizer
    if tokens.left_out:
        yield f"{tokens.left_out:,} rows without a document are left out, as --skip-bad says"
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
    say: Callable[[str], None],
) -> None:
    """Train, and write the trained model to ``folder/model``: one that was stopped before its last step has none."""
    main = launch.accelerator.is_main_process
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.sweep(folder / "checkpoints")
    for note in checkpoints.set_aside_damaged(folder / "checkpoints"):
        say(note)
    versions = json.loads((folder.parents[1] / RECORD).read_text())["versions"]
    about = {
        **dataclasses.asdict(run), "steps": settings.steps,
        "parameters": sum(p.numel() for p in model.parameters()), "versions": versions, "command": command,
    }  # fmt: skip
    try:
        with tracking(launch.accelerator, log_with if main else (), run.folder, folder, about) as track:

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
        raise _unwritable(folder, error) from error
    launch.accelerator.free_memory()


def _unwritable(folder: Path, error: OSError) -> BadTarget:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "free some space on the disk"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "correct the permissions"
    else:
        remedy = f"move away what is in the way there, if it is none of the run's: {error.filename or folder}"
    return BadTarget(
        "the run cannot be written",
        where=str(folder),
        why=str(error),
        remedy=f"{remedy}, and go on with: spikepatch train --resume {folder.parents[1]}",
    )


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
