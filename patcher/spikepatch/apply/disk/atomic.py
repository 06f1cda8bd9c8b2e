"""A file or a folder is put in place whole: written beside it, synced, and given its name in one step.

There is one kind of lock: a file that a process holds by ``flock``, which the system lets go when the process ends,
however it ends. A file's own scratch is its lock, and what a killed run left in it is written over. A folder's scratch
cannot be: its lock lies beside it, and where nobody holds it, marks what else lies there as a killed run's; see
``publish.py``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from spikepatch.errors import BadTarget

#: What ``flock`` says where a filesystem has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def beside(path: Path, part: str) -> Path:
    """Where something that belongs to ``path`` lies while it is made: no name of anybody else's."""
    return path.with_name(f".{path.name}.{part}.spikepatch")


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


def remove(path: Path) -> None:
    """Delete a folder: out of the way in one step, so that nobody takes half of it for the whole."""
    if os.path.lexists(path):
        old = beside(path, "old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def placing(path: Path) -> Iterator[Path]:
    """Yield where a file is to be written. When the block ends well it becomes ``path``, else nothing of it stays.

    A process that places the same file meanwhile is waited for: the last one's file stays, whole.

    Raises:
        BadTarget: files cannot be locked there.
    """
    new = beside(path, "new")
    with locked(new, wait=True):
        yield new
        put(new, path)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False, stays: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Hold the lock file ``path``, which is made; yields whether it was there: a run that held it has been killed.

    Args:
        wait: for the process that holds it.
        stays: asked at the end; else the file is deleted, if it still has its name.

    Raises:
        BlockingIOError: another process holds it, and it is not to be waited for.
        BadTarget: files cannot be locked there, or something else has this name.
    """
    handle, existed = _acquire(path, wait)
    try:
        yield existed
    finally:
        with contextlib.suppress(OSError):
            if not stays() and _named(handle, path):
                path.unlink()
        os.close(handle)


def _acquire(path: Path, wait: bool) -> tuple[int, bool]:
    import fcntl  # not on every system: see errors.check_platform

    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    while True:
        try:
            handle, existed = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), False
        except FileExistsError:
            try:
                handle, existed = os.open(path, flags), True
            except FileNotFoundError:
                continue
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise _in_the_way(path)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _named(handle, path):
                return handle, existed
        except BaseException as error:
            if not existed and not isinstance(error, BlockingIOError):
                with contextlib.suppress(OSError):
                    path.unlink()
            os.close(handle)
            if isinstance(error, OSError) and error.errno in _NO_LOCKS:
                raise _lockless(path, error) from error
            raise
        os.close(handle)  # its last holder has deleted it meanwhile, or given it another name


def _named(handle: int, path: Path) -> bool:
    """``path`` still is the file that was opened."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _lockless(path: Path, error: OSError) -> BadTarget:
    return BadTarget(
        "files cannot be locked there",
        where=str(path.parent),
        why=f"{error.strerror}; without a lock, two runs could write to one place at the same time",
        remedy="choose a place on another disk, such as a local one",
    )


def _in_the_way(path: Path) -> BadTarget:
    return BadTarget(
        f"{path.name} is in the way",
        where=str(path.parent),
        why="this program writes to a file of this name first, and it is no file",
        remedy="move it away",
    )
