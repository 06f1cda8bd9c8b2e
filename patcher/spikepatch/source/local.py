"""Files on this machine: how a path is meant, and how whatever somebody else has put there is opened.

What belongs to a source may be anything: a named pipe that never answers, a device that never ends, a link out of the
folder. Every file of a source is opened here. What is wrong with one is an ``OSError`` whose ``strerror`` says it.
"""

from __future__ import annotations

import difflib
import errno
import io
import os
import stat
from pathlib import Path

from spikepatch.errors import BadTarget

#: Bytes of a file that is read at once: configs, cards, recipes, manifests, logs of one run. More is none of these.
LIMIT = 100_000_000

#: Why a path is refused that is not ``in_utf8``.
NO_UTF8 = "it has bytes that are no UTF-8, and safetensors and tokenizers open no such path"

_KINDS = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"))


def local_path(text: str | os.PathLike[str]) -> Path:
    """The path that is meant: ``~`` is the home folder, whoever writes it."""
    return Path(os.path.expanduser(text))


def is_path(source: str) -> bool:
    """Whether a SOURCE is a folder here, or meant as one; else it is ``arch:TYPE``, or a hub id."""
    if source.startswith("arch:"):
        return False
    return source.startswith(("/", ".", "~")) or source.endswith("/") or os.path.exists(local_path(source))


def without_place(source: str) -> str:
    """A SOURCE, or a file, as what is passed on may name it: of a path the last part. The folders that lead to it are
    nobody else's business, and often hold the name of a user.
    """
    return os.path.basename(os.path.realpath(local_path(source))) if source and is_path(source) else source


def target_path(text: str | os.PathLike[str]) -> Path:
    """The same of a place that is written to.

    Raises:
        BadTarget: it is empty, as a variable is that is not set; or its name is no UTF-8.
    """
    if not os.fspath(text):
        raise BadTarget(
            "there is no place to write to",
            where="OUT",
            why="it is empty, as a variable is that is not set",
            remedy="give a folder; . is the current one",
        )
    if not in_utf8(text):
        raise BadTarget(
            "the output path cannot be used", where=repr(os.fspath(text)), why=NO_UTF8, remedy="choose another"
        )
    return local_path(text)


def in_utf8(path: str | os.PathLike[str]) -> bool:
    """Whether a path is text: safetensors, tokenizers, pages and JSON know no other."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def leads_out(path: Path, folder: Path) -> Path | None:
    """Where ``path`` really lies, if not in ``folder``, nor in the Hub cache that ``folder`` is a snapshot of."""
    root = Path(os.path.realpath(folder))
    if Path(os.path.realpath(path)).is_relative_to(root):
        return None
    place = Path(os.path.realpath(path.parent))
    target = Path(os.path.normpath(place / os.readlink(path))) if path.is_symlink() else place / path.name
    in_cache = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    return None if in_cache else target


def opened(path: str | os.PathLike[str], *, within: Path | None = None) -> io.BufferedReader:
    """A regular file, to be read; with ``within``, one that lies in that folder (or in the Hub's cache of it).

    Raises:
        OSError: it cannot be opened, is no regular file, or lies elsewhere.
    """
    if within is not None and (target := leads_out(Path(path), within)) is not None:
        raise OSError(errno.EINVAL, f"it is a link that leads out of the folder, to {target}", str(path))
    try:
        file = open(path, "rb", opener=_at_once)  # noqa: SIM115
    except IsADirectoryError as error:
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path)) from error
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        kind = next((name for matches, name in _KINDS if matches(mode)), "a device")
        raise OSError(errno.EINVAL, f"it is {kind}, and a file is read", str(path))
    return file


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else a pipe is waited for


def read_file(path: str | os.PathLike[str], *, within: Path | None = None, limit: int = LIMIT) -> bytes:
    """What is in a regular file of at most ``limit`` bytes; see ``opened``."""
    with opened(path, within=within) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
        return file.read()


def nearby(source: str) -> list[str]:
    """Folders here whose path is near to one that is not there: another last part, or another one before it."""
    path = local_path(source)
    if path.parent.is_dir():
        return [str(path.parent / name) for name in _near(path.parent, path.name)]
    above = path.parent.parent
    places = [above / name for name in _near(above, path.parent.name)] if above.is_dir() else []
    return [str(place / name) for place in places for name in _near(place, path.name)]


def _near(place: Path, name: str) -> list[str]:
    try:
        with os.scandir(place) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []
    return difflib.get_close_matches(name, names, n=3, cutoff=0.75)
