"""A plan applied to a checkpoint on disk: which tensor goes into which file, with which value, and whether it did."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from spikepatch.apply.kept import Match
from spikepatch.apply.module import restructure
from spikepatch.apply.tensors import Target, layout, values
from spikepatch.errors import BadSource
from spikepatch.plans import Fill, Plan, Untie
from spikepatch.residual.trace import skeleton
from spikepatch.storage.formats import SINGLE_FILE
from spikepatch.storage.header import DTYPES
from spikepatch.storage.manifest import file_hash
from spikepatch.storage.read import Checkpoint, TensorEntry, read_checkpoint, read_tensor
from spikepatch.storage.write import Planned, split, write_checkpoint, write_text

DEFAULT_SHARD_SIZE = "5GB"


class Progress(Protocol):
    """Told what is going on: a step's name, how much of it is done, how much there is (bytes; 0: not known)."""

    def __call__(self, step: str, done: int = 0, total: int = 0) -> None: ...


@dataclass(frozen=True)
class Shards:
    """What is to be written.

    Attributes:
        tensors: each with the dtype and shape that it gets.
        files: file name -> names of its tensors.
        fills: tensor name -> std, for those drawn at random.
        kept: tensor name -> the source's tensor that it is a copy of.
        produce: tensor name -> its value; Refused where the architecture's own initialiser cannot give one.
    """

    tensors: tuple[Planned, ...]
    files: Mapping[str, Sequence[str]]
    fills: Mapping[str, float]
    kept: Mapping[str, TensorEntry]
    produce: Callable[[str], torch.Tensor]

    @property
    def fresh(self) -> list[str]:
        """Names of the tensors that are neither drawn at random nor kept."""
        return [t.name for t in self.tensors if t.name not in self.fills and t.name not in self.kept]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)


def plan_shards(
    plan: Plan,
    model: nn.Module,
    *,
    checkpoint: Checkpoint | None = None,
    match: Match | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int | None = None,
) -> Shards:
    """Lay out what ``plan`` makes of ``model``. No weight is read or drawn.

    Args:
        model: the source's architecture, parameters on meta in the dtype to store, persistent buffers real.
        checkpoint, match: of the source, where learned weights are kept.
        dtype: asked for; without it kept tensors, and those drawn in their place, have the source's dtype.
        max_shard_size: without it, the source's own shards, and ``DEFAULT_SHARD_SIZE`` for a fresh model.
    """
    twin = skeleton(model)
    restructure(twin, plan)
    targets = {target.name: target for target in layout(twin)}
    originals = {} if match is None else _originals(plan, targets.values(), match)
    tensors = tuple(Planned(n, _dtype(t, originals.get(n), dtype), t.shape) for n, t in targets.items())
    stds = {fill.parameter: fill.std for fill in plan.select(Fill)}
    persistent = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    fresh = values(plan, twin, buffers)
    dtypes = {tensor.name: tensor.dtype for tensor in tensors}

    def produce(name: str) -> torch.Tensor:
        value = fresh(targets[name])
        return (read_tensor(originals[name]) if value is None else value).to(dtypes[name])

    if checkpoint is None or max_shard_size is not None:
        files: Mapping[str, Sequence[str]] = split(tensors, max_shard_size or DEFAULT_SHARD_SIZE)
    else:
        files = as_in(checkpoint, tensors, originals)
    return Shards(
        tensors,
        files,
        fills={name: stds[target.owner] for name, target in targets.items() if target.owner in stds},
        kept={name: entry for name, entry in originals.items() if targets[name].owner not in plan.written},
        produce=produce,
    )


def write_folder(
    folder: Path,
    shards: Shards,
    texts: Mapping[str, str],
    source: Path | None,
    copied: Iterable[Path],
    report: Progress,
) -> dict[str, str]:
    """Write the weights, ``texts`` (file name -> text) and a copy of each file of ``copied``, all below ``source``.

    Returns:
        File name -> SHA-256.
    """
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report("writing weights", done, shards.bytes)

    hashes = write_checkpoint(folder, shards.tensors, shards.files, shards.produce, advance)
    hashes |= {name: write_text(folder / name, text) for name, text in texts.items()}
    for path in copied:
        assert source is not None
        name = path.relative_to(source).as_posix()
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
        hashes[name] = file_hash(folder / name)
    return hashes


