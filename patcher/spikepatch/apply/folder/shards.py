"""A plan applied to a checkpoint on disk: which tensor goes into which file, with which value, and whether it did."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spikepatch.apply.disk.manifest import file_hash, fingerprint
from spikepatch.apply.disk.pipeline import Tally
from spikepatch.apply.disk.write import Planned, Written, split, write_checkpoint, write_text
from spikepatch.apply.values.assign import values
from spikepatch.apply.values.draw import draw
from spikepatch.errors import BadSource
from spikepatch.plans.plan import Fill, Plan, Untie, ValueEdit
from spikepatch.progress import Progress
from spikepatch.source.checkpoint import Checkpoint, check_unchanged, read_checkpoint
from spikepatch.source.formats import SINGLE_FILE, some
from spikepatch.source.header import TensorEntry, torch_dtype
from spikepatch.source.layout import Target, check_covered, layout, persistent
from spikepatch.source.match import Match
from spikepatch.source.meta import skeleton
from spikepatch.source.tokenizer import has_tokenizer, refit, source_tokenizer

if TYPE_CHECKING:
    from spikepatch.apply.disk.pipeline import Content
    from spikepatch.source.open import Source

DEFAULT_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Shards:
    """What is to be written.

    Attributes:
        tensors: each with the dtype and shape that it gets.
        files: file name -> names of its tensors.
        fills: tensor name -> std, for those drawn at random.
        kept: tensor name -> the source's tensor that it is a copy of.
        produce: tensor name -> what it is to hold; Refused where no code of the model's tells it.
    """

    tensors: tuple[Planned, ...]
    files: Mapping[str, Sequence[str]]
    fills: Mapping[str, float]
    kept: Mapping[str, TensorEntry]
    produce: Callable[[str], Content]

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
    patched: nn.Module,
    *,
    checkpoint: Checkpoint | None = None,
    match: Match | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int | None = None,
) -> Shards:
    """Lay out what ``plan`` writes. No weight is read or drawn.

    Args:
        patched: the source's architecture with the plan's changes of structure, parameters on meta in the dtype to
            store, persistent buffers real.
        checkpoint, match: of the source, where learned weights are kept.
        dtype: asked for; without it kept tensors, and those drawn in their place, have the source's dtype.
        max_shard_size: without it, the source's own shards, and ``DEFAULT_SHARD_SIZE`` for a fresh model.
    """
    twin = skeleton(patched)
    targets = {target.name: target for target in layout(twin)}
    originals = {} if match is None else _originals(plan, targets.values(), match)
    tensors = tuple(Planned(n, _dtype(t, originals.get(n), dtype), t.shape) for n, t in targets.items())
    check_covered(plan.written, twin, targets.values(), every=plan.reinit == "all")
    by_owner: dict[str, ValueEdit] = {edit.parameter: edit for edit in plan.select(ValueEdit)}
    edits = {name: by_owner[target.owner] for name, target in targets.items() if target.owner in by_owner}
    keeps = frozenset(plan.kept) if plan.reinit == "all" else None
    fresh = values(plan, twin, patched, persistent(patched, dict(patched.named_buffers())))

    def produce(name: str) -> Content:
        edit = edits.get(name)
        if edit is not None:
            return partial(draw, edit, plan.seed, name)
        value = fresh(targets[name])
        return originals[name] if value is None else value

    if checkpoint is None or max_shard_size is not None:
        files: Mapping[str, Sequence[str]] = split(tensors, max_shard_size or DEFAULT_SHARD_SIZE)
    else:
        files = as_in(checkpoint, tensors, originals)
    return Shards(
        tensors,
        files,
        fills={name: edit.std for name, edit in edits.items() if isinstance(edit, Fill)},
        kept={
            name: entry
            for name, entry in originals.items()
            if name not in edits and (keeps is None or targets[name].owner in keeps)
        },
        produce=produce,
    )


def write_folder(
    folder: Path,
    shards: Shards,
    texts: Mapping[str, str],
    source: Source,
    report: Progress,
    *,
    allow_nonfinite: bool,
) -> tuple[Written, dict[str, Any]]:
    """Write the weights, ``texts`` (file name -> text) and a copy of what is taken over from ``source``; then check it.

    Returns:
        What was written, and the fingerprint of the source, which was the same all the while.

    Raises:
        BadSource: see ``check_shards``; or the source has changed meanwhile.
        RuntimeError: see ``check_shards``.
    """
    with source.arriving():
        written = _write(folder, shards, texts, source, report)
    report("checking what was written")
    check_shards(folder, shards, written, allow_nonfinite=allow_nonfinite)
    origin = fingerprint(source, written.copies)
    if source.checkpoint is not None:
        check_unchanged(source.checkpoint)
    return written, origin


def _write(folder: Path, shards: Shards, texts: Mapping[str, str], source: Source, report: Progress) -> Written:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report("writing weights", done, shards.bytes)

    hashes = {name: write_text(folder / name, text) for name, text in texts.items()}
    for path in source.copied_files:
        assert source.folder is not None
        name = path.relative_to(source.folder).as_posix()
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
        hashes[name] = file_hash(folder / name)
    notes = []
    if has_tokenizer(source.copied_files):
        report("comparing the tokenizers")
        original = source_tokenizer(source)
        if isinstance(original, str):
            notes.append(f"tokenizer: {original}; its files are copied as they are")
        else:
            hashes |= {name: file_hash(folder / name) for name in refit(original, folder)}
    written = write_checkpoint(folder, shards.tensors, shards.files, shards.produce, advance)
    return written.plus(Written(hashes, notes=tuple(notes)))


def check_shards(folder: Path, shards: Shards, written: Written, *, allow_nonfinite: bool) -> None:
    """Compare what was written with what was planned: headers, finite values, and the std of what was drawn.

    Raises:
        BadSource: NaN or infinite values, from the source (unless they are allowed) or by overflow of the dtype; all
            tensors are named.
        RuntimeError: anything else is a bug of ours.
    """
    expected = {t.name: (t.shape, t.dtype) for t in shards.tensors}
    entries = read_checkpoint(folder).tensors
    present = {name: (e.shape, torch_dtype(e.dtype)) for name, e in entries.items()}
    if present != expected:
        differing = sorted(n for n in present.keys() | expected.keys() if present.get(n) != expected.get(n))
        raise RuntimeError(f"tensors were not written as planned: {', '.join(differing[:5])}")
    if left := [tensor.name for tensor in shards.tensors if tensor.elements and tensor.name not in written.tallies]:
        raise RuntimeError(f"tensors were not written: {', '.join(left[:5])}")
    _check_finite(shards, written, allow_nonfinite)
    for tensor in shards.tensors:
        if tensor.name in shards.fills:
            _check_fill(tensor, written.tallies.get(tensor.name, Tally()), shards.fills[tensor.name])


def _check_finite(shards: Shards, written: Written, allowed: bool) -> None:
    unsound, overflown = [], []
    for tensor in shards.tensors:
        found = written.tallies.get(tensor.name, Tally())
        if found.overflow or (found.nonfinite and tensor.name not in shards.kept):
            dtype = str(tensor.dtype).removeprefix("torch.")
            overflown.append(f"{tensor.name} ({found.nonfinite} of {tensor.elements} in {dtype})")
        elif found.nonfinite and not allowed:
            unsound.append(f"{tensor.name} ({found.nonfinite} of {tensor.elements})")
    if not unsound and not overflown:
        return
    names = [item.partition(" (")[0] for item in (*unsound, *overflown)]
    why = [f"the source's weights are not finite: {some(unsound, 8)}"] * bool(unsound)
    why += [f"values are too large for the dtype: {some(overflown, 8)}"] * bool(overflown)
    remedy = ["use a sound checkpoint; or keep them with --allow-nonfinite; convert has --reinit all"] * bool(unsound)
    remedy += ["choose a wider dtype; convert has --dtype"] * bool(overflown)
    file = next((str(shards.kept[name].file) for name in names if name in shards.kept), names[0])
    raise BadSource(
        f"{names[0]} holds NaN or infinite values" if len(names) == 1 else f"{len(names)} tensors hold NaN or infinity",
        where=file,
        why="; ".join(why),
        remedy="; ".join(remedy),
    )


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
    return torch_dtype(original.dtype)


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


def _check_fill(tensor: Planned, found: Tally, std: float) -> None:
    """Mean and std within 7 standard errors, and the rounding of the dtype."""
    count = tensor.elements
    if count < 1000:
        return
    slack = 7 / math.sqrt(count) + torch.finfo(tensor.dtype).eps
    mean = found.total / count
    actual = math.sqrt(max(found.squares / count - mean**2, 0.0))
    if abs(mean) > slack * std or abs(actual / std - 1) > slack:
        raise RuntimeError(f"{tensor.name} was drawn with std {actual:g} and mean {mean:g}, planned were {std:g} and 0")
