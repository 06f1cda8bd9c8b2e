"""What DATA means: files as the programs of others write them, in order, and the text of every refusal."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import importlib.util
import json
import lzma
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikepatch.data import rows
from spikepatch.data.documents import Input, inputs, said
from spikepatch.data.rows import BadRow, Reading
from spikepatch.errors import SpikepatchError

WORDS = ["one", 'two, "quoted"', "three\nlines\n", "fünf 東京", "NA"]


def documents(found: Iterable[Input]) -> list[Any]:
    """Texts, or lists of tokens, put together from their pieces."""
    result, parts = [], []
    for each in found:
        for piece in each.read():
            assert not isinstance(piece, BadRow), piece
            parts.append(piece.content)
            if piece.last:
                whole: Any = parts
                result.append("".join(whole) if each.kind == "text" else np.concatenate(whole).tolist())
                parts = []
    assert not parts
    return result


def bad_rows(found: Iterable[Input]) -> list[str]:
    return [f"{piece.where}: {piece.why}" for each in found for piece in each.read() if isinstance(piece, BadRow)]


def of(*data: str | Path, **reading: Any) -> list[Any]:
    return documents(inputs([str(each) for each in data], reading=Reading(**reading)))


def refusal(*data: str | Path, **reading: Any) -> str:
    with pytest.raises(SpikepatchError) as caught:
        of(*data, **reading)
    return str(caught.value)


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def json_lines(words: Iterable[str], **more: Any) -> bytes:
    return "".join(json.dumps({"id": i, "text": word, **more}) + "\n" for i, word in enumerate(words)).encode()


def zstandard_of(content: bytes) -> bytes:
    """Two frames, as pzstd and appending write them."""
    library = pytest.importorskip("zstandard")
    half = len(content) // 2
    compress = library.ZstdCompressor(write_checksum=True).compress
    return bytes(compress(content[:half]) + compress(content[half:]))


def test_text(tmp_path: Path) -> None:
    """Each file one document, as it is; a mark of the byte order is none of it."""
    plain = write(tmp_path / "a.txt", "one", "two")
    other = write(tmp_path / "b.md", "three")
    (tmp_path / "c.txt").write_bytes("\ufeffmarked\r\n".encode())
    assert of(other, plain, tmp_path / "c.txt") == ["three\n", "one\ntwo\n", "marked\r\n"]


@pytest.mark.parametrize(
    ("ending", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstandard_of)],
)
def test_compressed(ending: str, pack: Any, tmp_path: Path) -> None:
    """Several frames in a file are one text; a file that is cut off, or another one, is refused by name."""
    content = json_lines([*WORDS, "x" * 100_000])
    lines, plain = tmp_path / f"a.jsonl{ending}", tmp_path / f"b.txt{ending}"
    lines.write_bytes(pack(content))
    plain.write_bytes(pack(b"plain") + pack(b" and more"))
    assert of(lines, plain) == [*WORDS, "x" * 100_000, "plain and more"]
    (found,) = inputs([str(lines)])
    assert [piece.read for piece in found.read()][-1] <= found.size == lines.stat().st_size
    if ending != ".bz2":  # which begins like words
        lines.rename(tmp_path / "c.jsonl")
        assert of(tmp_path / "c.jsonl")[:-1] == WORDS
    for name, wrong in (("cut", pack(content)[:-7]), ("other", b"hello, this is not packed at all" * 9)):
        path = tmp_path / f"{name}.jsonl{ending}"
        path.write_bytes(wrong)
        assert f"{path}: the file cannot be read" in refusal(path)


def test_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines(WORDS) + b"\n   \n" + json_lines(["last"]))
    assert of(tmp_path / "a.jsonl") == [*WORDS, "last"]
    (tmp_path / "b.json").write_text(json.dumps([{"text": word} for word in WORDS], indent=2))
    assert of(tmp_path / "b.json") == WORDS
    (tmp_path / "c.json").write_bytes(json_lines(WORDS))
    assert of(tmp_path / "c.json") == WORDS
    (tmp_path / "d.jsonl").write_bytes(json_lines(["other"], content="x = 1"))
    assert of(tmp_path / "d.jsonl", text_column="content") == ["x = 1"]
    write(tmp_path / "e.jsonl", '{"content": "x", "id": 1}')
    message = refusal(tmp_path / "e.jsonl")
    assert "e.jsonl: it has no column text or input_ids" in message
    assert "its columns are content, id" in message
    assert "--text-column NAME" in message
    write(tmp_path / "f.json", '[{"text": "x"}, ')
    assert "it begins as a JSON array" in refusal(tmp_path / "f.json")


def test_bad_rows_are_named(tmp_path: Path) -> None:
    """By file and line; the rows behind them are read."""
    path = tmp_path / "a.jsonl"
    deep = "[" * 100_000
    path.write_text("\n".join(['{"text": "good"}', "{", "", '["x"]', '{"text": null}', r'{"text": "\ud800"}', deep]))
    assert bad_rows(inputs([str(path)])) == [
        f"{path}:2: it is not JSON (Expecting property name enclosed in double quotes: line 2 column 1 (char 2))",
        f"{path}:4: it is no object",
        f'{path}:5: its "text" is null, and no text',
        f"{path}:6: its text cannot be written in UTF-8 (surrogates not allowed)",
        f"{path}:7: it is not JSON ({_deep_error(deep)})",
    ]
    with (tmp_path / "b.csv").open("w", newline="") as file:
        file.write('id,text\n1,"two\nlines"\n2\n3,good\n')
    assert bad_rows(inputs([str(tmp_path / "b.csv")])) == [
        f"{tmp_path}/b.csv:4: it has 1 values, and the first line has 2"
    ]


def _deep_error(text: str) -> str:
    with pytest.raises(RecursionError) as caught:
        json.loads(text)
    return str(caught.value)


def test_csv(tmp_path: Path) -> None:
    """As Python's csv and pandas write it; NA is a word, and quoted values have several lines."""
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate([*WORDS, "x" * 300_000])])
    assert of(tmp_path / "a.csv") == [*WORDS, "x" * 300_000]
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"content": WORDS}).to_csv(tmp_path / "b.csv.gz")
    pandas.DataFrame({"text": WORDS}).to_csv(tmp_path / "c.tsv", sep="\t", encoding="utf-8-sig", index=False)
    assert of(tmp_path / "b.csv.gz", text_column="content") == WORDS
    assert of(tmp_path / "c.tsv") == WORDS
    assert "its columns are id, text" in refusal(tmp_path / "a.csv", text_column="content")
    write(tmp_path / "d.csv", "id,text", '1,"never closed')
    assert "the row that begins on line 2 is not CSV" in refusal(tmp_path / "d.csv")


