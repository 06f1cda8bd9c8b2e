"""The output folder appears whole or not at all: written beside the target under another name, renamed at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from spikepatch.errors import BadTarget


def check_target(out: Path, source: Path | None, *, overwrite: bool) -> None:
    """Refuse a target that would touch the source or somebody's files; before anything is written.

    Raises:
        BadTarget: with the reason.
    """
    real = out.resolve()
    if source is not None:
        origin = source.resolve()
        relation = "is" if real == origin else "lies inside" if origin in real.parents else "contains"
        if real == origin or origin in real.parents or real in origin.parents:
            raise BadTarget(
                f"the output folder {relation} the source",
                where=str(out),
                why=f"the source {source} is never written to",
                remedy="choose another output folder",
            )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise BadTarget(
            "the output path is a file or a link",
            where=str(out),
            why="a folder is to be put there",
            remedy="choose another output folder",
        )
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise BadTarget(
            "the output folder is not empty",
            where=str(out),
            why="stale shards among new ones would be loaded without a word",
            remedy="choose an empty or new folder, or give --overwrite to replace this one",
        )
    parent = next(p for p in real.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadTarget(
            "the output folder cannot be made",
            where=str(out),
            why=f"{parent} is not a folder that this user may write to",
            remedy="choose another place, or change its permissions",
        )


@contextlib.contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """Yield a new folder beside ``out``; when the block ends well it becomes ``out``, else nothing of it stays.

    An existing ``out`` is moved aside first and deleted last, so at every moment one of the two is whole on disk.
    """
    out = out.absolute()
    made = _make_parents(out.parent)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".spikepatch", dir=out.parent))
    try:
        scratch.chmod(0o777 & ~_umask())
        yield scratch
        for path in sorted(scratch.rglob("*")):
            _sync(path)
        _sync(scratch)
        _exchange(scratch, out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _exchange(scratch: Path, out: Path) -> None:
    if not out.exists() or not any(out.iterdir()):
        os.replace(scratch, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    os.replace(out, old)
    try:
        os.replace(scratch, out)
    except BaseException:
        os.replace(old, out)
        raise
    shutil.rmtree(old)


def _make_parents(folder: Path) -> list[Path]:
    """Create the missing parents; those created, innermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
