"""The output folder appears whole or not at all: written beside the target under another name, renamed at the end.

Beside ``OUT`` a run has ``.OUT.lock.spikepatch``, a file that it keeps locked; ``.OUT.new.spikepatch``, where it
writes; and where the system cannot exchange two folders, for a moment, ``.OUT.old.spikepatch``. All are gone when it
ends. A lock file that nobody holds marks the other two as the remains of a run that was killed: the next run to ``OUT``
puts a folder back that had been moved aside, and deletes the rest; where something else has come to ``OUT`` since, it
deletes nothing and stops. Without the lock file, folders of these names are not ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spikepatch.apply.disk.atomic import beside, locked, put, sync
from spikepatch.errors import BadTarget
from spikepatch.source.formats import size
from spikepatch.source.local import local_path

if TYPE_CHECKING:
    from spikepatch.source.checkpoint import Checkpoint

#: Debug messages name the steps of the protocol, each just before it is done.
_log = logging.getLogger(__name__)

#: Bytes of one name, on any filesystem of Linux and macOS.
_LONGEST = 255

#: What the longest name beside a folder has more than its own; see ``atomic.beside``.
_BESIDE = beside(Path("x"), "lock").name.replace("x", "")

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def check_target(out: Path, source: Path | None, *, overwrite: bool) -> None:
    """Refuse a target that would touch the source or somebody's files; before anything is written.

    Raises:
        BadTarget: with every reason that there is.
    """
    real = Path(os.path.realpath(out))  # unlike the methods of Path, os.path has an answer where access is denied
    findings: list[tuple[str, str, str]] = []
    if source is not None:
        origin = Path(os.path.realpath(source))
        relation = "is" if real == origin else "lies inside" if origin in real.parents else "contains"
        if real == origin or origin in real.parents or real in origin.parents:
            findings.append(
                (
                    f"the output folder {relation} the source",
                    f"the source {source} is never written to",
                    "choose another output folder",
                )
            )
    if os.path.islink(out) or (os.path.exists(out) and not os.path.isdir(out)):
        findings.append(
            ("the output path is a file or a link", "a folder is to be put there", "choose another output folder")
        )
    elif _occupant(out) is not None and not findings:
        findings += _objections(out, overwrite)
    if any(len(os.fsencode(name)) > _LONGEST for name in (*real.parts[:-1], f"{real.name}{_BESIDE}")):
        findings.append(
            (
                "a name on the output path is too long",
                f"names have {_LONGEST} bytes at most, and one with {len(_BESIDE)} more is beside it meanwhile",
                "choose a shorter one",
            )
        )
    if os.path.ismount(out):
        findings.append(
            (
                "the output folder is a mount point",
                "no other folder can be put in its place, which is how the output appears whole or not at all",
                "choose a folder inside it",
            )
        )
    parent = next((p for p in real.parents if os.path.exists(p)), real)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        findings.append(
            (
                "the output folder cannot be made",
                f"{parent} is not a folder that this user may write to",
                "choose another place, or change its permissions",
            )
        )
    _refuse(out, findings)


def check_local_target(out: str | os.PathLike[str], source: str, *, overwrite: bool) -> None:
    """``check_target`` as far as it can be asked before it is known what ``source`` is."""
    local = local_path(source)
    check_target(Path(out), local if source and os.path.isdir(local) else None, overwrite=overwrite)


def check_space(out: Path, needed: int, source: Checkpoint | None = None) -> None:
    """Refuse where fewer than ``needed`` bytes are free; a folder that is replaced stays until the new one is whole.

    To be asked while ``publishing``, which has deleted the remains of a run that was killed. What ``source`` lacks is
    fetched meanwhile, and may come to the same disk.
    """
    parent = next(p for p in Path(os.path.realpath(out)).parents if os.path.exists(p))
    same = source is not None and os.stat(source.folder).st_dev == os.stat(parent).st_dev
    missing = source.arrivals.missing if source is not None and same else 0
    free = shutil.disk_usage(parent).free
    if free < needed + missing:
        why = f"the weights take {size(needed)}, "
        why += f"those still to be fetched into the Hub's cache {size(missing)}, " if missing else ""
        why += f"and {size(free)} are free on the disk of {parent}"
        _refuse(out, [("the disk is too full", why, "free some space, or choose another place or --dtype")])


@contextlib.contextmanager
def publishing(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder beside ``out``; when the block ends well it becomes ``out``, else nothing of it stays.

    With ``overwrite`` a folder that is there is replaced, in one step where the system can: whenever the process is
    killed, ``out`` is the old one or the new one. Files get the permissions that the umask gives, whatever wrote them.

    Raises:
        BadTarget: another run is writing to ``out`` or has written it meanwhile; what is there is not to be replaced.
    """
    out = Path(os.path.realpath(Path(os.path.abspath(out)).parent)) / Path(os.path.abspath(out)).name
    lock, new, old = (beside(out, part) for part in ("lock", "new", "old"))
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(lock, out, new, old):
            before = _occupant(out)
            if before is not None:
                _refuse(out, _objections(out, overwrite))
            try:
                _log.debug("create")
                new.mkdir(mode=0o700)
                _log.debug("write")
                yield new
                _log.debug("sync")
                mask = _umask()
                for path in (*sorted(new.rglob("*")), new):
                    mode = 0o777 | path.stat().st_mode & stat.S_ISGID if path.is_dir() else 0o666
                    path.chmod(mode & ~mask)
                    sync(path)
                if _occupant(out) != before:
                    raise BadTarget(
                        "another program has written the output folder",
                        where=str(out),
                        why="it was not there, or was another one, when this run began",
                        remedy="give every run a folder of its own",
                    )
                _swap(new, out, old)
                _log.debug("sync the parent")
                sync(out.parent)
            finally:
                _log.debug("sweep")
                _sweep(out, new, old)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def unwritable(out: Path, error: Exception) -> BadTarget:
    """The error for a system call that failed while ``out`` was written."""
    return BadTarget(
        "the output cannot be written",
        where=str(out),
        why=str(error),
        remedy="check the path, the folder's permissions and the disk's free space; nothing was left behind",
    )


