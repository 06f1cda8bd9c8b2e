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
    real = Path(os.path.realpath(out))  # unlike the methods of Path, os.path has an answer where access is denied
    if source is not None:
        origin = Path(os.path.realpath(source))
        relation = "is" if real == origin else "lies inside" if origin in real.parents else "contains"
        if real == origin or origin in real.parents or real in origin.parents:
            raise BadTarget(
                f"the output folder {relation} the source",
                where=str(out),
                why=f"the source {source} is never written to",
                remedy="choose another output folder",
            )
    if os.path.islink(out) or (os.path.exists(out) and not os.path.isdir(out)):
        raise BadTarget(
            "the output path is a file or a link",
            where=str(out),
            why="a folder is to be put there",
            remedy="choose another output folder",
        )
    parent = next(p for p in real.parents if os.path.exists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadTarget(
            "the output folder cannot be made",
            where=str(out),
            why=f"{parent} is not a folder that this user may write to",
            remedy="choose another place, or change its permissions",
        )
    if _occupant(out) is not None and not overwrite:
        raise BadTarget(
            "the output folder is not empty",
            where=str(out),
            why="stale shards among new ones would be loaded without a word",
            remedy="choose an empty or new folder, or give --overwrite to replace this one",
        )
    if _occupant(out) is not None and not os.path.exists(out / "config.json"):
        raise BadTarget(
            "the folder to overwrite does not hold a model",
            where=str(out),
            why="it has no config.json, and --overwrite deletes the whole folder that it replaces",
            remedy="choose another output folder, or remove this one yourself",
        )


@contextlib.contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """Yield a new folder beside ``out``; when the block ends well it becomes ``out``, else nothing of it stays.

    A folder that is at ``out`` when the block begins is replaced: moved aside first and deleted last, so that at every
    moment one of the two is whole on disk. Files get the permissions that the umask gives, whatever wrote them.

    Raises:
        BadTarget: meanwhile another run has put its own folder there; that one stays.
    """
    out = Path(os.path.abspath(out))
    before = _occupant(out)
    made = _make_parents(out.parent)
    scratch: Path | None = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".spikepatch", dir=out.parent))
        yield scratch
        for path in (scratch, *sorted(scratch.rglob("*"))):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
            _sync(path)
        if _occupant(out) != before:
            raise BadTarget(
                "another run has written the output folder",
                where=str(out),
                why="it was not there, or was another one, when this run began",
                remedy="give every run a folder of its own",
            )
        _exchange(scratch, out)
        _sync(out.parent)
    except BaseException:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _occupant(out: Path) -> tuple[int, int] | None:
    """Identity of the folder at ``out``; None where there is none, or an empty one."""
    if not os.path.isdir(out) or not os.listdir(out):
        return None
    status = out.stat()
    return status.st_dev, status.st_ino


def _exchange(scratch: Path, out: Path) -> None:
    if _occupant(out) is None:
        os.replace(scratch, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    try:
        os.replace(out, old)
        try:
            os.replace(scratch, out)
        except BaseException:
            os.replace(old, out)
            raise
    except BaseException:
        with contextlib.suppress(OSError):  # gone where it has been moved back
            old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


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
