"""``verify(folder)``: is a converted folder still what was written?

Every file has the SHA-256 that the manifest gives, and lies in the folder; nothing has come in beside them, but for
what git and the Hub put beside a copy; headers and index pass the checks that any source has to pass, every float is
finite, and the manifest has its own digest, and the plan that config.json records. The manifest is taken at its word
otherwise: who can change a file can change the manifest with it, so this finds accidents, not forgeries.

A checkpoint that a trainer has saved of a patched model has no manifest. Of it is verified what can be: config.json's
record of the patch fits the model, the generated code is ours, every tensor of the model is there, and finite.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from spikepatch.apply.disk.manifest import MANIFEST, digest, file_hash
from spikepatch.apply.generated.patched_source import build_as_it_is, check_known
from spikepatch.errors import BadSource, Refused
from spikepatch.plans.plan import Plan
from spikepatch.progress import Progress
from spikepatch.source.checkpoint import read_checkpoint
from spikepatch.source.formats import INDEX_FILE, SINGLE_FILE, foreign_weights, parse_json, some
from spikepatch.source.header import TensorEntry
from spikepatch.source.local import leads_out, local_path, read_file
from spikepatch.source.match import match_source
from spikepatch.source.open import Source, open_source
from spikepatch.source.pieces import nonfinite, raw_pieces

CONFIG = "config.json"

#: What git and the Hub's client put beside a copy; nothing loads it.
_OF_COPIES = (".git", ".gitattributes", ".gitignore", ".cache/huggingface")

#: Of what a Trainer writes beside a model, one is there at least.
_OF_TRAINERS = ("trainer_state.json", "training_args.bin")

#: What a plan and config.json's record of it have in common.
_RECORDED = ("recipe", "reinit", "seed", "no_decay", "embeddings")


@dataclass(frozen=True)
class Verified:
    """A folder that is what was written: how many files, tensors and bytes (of the weights) were compared.

    ``manifest``: it has one; else it is a checkpoint of a patched model, whose files nobody has listed.
    """

    folder: Path
    files: int
    tensors: int
    bytes: int
    manifest: bool = True


def verify(
    folder: str | os.PathLike[str],
    *,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Verified:
    """Compare a folder that ``convert``, ``fold`` or ``save`` wrote with its manifest.

    Args:
        folder: as it was written, or a copy of it; or a checkpoint that a trainer saved of a patched model.
        allow_nonfinite: weights may be NaN or infinite, as ``convert(..., allow_nonfinite=True)`` keeps them.
        progress: told a step's name, how many bytes are done, and how many there are.

    Raises:
        BadSource: the folder has no usable manifest, or is not what was written; everything that differs is named.
    """
    root = local_path(folder)
    if not os.path.lexists(root / MANIFEST) and (trained := _trained(root)) is not None:
        return _verified(trained, allow_nonfinite, progress)
    data = _manifest(root)
    promised: dict[str, str] = data["files"]
    present = [name for name in promised if os.path.isfile(root / name)]
    findings = [f"{name}: {_not_there(root / name)}" for name in promised if name not in present]
    findings += [f"{name}: is a link that leads out of the folder" for name in present if leads_out(root / name, root)]
    findings += [f"{name}: {kind}" for name, kind in _strangers(root, promised).items()]
    findings += _edited(root, data)
    entries: Mapping[str, TensorEntry] = {}
    if {SINGLE_FILE, INDEX_FILE} & promised.keys():
        try:
            entries = read_checkpoint(root).tensors
        except BadSource as error:
            findings.append(error.why if error.why.startswith(tuple(promised)) else f"{error.what} ({error.why})")
    total, done = sum((root / name).stat().st_size for name in present), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("comparing hashes", done, total)

    for name in (name for name in present if not leads_out(root / name, root)):
        within = [entry for entry in entries.values() if entry.file == root / name]
        try:
            digest, unsound = _read(root / name, within, advance)
        except OSError as error:
            findings.append(f"{name}: cannot be read: {error.strerror}")
            continue
        if digest != promised[name]:
            findings.append(f"{name}: is not the file that was written, its SHA-256 differs")
        if unsound and not allow_nonfinite:
            findings.append(f"{name}: holds NaN or infinite values: {some(unsound, 8)}")
    if findings:
        raise BadSource(
            "is not what was written",
            where=str(folder),
            why="; ".join(dict.fromkeys(findings)),
            remedy="convert or copy it again; what training has changed on purpose has no manifest to compare with",
        )
    return Verified(root, len(promised) + 1, len(entries), sum(e.end - e.begin for e in entries.values()))


def _bad(root: Path, what: str, why: str) -> BadSource:
    return BadSource(what, where=str(root), why=why, remedy="give a folder that spikepatch has written")


def _manifest(root: Path) -> dict[str, Any]:
    """The manifest, whose ``files`` are names in the folder -> SHA-256."""
    try:
        data: Any = parse_json(read_file(root / MANIFEST, within=root))
    except OSError as error:
        raise _bad(root, f"has no {MANIFEST}", error.strerror or str(error)) from error
    except ValueError as error:
        raise _bad(root, f"{MANIFEST} is not JSON", str(error)) from error
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(value, str) for value in files.values()):
        raise _bad(root, f"{MANIFEST} is not a manifest", "it has no files with their SHA-256")
    outside = [repr(name) for name in files if set(name) & set("\\\0") or not _plain(PurePosixPath(name))]
    if outside:
        raise _bad(root, f"{MANIFEST} points outside the folder", some(outside))
    return dict(data)


def _edited(root: Path, data: Mapping[str, Any]) -> Iterator[str]:
    """What of the manifest is not as it was written, or not what config.json says."""
    if data.get("sha256") != digest(data):
        yield f"{MANIFEST}: has been edited, its own SHA-256 differs"
    if "plan" not in data:
        return
    try:
        planned = Plan.from_dict(data["plan"]).record("")
    except Refused as error:
        yield f"{MANIFEST}: its plan cannot be read: {error.why}"
        return
    try:
        recorded = parse_json(read_file(root / CONFIG, within=root)).get("spikepatch")
    except (OSError, ValueError, AttributeError):
        return  # named already: another one than was written
    if isinstance(recorded, dict):
        differing = [name for name in _RECORDED if json.loads(json.dumps(planned[name])) != recorded.get(name)]
        yield from (f"{MANIFEST}: its plan and {CONFIG} say another {name}" for name in differing)


def _trained(root: Path) -> Source | None:
    """What transformers' Trainer saved of a patched model, with its headers checked; None where it is none."""
    if not os.path.isfile(root / CONFIG) or not any(os.path.isfile(root / name) for name in _OF_TRAINERS):
        return None
    source = open_source(f"{root}/", weights=True, learned=True)
    return source if source.patched is not None and source.checkpoint is not None else None


