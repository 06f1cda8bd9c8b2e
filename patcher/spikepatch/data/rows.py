"""Files of text, row by row: plain text, JSON lines, CSV, compressed or not -> pieces of documents.

A row that is none is told by file and line, and the rows after it are read all the same; a library that takes a file
as a table cannot do that. Decompression is pyarrow's, which reads files of several frames and tells truncated ones.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spikepatch.errors import BadSource
from spikepatch.source.local import opened

#: Characters, or tokens. A longer document is read, and tokenised, in pieces; those of text end with a line.
PIECE = 1 << 20

Ids = npt.NDArray[np.integer[Any]]

#: The ending of a compressed file -> pyarrow's name for it.
_CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".lz4": "lz4"}

#: How a compressed file begins, whatever it is called.
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\x00": ".xz", b"\x04\x22\x4d\x18": ".lz4"}

#: What reading a file raises, or unpacking it.
UNREADABLE = (OSError, EOFError, lzma.LZMAError)

#: Endings, in lower case, of files that are not plain text.
LINES, TABLES = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv")

#: Rows that are looked through for one that tells what the columns are.
_LOOKED_AT = 1000

#: The columns that are taken where none is named, in this order.
_USUAL = ("text", "input_ids")


@dataclass(frozen=True)
class DocumentPiece:
    """A part of a document. ``last``: the document ends here. ``read``: bytes of its input that are behind it."""

    content: str | Ids
    last: bool
    read: int


@dataclass(frozen=True)
class BadRow:
    """``where``: file and line, or row."""

    where: str
    why: str
    read: int


@dataclass(frozen=True)
class Reading:
    """How data are to be read; see ``documents.inputs``.

    Attributes:
        text_column: the column of the documents; None: ``text``, or ``input_ids`` where there is no such column.
        split: of data sets that have several.
        token_dtype: of files of raw tokens.
        skip_bad: rows without a document are left out, and counted.
    """

    text_column: str | None = None
    split: str | None = None
    token_dtype: Literal["uint16", "uint32"] | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class Column:
    """Where the documents of a table are, and what they are."""

    name: str
    kind: Literal["text", "tokens"]


def endings(path: Path) -> tuple[str, str]:
    """What a file's name says: its kind, and how it is compressed (or nothing)."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in (*_CODECS, ".xz") else ""
    return suffixes[-1] if suffixes else "", packed


def unpacked(path: Path) -> tuple[io.BufferedReader, Any]:
    """The file as it lies on the disk, whose ``tell`` is the progress, and its content."""
    raw, packed = opened(path), endings(path)[1]
    begins = raw.read(6)
    raw.seek(0)
    packed = packed or next((ending for magic, ending in _MAGIC.items() if begins.startswith(magic)), "")
    if not packed:
        return raw, raw
    if packed == ".xz":
        return raw, lzma.open(raw)
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), _CODECS[packed])
    return raw, io.BufferedReader(stream, 1 << 16)


def text(path: Path) -> Iterator[DocumentPiece]:
    """One document. Line ends stay as they are; a mark of the byte order is none of it."""
    raw, content = unpacked(path)
    with raw, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as file:
        try:
            part = file.read(PIECE) + file.readline(PIECE)
            while part:
                if "\0" in part:
                    raise BadSource(
                        "the file is no text",
                        where=str(path),
                        why="it has zero bytes, as files of numbers have",
                        remedy="take them out of a text; raw tokens are files whose names end with .bin or .npy",
                    )
                following = file.read(PIECE)
                following += file.readline(PIECE) if following else ""
                yield DocumentPiece(part, not following, raw.tell())
                part = following
        except UnicodeDecodeError as error:
            raise unreadable(path, f"it is not UTF-8 text ({error.reason})") from error


def lines(path: Path, column: Column) -> Iterator[DocumentPiece | BadRow]:
    """Of JSON: each line an object; or all of the file one array of them."""
    for where, found, read in _objects(path):
        if isinstance(found, str):
            yield BadRow(where, found, read)
        else:
            yield from of_value(found.get(column.name, _Missing(tuple(found))), column, where, read)


def column_of_lines(path: Path, wanted: str | None) -> Column:
    """Where the documents are, by the first line that is an object."""
    for i, (_, found, _) in enumerate(_objects(path)):
        if i == _LOOKED_AT:
            break
        if not isinstance(found, str):
            return choose(str(path), {name: value for name, value in found.items() if value is not None}, wanted)
    return Column(wanted or _USUAL[0], "text")


def table(path: Path, column: Column) -> Iterator[DocumentPiece | BadRow]:
    """Of CSV, with the names of the columns in the first line; quoted values may have several lines."""
    rows = _table_rows(path)
    _, header, _ = next(rows, (0, [], 0))
    place = header.index(column.name)
    for line, row, read in rows:
        where = f"{path}:{line}"
        if len(row) != len(header):
            yield BadRow(where, f"it has {len(row)} values, and the first line has {len(header)}", read)
        else:
            yield from of_value(row[place], column, where, read)


def column_of_table(path: Path, wanted: str | None) -> Column:
    _, header, _ = next(_table_rows(path), (0, [], 0))
    found = choose(str(path), dict.fromkeys(header, ""), wanted)
    return Column(found.name, "text")