def _objections(out: Path, overwrite: bool) -> list[tuple[str, str, str]]:
    """What speaks against replacing the folder at ``out``, in which there is something."""
    findings = []
    if not overwrite:
        findings.append(
            (
                "the output folder is not empty",
                "stale shards among new ones would be loaded without a word",
                "choose an empty or new folder, or give --overwrite (in Python, overwrite=True) to replace this one",
            )
        )
    if not os.path.exists(out / "config.json"):
        findings.append(
            (
                "the folder there does not hold a model",
                "it has no config.json, and --overwrite would delete the whole folder that it replaces",
                "choose another output folder, or remove this one yourself",
            )
        )
    return findings


def _refuse(out: Path, findings: list[tuple[str, str, str]]) -> None:
    if findings:
        what, why, remedy = zip(*findings, strict=True)
        raise BadTarget(
            ", and ".join(what), where=str(out), why="; ".join(why), remedy="; ".join(dict.fromkeys(remedy))
        )


def _occupant(out: Path) -> tuple[int, int] | None:
    """Identity of the folder at ``out``; None where there is none, or an empty one."""
    if not os.path.isdir(out) or not os.listdir(out):
        return None
    status = out.stat()
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _locked(lock: Path, out: Path, new: Path, old: Path) -> Iterator[None]:
    """Hold the lock, with the remains of a run that was killed swept; the lock file stays where some cannot be."""
    _log.debug("lock")
    left: list[Path] = []
    with contextlib.ExitStack() as stack:
        try:
            held = locked(lock, stays=lambda: (killed or not left) and any(map(os.path.lexists, (new, old))))
            killed = stack.enter_context(held)
        except BlockingIOError as error:
            raise BadTarget(
                "another run is writing the output folder",
                where=str(out),
                why=f"it holds {lock.name}",
                remedy="wait until it has ended, or give every run a folder of its own",
            ) from error
        stack.callback(_log.debug, "unlock")
        if killed:
            _log.debug("sweep the remains of another run")
            _sweep(out, new, old)
        left += [path for path in (old, new) if os.path.lexists(path)]
        if left:
            why = "it has a name that this program uses while it writes, and is not its own or cannot be deleted"
            if killed and left == [old, new]:
                why = "it was the output folder before a run that was killed, and something else has taken its place"
            _refuse(out, [(f"{left[0]} is in the way", why, "move it away")])
        yield


def _swap(new: Path, out: Path, old: Path) -> None:
    _log.debug("swap")
    if _occupant(out) is None:
        put(new, out)
    elif not _exchange(new, out):
        os.replace(out, old)
        _log.debug("swap, second half")
        put(new, out)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False where the system or the filesystem cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(a))


def _sweep(out: Path, new: Path, old: Path) -> None:
    """Put back what half a swap has moved aside; then delete what is not ``out``."""
    if os.path.lexists(old):
        if _occupant(out) is None:
            os.replace(old, out)
        elif os.path.lexists(new):  # it is not the new folder that has come to ``out``
            return
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