def check_shards(folder: Path, shards: Shards) -> None:
    """Re-open what was written: all tensors are there, finite, kept ones equal the source's, drawn ones have their std.

    Raises:
        BadSource: NaN or infinite values, from the source or by overflow of the dtype.
        RuntimeError: anything else is a bug of ours.
    """
    written = read_checkpoint(folder).tensors
    expected = {t.name: (t.shape, t.dtype) for t in shards.tensors}
    present = {name: (e.shape, getattr(torch, DTYPES[e.dtype][0])) for name, e in written.items()}
    if present != expected:
        differing = sorted(n for n in present.keys() | expected.keys() if present.get(n) != expected.get(n))
        raise RuntimeError(f"tensors were not written as planned: {', '.join(differing[:5])}")
    for name, entry in written.items():
        value, original = read_tensor(entry), shards.kept.get(name)
        kept = read_tensor(original) if original is not None else None
        if not _finite(value):
            unsound = original is not None and kept is not None and not _finite(kept)
            raise BadSource(
                f"{name} holds NaN or infinite values",
                where=str(original.file) if original is not None else name,
                why="the source's weights are not finite" if unsound else f"a value is too large for {value.dtype}",
                remedy="use a sound checkpoint; --reinit all does not need it" if unsound else "choose a wider --dtype",
            )
        if kept is not None and not torch.equal(value, kept.to(value.dtype)):
            raise RuntimeError(f"{name} was to be kept, and differs from the source's")
        if name in shards.fills:
            _check_fill(name, value, shards.fills[name])


def _originals(plan: Plan, targets: Iterable[Target], match: Match) -> dict[str, TensorEntry]:
    """Tensor name -> the source's tensor in its place; an untied head starts as the embedding."""
    copies = {edit.head: edit.embedding for edit in plan.select(Untie)}
    found = {}
    for target in targets:
        entry = match.targets.get(target.name) or match.owners.get(copies.get(target.owner, ""))
        if entry is not None:
            found[target.name] = entry
    return found


def _dtype(target: Target, original: TensorEntry | None, asked: torch.dtype | None) -> torch.dtype:
    if original is None or asked is not None or not target.dtype.is_floating_point:
        return target.dtype
    dtype: torch.dtype = getattr(torch, DTYPES[original.dtype][0])
    return dtype


def as_in(
    checkpoint: Checkpoint, tensors: Sequence[Planned], originals: Mapping[str, TensorEntry]
) -> dict[str, list[str]]:
    """Each tensor in the file that it has in the source; what is new, in the last one."""
    files: dict[str, list[str]] = {shard: [] for shard in checkpoint.shards}
    for tensor in tensors:
        entry = originals.get(tensor.name)
        files[entry.file.name if entry is not None else checkpoint.shards[-1]].append(tensor.name)
    used = {file: names for file, names in files.items() if names}
    if len(used) == 1:  # it gets no index, without which transformers looks for this name only
        return {SINGLE_FILE: [tensor.name for tensor in tensors]}
    return used


def _finite(tensor: torch.Tensor) -> bool:
    """``isfinite(...).all()``, a hundred times as fast on two-byte floats: the extremes of a NaN are NaN."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor))


def _check_fill(name: str, value: torch.Tensor, std: float) -> None:
    """Mean and std within 7 standard errors, and the rounding of the dtype."""
    if value.numel() < 1000:
        return
    slack = 7 / math.sqrt(value.numel()) + torch.finfo(value.dtype).eps
    found, mean = (float(x) for x in torch.std_mean(value.float()))
    if abs(mean) > slack * std or abs(found / std - 1) > slack:
        raise RuntimeError(f"{name} was drawn with std {found:g} and mean {mean:g}, planned were {std:g} and 0")