def test_columns(tmp_path: Path) -> None:
    """Parquet and arrow, as pyarrow and pandas write them."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    many = [f"document {i}" for i in range(300)]
    table = pyarrow.table({"id": range(300), "text": many})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100, compression="zstd")
    (found,) = inputs([str(tmp_path / "a.parquet")])
    assert documents([found]) == many
    assert [piece.read for piece in found.read()][-1] == found.size
    for name, writer in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with writer(str(tmp_path / name), table.schema) as out:
            out.write_table(table)
        assert of(tmp_path / name) == many
    kinds = {"large": pyarrow.large_string(), "coded": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
    for name, kind in kinds.items():
        parquet.write_table(pyarrow.table({"text": pyarrow.array(WORDS, kind)}), tmp_path / f"{name}.parquet")
        assert of(tmp_path / f"{name}.parquet") == WORDS
    parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "b.parquet")
    assert "its columns are content" in refusal(tmp_path / "b.parquet")
    assert of(tmp_path / "b.parquet", text_column="content") == ["x"]
    parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "c.parquet")
    (bad,) = bad_rows(inputs([str(tmp_path / "c.parquet")]))
    assert bad == f'{tmp_path}/c.parquet: row 2: its "text" is null, and no text'
    stored = (tmp_path / "a.parquet").read_bytes()
    for name, wrong in (("d.parquet", b"no parquet"), ("e.parquet", stored[:-100]), ("f.arrow", b"no arrow " * 9)):
        (tmp_path / name).write_bytes(wrong)
        assert f"{name}: the file cannot be read" in refusal(tmp_path / name)


def test_columns_of_tokens(tmp_path: Path) -> None:
    """The text where there is one too; in the order of the rows, and as they are."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    ids = [[1, 2, 3], [4], [], [5, 65_535]]
    for kind in (pyarrow.list_(pyarrow.int32()), pyarrow.large_list(pyarrow.uint16())):
        parquet.write_table(pyarrow.table({"input_ids": pyarrow.array(ids, kind)}), tmp_path / "a.parquet")
        assert of(tmp_path / "a.parquet") == [ids[0], ids[1], ids[3]]
    parquet.write_table(pyarrow.table({"input_ids": ids, "text": list("abcd")}), tmp_path / "b.parquet")
    assert of(tmp_path / "b.parquet") == list("abcd")
    assert of(tmp_path / "b.parquet", text_column="input_ids") == [ids[0], ids[1], ids[3]]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in [*ids, [1.5], [[1]], "x"]))
    assert len(bad_rows(inputs([str(tmp_path / "c.jsonl")]))) == 3


