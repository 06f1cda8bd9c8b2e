"""The output folder appears whole or not at all, with the permissions that the umask gives."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spikepatch.apply.disk import publish
from spikepatch.apply.disk.publish import check_space, check_target, publishing
from spikepatch.errors import BadTarget
from spikepatch.source.arrivals import Arrivals
from spikepatch.source.checkpoint import read_checkpoint
from spikepatch.source.formats import size


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below, hidden ones too; the content of files."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class Boom(BaseException):
    """As KeyboardInterrupt: no Exception."""


def occupied(out: Path) -> dict[str, bytes | None]:
    """Put a model there; what ``tree`` says of it, from the folder above."""
    out.mkdir()
    (out / "config.json").write_bytes(b"0")
    return {out.name: None, f"{out.name}/config.json": b"0"}


def publish_and_fail(out: Path, error: BaseException) -> None:
    with publishing(out, overwrite=True) as scratch:
        (scratch / "new").write_bytes(b"1")
        raise error


def test_a_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "a/b/out"
    with publishing(out) as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub/file").write_bytes(b"1")
        assert scratch.parent == out.parent
        assert not out.exists()
    assert tree(tmp_path) == {"a": None, "a/b": None, "a/b/out": None, "a/b/out/sub": None, "a/b/out/sub/file": b"1"}


@pytest.mark.parametrize("error", [Boom(), OSError(28, "disk full"), BadTarget("x", where="", why="", remedy="")])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        publish_and_fail(tmp_path / "a/b/out", error)
    assert tree(tmp_path) == {}


def test_no_parent_is_left_when_one_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = os.mkdir

    def full(path: Path, mode: int = 0o777) -> None:
        if Path(path).name == "b" and Path(path).parent.exists():
            raise OSError(28, "disk full")
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(OSError, match="disk full"), publishing(tmp_path / "a/b/out"):
        pass
    assert tree(tmp_path) == {}


def test_parents_that_others_use_stay(tmp_path: Path) -> None:
    def share(out: Path) -> None:
        with publishing(out):
            (tmp_path / "a/other").write_bytes(b"2")
            raise Boom

    with pytest.raises(Boom):
        share(tmp_path / "a/b/out")
    assert tree(tmp_path) == {"a": None, "a/other": b"2"}


def test_an_existing_folder_survives_an_error(tmp_path: Path) -> None:
    before = occupied(tmp_path / "out")
    with pytest.raises(Boom):
        publish_and_fail(tmp_path / "out", Boom())
    assert tree(tmp_path) == before


@pytest.mark.parametrize("fails", [1, 2])
def test_an_existing_folder_survives_a_failing_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """Where folders cannot be exchanged: of the two renames of a replacement, the first or the second fails."""
    out = tmp_path / "out"
    before = occupied(out)
    rename, calls = os.replace, []

    def replace(a: Path, b: Path) -> None:
        calls.append(a)
        if len(calls) == fails:
            raise OSError("rename failed")
        rename(a, b)

    monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="rename failed"), publishing(out, overwrite=True) as scratch:
        (scratch / "new").write_bytes(b"1")
    assert len(calls) >= fails
    assert tree(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_folders_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not publish._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this filesystem cannot")
    assert tree(tmp_path) == {"a": None, "a/b": b"", "b": None, "b/a": b""}
    with pytest.raises(FileNotFoundError):
        publish._exchange(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_an_existing_folder_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool, exchanged: bool
) -> None:
    if not exchanged:
        monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
    out = tmp_path / "out"
    occupied(out) if full else out.mkdir()
    with publishing(out, overwrite=full) as scratch:
        (scratch / "new").write_bytes(b"1")
    assert tree(tmp_path) == {"out": None, "out/new": b"1"}


@pytest.mark.parametrize("existing", [False, True])
def test_two_runs_to_one_folder(tmp_path: Path, existing: bool) -> None:
    """The second one is refused, and takes nothing from the first."""
    out = tmp_path / "out"
    if existing:
        occupied(out)
    with publishing(out, overwrite=True) as first:
        (first / "file").write_bytes(b"first")
        with pytest.raises(BadTarget, match="another run is writing"), publishing(out, overwrite=True):
            pass
    assert tree(tmp_path) == {"out": None, "out/file": b"first"}


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    """Put there by a program that knows nothing of the lock, or by a run that ended before this one began to write."""
    out = tmp_path / "out"

    def two_programs() -> None:
        with publishing(out, overwrite=True) as scratch:
            (scratch / "new").write_bytes(b"1")
            out.mkdir()
            (out / "other").write_bytes(b"2")

    with pytest.raises(BadTarget, match="another program has written"):
        two_programs()
    assert tree(tmp_path) == {"out": None, "out/other": b"2"}
    for overwrite, message in ((False, "is not empty"), (True, "does not hold a model")):
        with pytest.raises(BadTarget, match=message), publishing(out, overwrite=overwrite):
            pass
        assert tree(tmp_path) == {"out": None, "out/other": b"2"}


def test_the_remains_of_a_run_that_was_killed(tmp_path: Path) -> None:
    """Its lock file says that they are its own."""
    out = tmp_path / "out"
    for name in (".out.lock.spikepatch", ".out.new.spikepatch/x", ".out.old.spikepatch/x", ".other.new.spikepatch/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadTarget, match="is not empty"), publishing(out):  # it had been moved aside
        pass
    assert tree(tmp_path) == {".other.new.spikepatch": None, ".other.new.spikepatch/x": b"", "out": None, "out/x": b""}


def killed_between_two_renames(out: Path) -> None:
    """Where folders cannot be exchanged: the old one has been moved aside, the new one is not in its place yet."""
    for name, file in (("new", "config.json"), ("old", "precious")):
        folder = out.with_name(f".out.{name}.spikepatch")
        folder.mkdir()
        (folder / file).write_bytes(b"")
    out.with_name(".out.lock.spikepatch").touch()


def test_what_was_moved_aside_takes_the_place_of_an_empty_folder(tmp_path: Path) -> None:
    """Scripts make the output folder before they start."""
    killed_between_two_renames(tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(BadTarget, match="is not empty"), publishing(tmp_path / "out"):
        pass
    assert tree(tmp_path) == {"out": None, "out/precious": b""}


def test_what_was_moved_aside_is_put_back_though_the_new_folder_is_gone(tmp_path: Path) -> None:
    """Somebody has cleaned up by hand."""
    killed_between_two_renames(tmp_path / "out")
    shutil.rmtree(tmp_path / ".out.new.spikepatch")
    with pytest.raises(BadTarget, match="is not empty"), publishing(tmp_path / "out"):
        pass
    assert tree(tmp_path) == {"out": None, "out/precious": b""}


def test_what_was_moved_aside_is_not_lost_to_a_file(tmp_path: Path) -> None:
    killed_between_two_renames(tmp_path / "out")
    (tmp_path / "out").write_bytes(b"3")
    before = tree(tmp_path)
    with pytest.raises(NotADirectoryError), publishing(tmp_path / "out", overwrite=True):
        pass
    assert tree(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_was_moved_aside_is_not_lost_to_what_came_there_since(tmp_path: Path, overwrite: bool) -> None:
    killed_between_two_renames(tmp_path / "out")
    occupied(tmp_path / "out")
    before = tree(tmp_path)
    for _ in range(2):
        with (
            pytest.raises(BadTarget, match=r"\.out\.old\.spikepatch is in the way") as caught,
            publishing(tmp_path / "out", overwrite=overwrite),
        ):
            pass
        assert "it was the output folder" in caught.value.why
        assert tree(tmp_path) == before
    (tmp_path / ".out.old.spikepatch").rename(tmp_path / "saved")
    with publishing(tmp_path / "out", overwrite=True):
        pass
    assert tree(tmp_path) == {"out": None, "saved": None, "saved/precious": b""}


def test_a_folder_that_appears_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three stay: the one that was there, the one that was to take its place, and the one that did."""
    out = tmp_path / "out"
    occupied(out)
    rename = os.replace

    def replace(a: Path, b: Path) -> None:
        rename(a, b)
        if b.name == ".out.old.spikepatch":
            out.mkdir()
            (out / "other").write_bytes(b"2")

    monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="not empty"), publishing(out, overwrite=True) as scratch:
        (scratch / "new").write_bytes(b"1")
    files = {name: content for name, content in tree(tmp_path).items() if content}
    assert files == {
        ".out.new.spikepatch/new": b"1",
        ".out.old.spikepatch/config.json": b"0",
        "out/other": b"2",
    }