def choose(where: str, row: dict[str, Any], wanted: str | None) -> Column:
    """The column that is meant, of a table with such a row.

    Raises:
        BadSource: there is none.
    """
    name = wanted or next((name for name in _USUAL if name in row), None)
    if name is None or name not in row:
        missing = wanted or " or ".join(_USUAL)
        raise BadSource(
            f"it has no column {missing!r}" if wanted else f"it has no column {missing}",
            where=where,
            why=f"its columns are {', '.join(row)}" if row else "it has no columns",
            remedy="--text-column NAME says which column has the documents",
        )
    return Column(name, "text" if isinstance(row[name], str) else "tokens")


def of_value(value: object, column: Column, where: str, read: int) -> Iterator[DocumentPiece | BadRow]:
    """The document that a row of ``column`` is, or why it is none."""
    if isinstance(value, _Missing):
        yield BadRow(where, f'it has no "{column.name}"; its fields are {", ".join(value.fields)}', read)
    elif column.kind == "text":
        yield from _of_text(value, column, where, read)
    else:
        yield from _of_tokens(value, column, where, read)


@dataclass(frozen=True)
class _Missing:
    fields: tuple[str, ...]


def _of_text(value: object, column: Column, where: str, read: int) -> Iterator[DocumentPiece | BadRow]:
    if not isinstance(value, str):
        yield BadRow(where, f'its "{column.name}" is {_kind_of(value)}, and no text', read)
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        yield BadRow(where, f"its text cannot be written in UTF-8 ({error.reason})", read)
        return
    yield from _cut(value, read)


def _of_tokens(value: object, column: Column, where: str, read: int) -> Iterator[DocumentPiece | BadRow]:
    try:
        ids = np.asarray(value if value is not None else "")
    except (ValueError, OverflowError):
        ids = np.asarray("")
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        yield BadRow(
            where, f'its "{column.name}" is {_kind_of(value)}, and not of whole numbers, as token ids are', read
        )
    elif ids.size:
        yield DocumentPiece(ids.astype(np.int64), True, read)


def _kind_of(value: object) -> str:
    known = {
        "NoneType": "null", "str": "text", "list": "a list", "ndarray": "a list", "dict": "an object", "bytes": "bytes",
        "int": "a number", "float": "a number", "bool": "true or false",
    }  # fmt: skip
    return known.get(type(value).__name__, f"of the type {type(value).__name__}")


def _cut(value: str, read: int) -> Iterator[DocumentPiece]:
    """``value``, cut behind the first line end after every ``PIECE`` characters."""
    start = 0
    while len(value) - start > PIECE:
        line = value.find("\n", start + PIECE, start + 2 * PIECE)
        end = line + 1 if line >= 0 else min(start + 2 * PIECE, len(value))
        if end == len(value):
            break
        yield DocumentPiece(value[start:end], False, read)
        start = end
    if value:
        yield DocumentPiece(value[start:], True, read)


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any] | str, int]]:
    """Where it is, each object or why it is none, and the bytes read."""
    raw, content = unpacked(path)
    with raw, content:
        for number, stored in enumerate(content, 1):
            line = stored.removeprefix(b"\xef\xbb\xbf") if number == 1 else stored
            if number == 1 and endings(path)[0] == ".json" and line.lstrip()[:1] == b"[":
                yield from _array(path, line + content.read(), raw)
            elif line.strip():
                yield f"{path}:{number}", _object(line), raw.tell()


def _array(path: Path, content: bytes, raw: io.BufferedReader) -> Iterator[tuple[str, dict[str, Any] | str, int]]:
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"it begins as a JSON array, and is none ({error})") from error
    for number, row in enumerate(rows, 1):
        found = row if isinstance(row, dict) else "it is no object"
        yield f"{path}: row {number}", found, raw.tell() * number // len(rows)


def _object(line: bytes) -> dict[str, Any] | str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({error})"
    return record if isinstance(record, dict) else "it is no object"


def _table_rows(path: Path) -> Iterator[tuple[int, list[str], int]]:
    """The line on which each row begins, its values, and the bytes read."""
    before = csv.field_size_limit((1 << 31) - 1)  # of the whole process, so only while this is read
    raw, content = unpacked(path)
    with raw, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if endings(path)[0] == ".tsv" else ",", strict=True)
        begun = 1
        try:
            for row in reader:
                if row:
                    yield begun, row, raw.tell()
                begun = reader.line_num + 1
        except csv.Error as error:
            raise unreadable(path, f"the row that begins on line {begun} is not CSV ({error})") from error
        except UnicodeDecodeError as error:
            raise unreadable(path, f"it is not UTF-8 text ({error.reason})") from error
        finally:
            csv.field_size_limit(before)


def unreadable(path: Path | str, why: str) -> BadSource:
    """The error for a file that is not what its name says, or may not be read."""
    return BadSource(
        "the file cannot be read",
        where=str(path),
        why=why,
        remedy="give UTF-8 text (.txt), .jsonl, .csv, .parquet or .arrow files that this user may read, or tokens",
    )
