"""A file or a folder is put in place whole: written beside it, synced, and given its name in one step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put(new: Path, path: Path) -> None:
    """Give ``new``, which lies beside ``path``, its name. Whenever the process is killed, ``path`` is as it was, or the
    whole new file or folder; what is inside a folder has been synced before.
    """
    sync(new)
    os.replace(new, path)
    sync(path.parent)


@contextlib.contextmanager
def placing(path: Path) -> Iterator[Path]:
    """Yield where a file is to be written. When the block ends well it becomes ``path``, else nothing of it stays.

    One process at a time may do it: the caller holds a lock, where others could.
    """
    new = path.with_name(f".{path.name}.new.spikepatch")
    try:
        yield new
        put(new, path)
    finally:
        new.unlink(missing_ok=True)