@pytest.mark.parametrize("name", [".out.new.spikepatch", ".out.old.spikepatch"])
def test_a_folder_without_a_lock_file_is_not_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "x").write_bytes(b"")
    before = tree(tmp_path)
    for _ in range(2):
        with pytest.raises(BadTarget, match="is in the way") as caught, publishing(tmp_path / "out"):
            pass
        assert "move it away" in caught.value.remedy
        assert tree(tmp_path) == before


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"x")
    (tmp_path / ".out.lock.spikepatch").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), publishing(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_bytes() == b"x"


@pytest.mark.usefixtures("umask")
def test_permissions(tmp_path: Path) -> None:
    """Also those of files that a library wrote as 0600, which nobody else could read."""
    out = tmp_path / "out"
    with publishing(out) as scratch:
        (scratch / "sub").mkdir()
        for name in ("private", "sub/open"):
            (scratch / name).write_bytes(b"")
        (scratch / "private").chmod(0o600)
        (scratch / "sub/open").chmod(0o777)
        assert mode(scratch) & 0o077 == 0
    assert [mode(out), mode(out / "sub")] == [0o750, 0o750]
    assert [mode(out / "private"), mode(out / "sub/open")] == [0o640, 0o640]


def test_folders_of_a_group_stay_so(tmp_path: Path) -> None:
    """In a folder whose files all get its group, as ``mkdir`` makes them there."""
    tmp_path.chmod(0o2777)
    (tmp_path / "made").mkdir()
    assert (tmp_path / "made").stat().st_mode & stat.S_ISGID
    with publishing(tmp_path / "out") as scratch:
        (scratch / "sub").mkdir()
        (scratch / "file").touch()
    assert mode(tmp_path / "out") == mode(tmp_path / "out/sub") == mode(tmp_path / "made")
    assert not (tmp_path / "out/file").stat().st_mode & stat.S_ISGID


# Targets.


def refused(out: Path, source: Path | None, message: str, *, overwrite: bool = False) -> None:
    with pytest.raises(BadTarget, match=message) as caught:
        check_target(out, source, overwrite=overwrite)
    assert caught.value.where == str(out)
    assert caught.value.remedy


@pytest.mark.parametrize("overwrite", [False, True])
def test_source_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    source = tmp_path / "models/source"
    source.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "models")
    refused(source, source, "is the source", overwrite=overwrite)
    refused(source / ".." / "source", source, "is the source", overwrite=overwrite)
    refused(link / "source", source, "is the source", overwrite=overwrite)
    refused(source / "a/b", source, "lies inside the source", overwrite=overwrite)
    refused(link / "source/a", source, "lies inside the source", overwrite=overwrite)
    refused(tmp_path / "models", source, "contains the source", overwrite=overwrite)
    check_target(tmp_path / "models/source2", source, overwrite=overwrite)
    assert list(source.iterdir()) == []