def test_data_sets(tmp_path: Path) -> None:
    """Folders of save_to_disk, with splits or without, and what load_dataset finds; nothing is kept in the home."""
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("datasets is not installed")
    import datasets

    texts = [f"document {i}" for i in range(200)]
    one = datasets.Dataset.from_dict({"text": texts})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select(range(2))}).save_to_disk(tmp_path / "several")
    assert of(tmp_path / "one") == of(tmp_path / "several") == texts
    assert of(tmp_path / "several", split="test") == texts[:2]
    assert "its splits are train, test" in refusal(tmp_path / "several", split="validation")
    one.select(range(3)).map(lambda row: {"input_ids": [1, len(row["text"])]}).save_to_disk(tmp_path / "ids")
    assert of(tmp_path / "ids", text_column="input_ids") == [[1, 10]] * 3

    (tmp_path / "set").mkdir()
    write(tmp_path / "set/train.jsonl", *(json.dumps({"text": row}) for row in texts[:20]))
    cache = tmp_path / "cache"
    (found,) = inputs([f"datasets:{tmp_path}/set"], cache=cache)
    assert documents([found]) == texts[:20]
    assert any(cache.rglob("*.arrow"))
    (part,) = inputs([f"datasets:{tmp_path}/set"], reading=Reading(split="train[:10%]"), cache=cache)
    assert documents([part]) == texts[:2]
    assert part.digest() != found.digest()
    with pytest.raises(SpikepatchError, match="the data set cannot be loaded"):
        inputs([f"datasets:{tmp_path}/set::nothing"], cache=cache)


def megatron(path: Path, sequences: list[list[int]], borders: list[int], dtype: str = "uint16") -> None:
    """As megatron/core/datasets/indexed_dataset.py writes a pair."""
    lengths = [len(each) for each in sequences]
    np.concatenate([np.array(each, dtype) for each in sequences]).tofile(path.with_suffix(".bin"))
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * np.dtype(dtype).itemsize
    with path.with_suffix(".idx").open("wb") as out:
        out.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", {"uint16": 8, "int32": 4}[dtype]))
        out.write(struct.pack("<QQ", len(lengths), len(borders)))
        out.write(np.array(lengths, "<i4").tobytes() + np.array(offsets, "<i8").tobytes())
        out.write(np.array(borders, "<i8").tobytes())


def test_token_files(tmp_path: Path) -> None:
    """nanoGPT's, OLMo's without a header, numpy's, llm.c's, Megatron's."""
    ids = [*range(1000), 65_535]
    for dtype in ("uint16", "uint32"):
        for name in ("train.bin", "part-0.npy"):
            np.array(ids, dtype).tofile(tmp_path / name)
            assert of(tmp_path / name, token_dtype=dtype) == [ids]
            assert "--token-dtype uint16" in refusal(tmp_path / name)
        np.save(tmp_path / "saved.npy", np.array(ids, dtype))
        assert of(tmp_path / "saved.npy") == [ids]
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    (tmp_path / "llm.bin").write_bytes(header.tobytes() + np.array(ids, np.uint16).tobytes())
    assert of(tmp_path / "llm.bin") == [ids]
    for dtype in ("uint16", "int32"):
        megatron(tmp_path / "m", [[1, 2, 3], [4], [5, 6]], [0, 1, 3], dtype)
        assert of(tmp_path / "m.bin") == [[1, 2, 3], [4, 5, 6]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spikepatch.data.token_files.PIECE", 2)
        assert of(tmp_path / "m.bin") == [[1, 2, 3], [4, 5, 6]]
        assert of(tmp_path / "llm.bin") == [ids]
    assert [*said(inputs([str(tmp_path / "m.bin")]))] == [
        f"{tmp_path}/m.bin: Megatron's pair, int32, taken as they are"
    ]


def test_damaged_token_files(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"\1\2\3")
    assert "3 bytes are no whole number of uint16" in refusal(tmp_path / "odd.bin", token_dtype="uint16")
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 10
    (tmp_path / "llm.bin").write_bytes(header.tobytes() + bytes(18))
    assert "its header says 10 tokens, and there are 9" in refusal(tmp_path / "llm.bin")
    np.save(tmp_path / "square.npy", np.zeros((2, 2), np.int32))
    np.save(tmp_path / "floats.npy", np.zeros(2))
    for name in ("square", "floats"):
        assert "no list of token ids" in refusal(tmp_path / f"{name}.npy")
    megatron(tmp_path / "m", [[1, 2, 3], [4]], [0, 1, 2])
    whole, index = (tmp_path / "m.bin").read_bytes(), (tmp_path / "m.idx").read_bytes()
    cases = {
        "4 tokens of uint16, and m.bin 6 bytes": (whole[:-2], index),
        "the index is truncated": (whole, index[:-1]),
        "does not begin as Megatron's do": (whole, b"TNTIDX\x00\x00" + index[8:]),
        "version 2": (whole, index[:9] + b"\2" + index[10:]),
        "do not lie one after the other": (whole, index[:34] + b"\4" + index[35:]),
    }
    for why, (content, described) in cases.items():
        (tmp_path / "m.bin").write_bytes(content)
        (tmp_path / "m.idx").write_bytes(described)
        message = refusal(tmp_path / "m.bin")
        assert "m.idx: the pair of Megatron's files does not fit together" in message
        assert why in message


def test_numbers_are_no_text(tmp_path: Path) -> None:
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "tokens.txt")
    assert "it has zero bytes, as files of numbers have" in refusal(tmp_path / "tokens.txt")
    (tmp_path / "a.txt").write_bytes(b"fine so far\n" * 200_000 + b"\xe9t\xe9")
    assert f"{tmp_path}/a.txt: the file cannot be read\n  why: it is not UTF-8 text" in refusal(tmp_path / "a.txt")


