"""A file is the old one or the whole new one, and nothing is left beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikepatch.apply.disk.atomic import placing, put


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
