"""Checkpoints of a run that appear whole or not at all, whatever kills which process when.

    checkpoints/step-00000500/        torch's distributed checkpoint: weights and optimiser, each rank its shards
                              rank-0.pt ...   random states of each rank
                              state.json      the rest: position, spike detector, log; and a hash of each file
    checkpoints/.step-00001000.new    being written; or left behind by a run that was killed, and swept by the next one
    checkpoints/.step-00000000.old    being deleted
    checkpoints/damaged-step-...      was not as it had been written when the run was to go on from it

All ranks write into the ``.new`` folder; when all of them are done, the first one renames it. A folder of the final
name was complete and on the disk. Whether it still is, its hashes tell when a run is resumed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from spikepatch.apply.disk.atomic import beside, put, remove, sync
from spikepatch.errors import BadSource, BadTarget, Refused, on_one_line
from spikepatch.quiet import quiet
from spikepatch.source.local import opened, read_file
from spikepatch.training.checkpoint_reader import SafeLoadPlanner, SafeReader

#: Debug messages name the steps of the protocol, each just before it is done.
_log = logging.getLogger(__name__)

#: What reading a file raises that is damaged, or another one.
_UNREADABLE = (
    OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, pickle.UnpicklingError,
)  # fmt: skip

#: Checkpoints that stay: the last one, and the one before.
_KEEP = 2


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of ``step``, and delete all but the last two. Called on every rank alike.

    Args:
        folder: of all checkpoints of this run.
        model: with its weights in any placement: whole, replicated by DistributedDataParallel, or sharded.
        optimizer: between two steps, with no gradients around.
        state: JSON; of the first rank.

    Raises:
        BadTarget: it cannot be written; the ones before are still there.
    """
    path = folder / _name(step)
    new = beside(path, "new")
    if _rank() == 0:
        _log.debug("create")
        new.mkdir(parents=True)
    _barrier()
    _log.debug("write")
    try:
        with quiet():
            dcp.save(_tensors(model, optimizer), storage_writer=dcp.FileSystemWriter(new))  # type: ignore[attr-defined]
    except (dcp.CheckpointException, OSError) as error:  # type: ignore[attr-defined]
        raise BadTarget(
            "the checkpoint cannot be written",
            where=str(path),
            why=str(error).strip().splitlines()[-1],
            remedy="free some space on the disk, and go on with --resume",
        ) from error
    _log.debug("write the random states")
    torch.save(_random_states(), new / f"rank-{_rank()}.pt")
    sync(new / f"rank-{_rank()}.pt")
    _barrier()
    hashes = _together(_hashes(new, sorted(found.name for found in new.iterdir())))
    if _rank() == 0:
        _log.debug("write the state")
        whole = {**state, "step": step, "ranks": _ranks(), "files": hashes}
        text = json.dumps({**whole, "sha256": _hash_of(whole)}, allow_nan=False, indent=2)
        (new / "state.json").write_text(text)
        sync(new / "state.json")
        _log.debug("commit")
        put(new, path)
        _log.debug("delete older ones")
        for older in committed(folder)[:-_KEEP]:
            remove(older)
    _barrier()
    return path


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put weights, optimiser and random states back as they were; returns ``state``. Called on every rank alike.

    Raises:
        Refused: another number of processes wrote it.
        BadSource: it is damaged, or of another model.
    """
    try:
        state: dict[str, Any] = json.loads(read_file(path / "state.json"))
        written_by = int(state["ranks"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, f"state.json: {getattr(error, 'strerror', None) or on_one_line(error)}") from error
    if written_by != _ranks():
        raise Refused(
            what="the checkpoint cannot be continued by another number of processes",
            where=str(path),
            why=f"{written_by} wrote it, and this run has {_ranks()}: batches and random numbers would be others",
            remedy=f"start {written_by} processes, or train into a new folder",
        )
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    try:
        with quiet():
            reader = SafeReader(path)
            tensors = _targets(set(reader.read_metadata().state_dict_metadata), model, optimizer)
            dcp.load(tensors, storage_reader=reader, planner=SafeLoadPlanner())  # type: ignore[attr-defined]
    except (dcp.CheckpointException, *_UNREADABLE) as error:  # type: ignore[attr-defined]
        raise damaged(path, str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)) from error
    set_model_state_dict(model, tensors["model"])
    if "optimizer" in tensors:
        # Not strict: what no gradient has reached has no state.
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(model, optimizer, tensors["optimizer"], options=options)
    try:
        with opened(path / f"rank-{_rank()}.pt") as file:
            _set_random_states(torch.load(file, weights_only=True))
    except (RuntimeError, *_UNREADABLE) as error:
        raise damaged(path, f"rank-{_rank()}.pt: {on_one_line(error)}") from error
    return state


def damaged(path: Path, why: str) -> BadSource:
    """The error for a checkpoint that cannot be gone on from."""
    return BadSource(
        "the checkpoint does not fit the model, or is damaged",
        where=str(path),
        why=why,
        remedy="move this checkpoint away, to resume from the one before, or train into a new folder",
    )


def set_aside_damaged(folder: Path) -> list[str]:
    """Rename the last checkpoints until one is as it was written. Called on every rank alike.

    Returns:
        A sentence on each that is not, for people; it is kept, as ``damaged-step-...``.

    Raises:
        BadSource: none of them is: what is there is not to be trained over without being asked.
    """
    damaged_ones: dict[Path, str] = {}
    for path in reversed(_named_as_ours(folder)):
        faults: dict[str, str] = _together(_faults(path))
        if not faults:
            break
        damaged_ones[path] = "; ".join(f"{name} {fault}" for name, fault in sorted(faults.items()))
    else:
        if damaged_ones:
            raise BadSource(
                "no checkpoint of the run is as it was written",
                where=str(folder),
                why="; ".join(f"{path.name}: {why}" for path, why in damaged_ones.items()),
                remedy=f"put a copy of one back; or rm -r {folder}, and the run begins anew at its first step",
            )
    _barrier()
    if _rank() == 0:
        for path in damaged_ones:
            aside = folder / f"damaged-{path.name}"
            if os.path.lexists(aside):
                shutil.rmtree(aside) if aside.is_dir() and not aside.is_symlink() else aside.unlink()
            os.replace(path, aside)
    _barrier()
    return [f"{path}: damaged, and kept as damaged-{path.name} ({why})" for path, why in damaged_ones.items()]


def _faults(path: Path) -> dict[str, str]:
    """What is wrong with a checkpoint: name of a file -> what. Each rank looks at its share of the files."""
    if path.is_symlink() or not path.is_dir():
        return {path.name: "is no folder"}
    try:
        state = json.loads(read_file(path / "state.json"))
        said = state.pop("sha256", None)
        files = {str(name): str(value) for name, value in state["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return {"state.json": f"cannot be read ({getattr(error, 'strerror', None) or on_one_line(error)})"}
    if said != _hash_of(state):
        return {"state.json": "is not as it was written"}
    return {
        name: "is missing" if hashed is None else "is not as it was written"
        for name, hashed in _hashes(path, sorted(files)).items()
        if hashed != files[name]
    }


def _hashes(folder: Path, names: Sequence[str]) -> dict[str, str | None]:
    """SHA-256 of this rank's share of the files; None of one that cannot be read."""
    found: dict[str, str | None] = {}
    for name in names[_rank() :: _ranks()]:
        try:
            with opened(folder / name) as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            found[name] = None
    return found