def test_globs_are_sorted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b", "a", "sub/c"):
        write(tmp_path / f"{name}.txt", name)
    (tmp_path / "folder.txt").mkdir()
    assert of(f"{tmp_path}/**/*.txt") == ["a\n", "b\n", "sub/c\n"]
    assert of(f"{tmp_path}/[ab].txt") == ["a\n", "b\n"]
    assert [*said(inputs([f"{tmp_path}/[ab].txt"]))] == [f"2 files such as {tmp_path}/a.txt: plain text, one document"]
    write(tmp_path / "[ab].txt", "a file of that very name")
    assert of(f"{tmp_path}/[ab].txt") == ["a file of that very name\n"]


def test_the_standard_library() -> None:
    found = inputs(["builtin:stdlib"])
    names = [each.name for each in found]
    assert len(names) > 500
    assert not [name for name in names if "site-packages" in name]
    assert sum(each.size for each in found) > 5_000_000
    (argparse,) = (each for each in found if each.name.endswith("/argparse.py"))
    assert documents([argparse]) == [Path(argparse.name).read_bytes().decode()]


@given(text=st.text(st.sampled_from("ab\n\r€"), max_size=200), piece=st.integers(1, 20))
def test_pieces_are_the_text(text: str, piece: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the length of a piece; line ends stay as they are, and only the last piece ends the document."""
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    lines, table = path.with_suffix(".jsonl"), path.with_suffix(".csv")
    lines.write_text(json.dumps({"text": text}))
    with table.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out, quoting=csv.QUOTE_ALL).writerows([["text"], [text]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "PIECE", piece)
        for file in (path, lines, table):
            found: list[Any] = list(inputs([str(file)])[0].read())
            assert "".join(each.content for each in found) == text
            assert [each.last for each in found] == [False] * (len(found) - 1) + [True] * bool(text)
            assert all(0 < len(each.content) <= 2 * piece for each in found)
            assert all(each.read <= file.stat().st_size for each in found)


def test_what_is_refused(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.txt", "one")
    cases: list[tuple[tuple[str, ...], str]] = [
        ((str(tmp_path),), r"--data .*: is a folder\n.*not guessed\n.*/\*\*/\*\.txt'"),
        ((f"{tmp_path}/nothing.txt",), r"--data .*nothing.txt: no file is there\n.*matches none\n.*builtin:stdlib"),
        ((plain, f"{tmp_path}/*.txt"), r"a\.txt: the same data are given twice\n.*\*\.txt names them again\n.*once"),
    ]
    for data, expected in cases:
        assert re.search(expected, refusal(*data)), data


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write(path, "one")

    def denied(*_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # root may read everything
        patch.setattr("os.open", denied)
        assert "why: Permission denied" in refusal(path)
    (found,) = inputs([str(path)])
    path.unlink()
    with pytest.raises(SpikepatchError, match="No such file"):
        list(found.read())
    with pytest.raises(SpikepatchError, match="No such file"):
        found.digest()
