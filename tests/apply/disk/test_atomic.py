"""A file is the old one or the whole new one, and nothing is left beside it."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from spikepatch.apply.disk.atomic import locked, placing, put
from spikepatch.apply.disk.publish import publishing
from spikepatch.errors import BadTarget


@pytest.mark.parametrize("there", [False, True])
def test_a_file_is_put_in_place(there: bool, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    if there:
        path.write_text("old")
    (tmp_path / ".file.json.new.spikepatch").write_text("of a run that was killed, and longer")
    with placing(path) as new:
        new.write_text("new")
        assert path.exists() == there
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]
    assert path.read_text() == "new"


def test_what_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")

    def write(new: Path) -> None:
        new.write_text("half of")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), placing(path) as new:
        write(new)
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]
    assert path.read_text() == "old"


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/file").touch()
    put(tmp_path / "new", tmp_path / "out")
    assert [each.relative_to(tmp_path).as_posix() for each in sorted(tmp_path.rglob("*"))] == ["out", "out/file"]


def test_a_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with locked(lock) as existed:
        assert not existed
        with pytest.raises(BlockingIOError), locked(lock):
            pass
        assert lock.exists()
    assert not lock.exists()
    lock.touch()
    with locked(lock, stays=lambda: True) as existed:
        assert existed
    assert lock.exists()


def test_who_waits_for_a_lock_gets_the_file_that_has_its_name(tmp_path: Path) -> None:
    """The holder deletes the file, or gives it another name: a lock on that would be nobody's."""
    path, seen = tmp_path / "file", []

    def place(text: str) -> None:
        with placing(path) as new:
            before = path.read_text() if path.exists() else ""
            new.write_text(before + text)
            seen.append(text)

    threads = [threading.Thread(target=place, args=(letter,)) for letter in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() == "".join(seen)
    assert len(seen) == 8
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EMFILE])
def test_where_no_lock_can_be_had_nothing_stays(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    expected = OSError if code == errno.EMFILE else BadTarget
    with pytest.raises(expected, match=os.strerror(code)), placing(tmp_path / "page.html"):
        pass
    with pytest.raises(expected, match=os.strerror(code)), publishing(tmp_path / "a/out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_of_a_lock(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".x.new.spikepatch")
    with pytest.raises(BadTarget, match=r"\.x\.new\.spikepatch is in the way"), placing(tmp_path / "x"):
        pass
    assert [each.name for each in tmp_path.iterdir()] == [".x.new.spikepatch"]
