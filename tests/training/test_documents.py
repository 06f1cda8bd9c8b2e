"""What DATA means: every kind of input, in order, and the text of every refusal."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikepatch.errors import SpikepatchError
from spikepatch.training import documents
from spikepatch.training.documents import Input, inputs


def texts(found: tuple[Input, ...]) -> list[str]:
    """Documents, put together from their pieces."""
    result, parts = [], []
    for each in found:
        for piece in each.read():
            parts.append(piece.text)
            if piece.last:
                result.append("".join(parts))
                parts = []
    assert not parts
    return result


def refusal(*data: str, read: bool = False) -> str:
    with pytest.raises(SpikepatchError) as caught:
        texts(inputs(data)) if read else inputs(data)
    return str(caught.value)


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_files_of_every_kind(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.txt", "one", "two")
    other = write(tmp_path / "b.md", "three")
    lines = write(tmp_path / "c.jsonl", json.dumps({"text": "four", "id": 1}), "", json.dumps({"text": "fünf\n"}))
    assert texts(inputs([other, plain, lines])) == ["three\n", "one\ntwo\n", "four", "fünf\n"]


def test_globs_are_sorted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b", "a", "sub/c"):
        write(tmp_path / f"{name}.txt", name)
    (tmp_path / "folder.txt").mkdir()
    assert texts(inputs([f"{tmp_path}/**/*.txt"])) == ["a\n", "b\n", "sub/c\n"]
    assert texts(inputs([f"{tmp_path}/[ab].txt"])) == ["a\n", "b\n"]
    write(tmp_path / "[ab].txt", "a file of that very name")
    assert texts(inputs([f"{tmp_path}/[ab].txt"])) == ["a file of that very name\n"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    rows = [f"document {i}" for i in range(3000)]
    parquet.write_table(pyarrow.table({"text": rows, "id": list(range(3000))}), tmp_path / "a.parquet")
    (found,) = inputs([str(tmp_path / "a.parquet")])
    assert texts((found,)) == rows
    assert [piece.read for piece in found.read()][-1] == found.size
    parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "b.parquet")
    message = refusal(str(tmp_path / "b.parquet"), read=True)
    assert 'b.parquet: it has no column "text"' in message
    assert "its columns are content" in message
    parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "c.parquet")
    assert "c.parquet: row 2 has no text" in refusal(str(tmp_path / "c.parquet"), read=True)
    write(tmp_path / "d.parquet", "no parquet")
    assert "it is not parquet" in refusal(str(tmp_path / "d.parquet"), read=True)


def test_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("datasets is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [f"document {i}" for i in range(20)]
    write(folder / "train.jsonl", *(json.dumps({"text": row}) for row in rows))
    (found,) = inputs([f"datasets:{folder}"])
    assert texts((found,)) == rows
    (part,) = inputs([f"datasets:{folder}::train[:10%]"])
    assert texts((part,)) == rows[:2]
    assert part.digest() != found.digest()
    assert "the data set cannot be loaded" in refusal(f"datasets:{folder}::nothing")
    write(folder / "train.jsonl", json.dumps({"content": "x"}))
    assert 'it has no column "text"' in refusal(f"datasets:{folder}")


@pytest.mark.parametrize(("data", "package"), [("{}/x.parquet", "pyarrow"), ("datasets:wikitext", "datasets")])
def test_optional_packages(data: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.parquet", "")
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself takes for "cannot be imported"
    monkeypatch.delitem(sys.modules, f"{package}.parquet", raising=False)
    message = refusal(data.format(tmp_path))
    assert f"{package} is not installed" in message
    assert 'remedy: pip install "spikepatch[data]"' in message


def test_the_standard_library() -> None:
    found = inputs(["builtin:stdlib"])
    names = [each.name for each in found]
    assert len(names) > 500
    assert any(name.endswith("/argparse.py") for name in names)
    assert not [name for name in names if "site-packages" in name]
    assert sum(each.size for each in found) > 5_000_000
    (argparse,) = (each for each in found if each.name.endswith("/argparse.py"))
    assert texts((argparse,)) == [Path(argparse.name).read_bytes().decode()]


@given(text=st.text(st.sampled_from("ab\n\r€"), max_size=200), piece=st.integers(1, 20))
def test_pieces_are_the_text(text: str, piece: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the length of a piece; line ends stay as they are, and only the last piece ends the document."""
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    lines = path.with_suffix(".jsonl")
    lines.write_text(json.dumps({"text": text}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", piece)
        for file in (path, lines):
            found = list(inputs([str(file)])[0].read())
            assert "".join(each.text for each in found) == text
            assert [each.last for each in found] == [False] * (len(found) - 1) + [True] * bool(text)
            assert all(0 < len(each.text) <= 2 * piece for each in found)
            assert all(each.read <= file.stat().st_size for each in found)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "it is not JSON"),
        ('["x"]', "it is no object"),
        ('{"content": "x", "id": 1}', "it has the fields content, id"),
        ('{"text": null}', '"text" is no string'),
        (r'{"text": "\ud800"}', "its text cannot be written in UTF-8"),
    ],
)
def test_a_line_without_text(line: str, why: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "good"}', line)
    message = refusal(path, read=True)
    assert f"{path}: line 2 has no text" in message
    assert why in message
    assert '{"text": "..."}' in message


def test_what_is_refused(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.txt", "one")
    cases: list[tuple[tuple[str, ...], str]] = [
        ((str(tmp_path),), r"--data .*: is a folder\n.*not guessed\n.*/\*\*/\*\.txt'"),
        ((f"{tmp_path}/nothing.txt",), r"--data .*nothing.txt: no file is there\n.*matches none\n.*builtin:stdlib"),
        ((plain, f"{tmp_path}/*.txt"), r"a\.txt: the same data are given twice\n.*\*\.txt names them again\n.*once"),
        (("builtin:stdlib", "builtin:stdlib"), "the same data are given twice"),
    ]
    for data, expected in cases:
        assert re.search(expected, refusal(*data)), data


def test_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine so far\n" * 200_000 + b"\xe9t\xe9")
    message = refusal(str(path), read=True)
    assert f"{path}: the file cannot be read" in message
    assert "it is not UTF-8 text" in message


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write(path, "one")

    def denied(*_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # root may read everything
        patch.setattr("os.open", denied)
        assert "why: Permission denied" in refusal(str(path))
    (found,) = inputs([str(path)])
    path.unlink()
    with pytest.raises(SpikepatchError, match="No such file"):
        list(found.read())
    with pytest.raises(SpikepatchError, match="No such file"):
        found.digest()