def _verified(source: Source, allow_nonfinite: bool, progress: Progress | None) -> Verified:
    """Patch, structure and finiteness of a checkpoint without a manifest."""
    assert source.folder is not None
    assert source.checkpoint is not None
    check_known(source)
    match_source(source, build_as_it_is(source))
    entries = list(source.checkpoint.tensors.values())
    total, done, unsound = sum(entry.end - entry.begin for entry in entries), 0, []
    for entry in entries:
        count = sum(nonfinite(raw, entry.dtype) for raw in raw_pieces(entry))
        done += entry.end - entry.begin
        if progress is not None:
            progress("looking at the values", done, total)
        if count:
            unsound.append(f"{entry.name!r} ({count} values)")
    if unsound and not allow_nonfinite:
        raise BadSource(
            "holds NaN or infinite values",
            where=str(source.folder),
            why=some(unsound, 8),
            remedy="take an earlier checkpoint; or give --allow-nonfinite, if that is known",
        )
    return Verified(source.folder, 0, len(entries), total, manifest=False)


def _not_there(path: Path) -> str:
    return "is missing" if not os.path.lexists(path) else "is no file, or a link to none"


def _plain(path: PurePosixPath) -> bool:
    return not path.is_absolute() and bool(path.parts) and ".." not in path.parts


def _strangers(root: Path, promised: Container[str]) -> dict[str, str]:
    """Every file, at any depth, that the manifest does not name, and links to folders; what it would be taken for."""
    found = {}
    for folder, folders, files in os.walk(root):
        place = Path(folder).relative_to(root)
        folders[:] = sorted(name for name in folders if (place / name).as_posix() not in _OF_COPIES)
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted((*files, *links)):
            path = (place / name).as_posix()
            if path not in promised and path not in (MANIFEST, *_OF_COPIES):
                found[path] = _taken_for(name)
    return found


def _taken_for(name: str) -> str:
    if name.endswith((".py", ".pyc", ".so")):
        return "code that was not written"
    is_weights = name in (SINGLE_FILE, INDEX_FILE) or foreign_weights([name])
    return "weights that were not written" if is_weights else "a file that was not written"


def _read(path: Path, entries: list[TensorEntry], advance: Callable[[int], None]) -> tuple[str, list[str]]:
    """SHA-256 of a file, and its tensors that are not finite; in one pass where its header is known."""
    if not entries:
        digest = file_hash(path)
        advance(path.stat().st_size)
        return digest, []
    with open(path, "rb") as file:
        head = file.read(entries[0].begin)
    hashed, unsound = hashlib.sha256(head), []
    advance(len(head))
    for entry in entries:
        count = 0
        for raw in raw_pieces(entry):
            hashed.update(raw)
            count += nonfinite(raw, entry.dtype)
            advance(len(raw))
        if count:
            unsound.append(f"{entry.name!r} ({count} values)")
    return hashed.hexdigest(), unsound