def test_files_and_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        refused(tmp_path / name, None, "file or a link", overwrite=True)
    refused(tmp_path / "file/out", None, "cannot be made")
    check_target(tmp_path / "link/out", None, overwrite=False)


def test_a_mount_point_cannot_be_replaced() -> None:
    """As a volume in a container is one; found out before anything is read."""
    assert os.path.ismount("/")
    refused(Path("/"), None, "is a mount point")


def test_not_empty(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_target(tmp_path / "out", None, overwrite=False)
    (tmp_path / "out/.hidden").write_bytes(b"")
    refused(tmp_path / "out", None, "not empty")
    refused(tmp_path / "out", None, "does not hold a model", overwrite=True)
    (tmp_path / "out/config.json").write_text("{}")
    check_target(tmp_path / "out", None, overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    for permissions in (0o500, 0o000):
        (tmp_path / "closed").chmod(permissions)
        try:
            refused(tmp_path / "closed/a/out", None, "cannot be made")
        finally:
            (tmp_path / "closed").chmod(0o700)


def test_no_permission_as_asked_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, flags: Path(path) != tmp_path)
    refused(tmp_path / "a/out", None, "cannot be made")


def test_all_reasons_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda path, flags: False)
    for message in ("not empty", "does not hold a model", "cannot be made"):
        refused(tmp_path / "out", None, message)


def test_a_full_disk(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path / "a/out", free // 2)
    with pytest.raises(BadTarget, match="too full") as caught:
        check_space(tmp_path / "a/out", 2 * free)
    assert f"take {size(2 * free)}" in caught.value.why
    assert "--dtype" in caught.value.remedy


def test_a_disk_that_the_source_is_still_to_be_fetched_to(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    there = read_checkpoint(tmp_path)
    arriving = dataclasses.replace(there, arrivals=Arrivals({"b": free}, lambda file, arrived: None))
    check_space(tmp_path / "out", free // 2, there)
    with pytest.raises(BadTarget, match="too full") as caught:
        check_space(tmp_path / "out", free // 2, arriving)

    assert f"still to be fetched into the Hub's cache {size(free)}" in caught.value.why


def test_names_that_are_too_long(tmp_path: Path) -> None:
    """Told before any work, and only then."""
    longest = 255 - len("..lock.spikepatch")
    with publishing(tmp_path / ("x" * longest)) as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / ("x" * longest) / "a").exists()
    for name in ("y" * (longest + 1), f"{'z' * 256}/out", "ä" * 128):
        with pytest.raises(BadTarget, match="a name on the output path is too long"):
            check_target(tmp_path / name, None, overwrite=True)
