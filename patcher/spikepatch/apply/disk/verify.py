"""``verify(folder)``: is a converted folder still what was written?

Every file has the SHA-256 that the manifest gives, no weights and no code have come in beside them, headers and index
pass the checks that any source has to pass, and every float is finite. The manifest itself is taken at its word: who
can change a file can change the manifest with it, so this finds accidents, not forgeries.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from spikepatch.apply.disk.manifest import MANIFEST, file_hash
from spikepatch.errors import BadSource
from spikepatch.source.checkpoint import read_checkpoint
from spikepatch.source.formats import INDEX_FILE, SINGLE_FILE, foreign_weights, parse_json, some
from spikepatch.source.header import TensorEntry
from spikepatch.source.local import read_file
from spikepatch.source.pieces import nonfinite, raw_pieces


@dataclass(frozen=True)
class Verified:
    """A folder that is what was written: how many files, tensors and bytes (of the weights) were compared."""

    folder: Path
    files: int
    tensors: int
    bytes: int


def verify(
    folder: str | os.PathLike[str],
    *,
    allow_nonfinite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Verified:
    """Compare a folder that ``convert`` or ``save`` wrote with its manifest.

    Args:
        folder: as it was written, or a copy of it.
        allow_nonfinite: weights may be NaN or infinite, as ``convert(..., allow_nonfinite=True)`` keeps them.
        progress: told a step's name, how many bytes are done, and how many there are.

    Raises:
        BadSource: the folder has no usable manifest, or is not what was written; everything that differs is named.
    """
    root = Path(folder)
    promised = _promised(root)
    present = [name for name in promised if os.path.isfile(root / name)]
    findings = [f"{name}: is missing" for name in promised if name not in present]
    findings += [f"{name}: {kind}" for name, kind in _strangers(root, promised).items()]
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

    for name in present:
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


def _promised(root: Path) -> dict[str, str]:
    """File name -> SHA-256, as the manifest has it."""

    def bad(what: str, why: str) -> BadSource:
        return BadSource(what, where=str(root), why=why, remedy="give a folder that spikepatch has written")

    try:
        data: Any = parse_json(read_file(root / MANIFEST, within=root))
    except OSError as error:
        raise bad(f"has no {MANIFEST}", error.strerror or str(error)) from error
    except ValueError as error:
        raise bad(f"{MANIFEST} is not JSON", str(error)) from error
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(digest, str) for digest in files.values()):
        raise bad(f"{MANIFEST} is not a manifest", "it has no files with their SHA-256")
    outside = [repr(name) for name in files if set(name) & set("\\\0") or not _plain(PurePosixPath(name))]
    if outside:
        raise bad(f"{MANIFEST} points outside the folder", some(outside))
    return files


def _plain(path: PurePosixPath) -> bool:
    return not path.is_absolute() and bool(path.parts) and ".." not in path.parts


def _strangers(root: Path, promised: Iterable[str]) -> dict[str, str]:
    """What was not written and would be loaded, or taken for what is loaded: weights and code."""
    names = {path.name for path in root.iterdir()} - set(promised)
    code = dict.fromkeys(sorted(name for name in names if name.endswith(".py")), "code that was not written")
    weights = names & {SINGLE_FILE, INDEX_FILE} | foreign_weights(names).keys()
    return code | dict.fromkeys(sorted(weights), "weights that were not written")


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