def _hash_of(state: Mapping[str, Any]) -> str:
    """SHA-256 of JSON, however it is laid out."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(state)), sort_keys=True).encode()).hexdigest()


def _together(found: dict[str, Any]) -> dict[str, Any]:
    """What all ranks have found."""
    if not dist.is_initialized():
        return found
    parts: list[Any] = [None] * _ranks()
    dist.all_gather_object(parts, found)
    return {name: value for part in parts for name, value in part.items()}


def committed(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [path for path in _named_as_ours(folder) if path.is_dir()]


def _named_as_ours(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def latest(folder: Path, *, before: int | None = None) -> Path | None:
    """The last checkpoint; with ``before`` that of an earlier step."""
    found = [path for path in committed(folder) if before is None or _step(path) < before]
    return found[-1] if found else None


def drop(folder: Path, *, after: int) -> None:
    """Delete the checkpoints of later steps, which a rewind has made void. Called on every rank alike."""
    if _rank() == 0:
        for path in committed(folder):
            if _step(path) > after:
                remove(path)
    _barrier()


def sweep(folder: Path) -> None:
    """Delete what killed runs have left behind. Called on every rank alike."""
    if _rank() == 0:
        for path in folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)
    _barrier()


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights, and the optimiser's state where it has any: asked for it before the first step, torch would make one."""
    tensors: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer.state:
        tensors["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return tensors


def _targets(saved: set[str], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the checkpoint is to be read into, in this run's placement: all that it has, and no more."""
    weights = get_model_state_dict(model)
    differing = sorted(_named(saved, "model.") ^ set(weights))
    if differing:
        raise ValueError(f"only one of them has {', '.join(differing[:3])}")
    targets: dict[str, Any] = {"model": weights}
    states = {name.rpartition(".")[0] for name in _named(saved, "optimizer.state.")}
    if states:
        state: Any = get_optimizer_state_dict(model, optimizer)
        targets["optimizer"] = {**state, "state": {name: state["state"][name] for name in states}}
    return targets


def _named(saved: set[str], prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in saved if name.startswith(prefix)}


def _random_states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()  # the legacy generator: what models that draw by numpy use
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(keys)), *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _name(step: int) -> str:
    return f"step-{step:08}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
