"""What DATA means: text, jsonl and parquet files, globs, data sets of the Hub, the standard library -> documents."""

from __future__ import annotations

import glob
import hashlib
import importlib
import io
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikepatch.errors import BadSource, Refused
from spikepatch.source.local import local_path, opened

#: Characters. A longer document is read, and tokenised, in pieces that end with a line.
PIECE = 1 << 20

STDLIB, DATASETS = "builtin:stdlib", "datasets:"

#: Where documents are in jsonl, parquet and data sets.
_COLUMN = "text"

_INSTALL = 'pip install "spikepatch[data]"'


@dataclass(frozen=True)
class TextPiece:
    """A part of a document. ``last``: the document ends here. ``read``: bytes of its input that are behind it."""

    text: str
    last: bool
    read: int


@dataclass(frozen=True)
class Input:
    """A file, or a data set. ``size`` is in bytes, as ``TextPiece.read`` is; ``digest`` gives its SHA-256."""

    name: str
    size: int
    read: Callable[[], Iterator[TextPiece]]
    digest: Callable[[], str]


def inputs(data: Sequence[str], option: str = "--data") -> tuple[Input, ...]:
    """What DATA stands for, in the order of the arguments, and within a glob of the paths.

    - ``builtin:stdlib``: the Python standard library's own ``.py`` files on this machine, those in UTF-8;
    - ``datasets:NAME``, ``datasets:NAME:CONFIG``, ``datasets:NAME:CONFIG:SPLIT``: column ``text`` of a data set, by
      default its split ``train``; NAME is of the Hub, or a folder;
    - a file, or a glob: ``.parquet`` (column ``text``), ``.jsonl`` and ``.json`` (an object with ``text`` on each
      line), any other is one document of UTF-8 text.

    Raises:
        BadSource: there is no such file, or it cannot be read.
        Refused: the same file is named twice, or a package is missing.
    """
    found: dict[str, Input] = {}
    for argument in data:
        for each in _resolve(argument, option):
            if each.name in found:
                raise Refused(
                    what="the same data are given twice",
                    where=each.name,
                    why=f"{option} {argument} names them again",
                    remedy="name every file once; globs must not overlap",
                )
            found[each.name] = each
    return tuple(found.values())


def _resolve(argument: str, option: str) -> list[Input]:
    if argument == STDLIB:
        return _standard_library()
    if argument.startswith(DATASETS):
        return [_dataset(argument)]
    path = local_path(argument)
    if path.is_dir():
        raise BadSource(
            "is a folder", where=f"{option} {argument}", why="which of its files are meant is not guessed",
            remedy=f"give a glob in quotes, such as '{argument.rstrip('/')}/**/*.txt'",
        )  # fmt: skip
    if path.exists():
        return [_file(path)]
    files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if not os.path.isdir(name))
    if not files:
        raise BadSource(
            "no file is there",
            where=f"{option} {argument}",
            why="it is no file, and as a glob it matches none",
            remedy=f"give a file, a glob in quotes, {DATASETS}NAME for a data set of the Hub, or {STDLIB}",
        )
    return [_file(file) for file in files]


def _file(path: Path) -> Input:
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _jsonl, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower(), _text)

    def read() -> Iterator[TextPiece]:
        try:
            yield from reader(path)
        except OSError as error:
            raise _unreadable(path, error.strerror or str(error)) from error

    try:
        size = path.stat().st_size
        opened(path).close()
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    if reader is _parquet:
        _package("pyarrow.parquet", str(path))
    return Input(os.path.realpath(path), size, read, lambda: _digest(path))


def _digest(path: Path) -> str:
    try:
        with opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error


def _text(path: Path) -> Iterator[TextPiece]:
    """``newline=""``: line ends stay as they are."""
    with opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as file:
        try:
            text = file.read(PIECE) + file.readline(PIECE)
            while text:
                following = file.read(PIECE)
                following += file.readline(PIECE) if following else ""
                yield TextPiece(text, not following, raw.tell())
                text = following
        except UnicodeDecodeError as error:
            raise _unreadable(path, f"it is not UTF-8 text ({error.reason})") from error


def _jsonl(path: Path) -> Iterator[TextPiece]:
    with opened(path) as file:
        read = 0
        for number, line in enumerate(file, 1):
            read += len(line)
            if line.strip():
                yield from _pieces(_text_of(line, path, number), read)


def _text_of(line: bytes, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _no_text(path, number, f"it is not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get(_COLUMN), str):
        has = f"has the fields {', '.join(sorted(record))}" if isinstance(record, dict) else "is no object"
        why = f'"{_COLUMN}" is no string' if isinstance(record, dict) and _COLUMN in record else f"it {has}"
        raise _no_text(path, number, why)
    text: str = record[_COLUMN]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _no_text(path, number, f"its text cannot be written in UTF-8 ({error.reason})") from error
    return text


def _parquet(path: Path) -> Iterator[TextPiece]:
    module = _package("pyarrow.parquet", str(path))
    try:
        file = module.ParquetFile(path)
        names = file.schema_arrow.names
    except (ValueError, OSError) as error:
        raise _unreadable(path, f"it is not parquet ({' '.join(str(error).split())[:200]})") from error
    with file:
        if _COLUMN not in names:
            raise _no_column(str(path), names)
        rows, done, size = file.metadata.num_rows, 0, path.stat().st_size
        for batch in file.iter_batches(columns=[_COLUMN], batch_size=1024):
            for text in batch.column(0).to_pylist():
                done += 1
                yield from _pieces(_string(text, str(path), done), size * done // rows)


def _dataset(argument: str) -> Input:
    """Size and position are in rows: how many bytes it has is not known in general."""
    name, *rest = argument.removeprefix(DATASETS).split(":", 2)
    config = rest[0] if rest and rest[0] else None
    split = rest[1] if len(rest) > 1 else "train"
    module = _package("datasets", argument)
    try:
        rows: Any = module.load_dataset(name, config, split=split)
    except Exception as error:  # whatever the Hub, the disk and the data set's own files raise
        raise BadSource(
            "the data set cannot be loaded",
            where=argument,
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            remedy=f"check {DATASETS}NAME:CONFIG:SPLIT against the data set's page, and the connection",
        ) from error
    if _COLUMN not in rows.column_names:
        raise _no_column(argument, rows.column_names)

    def texts() -> Iterator[str]:
        number = 0
        for batch in rows.select_columns([_COLUMN]).iter(batch_size=1024):
            for text in batch[_COLUMN]:
                number += 1
                yield _string(text, argument, number)

    def read() -> Iterator[TextPiece]:
        for number, text in enumerate(texts(), 1):
            yield from _pieces(text, number)

    def digest() -> str:
        found = hashlib.sha256()
        for text in texts():
            found.update(b"%d:" % len(text) + text.encode("utf-8"))
        return found.hexdigest()

    return Input(argument, len(rows), read, digest)


def _standard_library() -> list[Input]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    paths = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
    own = [path for path in paths if skipped.isdisjoint(path.relative_to(root).parts) and path.is_file()]
    found = [_file(path) for path in own if _is_utf8(path)]
    if not found:
        raise BadSource(
            "the standard library's sources are not here",
            where=STDLIB,
            why=f"{root} has no .py files",
            remedy="give text files of your own",
        )
    return found


def _is_utf8(path: Path) -> bool:
    """Some of the files of Python's own tests are in other encodings, and some are broken on purpose."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _pieces(text: str, read: int) -> Iterator[TextPiece]:
    """``text``, cut behind the first line end after every ``PIECE`` characters."""
    start = 0
    while len(text) - start > PIECE:
        line = text.find("\n", start + PIECE, start + 2 * PIECE)
        end = line + 1 if line >= 0 else min(start + 2 * PIECE, len(text))
        if end == len(text):
            break
        yield TextPiece(text[start:end], False, read)
        start = end
    if text:
        yield TextPiece(text[start:], True, read)


def _string(text: object, where: str, row: int) -> str:
    if not isinstance(text, str):
        raise BadSource(
            f"row {row} has no text",
            where=where,
            why=f'its "{_COLUMN}" is a {type(text).__name__}, not a string',
            remedy="take such rows out",
        )
    return text


def _no_column(where: str, names: Sequence[str]) -> BadSource:
    return BadSource(
        f'it has no column "{_COLUMN}"',
        where=where,
        why=f"its columns are {', '.join(names)}",
        remedy=f'rename the column with the documents to "{_COLUMN}"',
    )


def _no_text(path: Path, line: int, why: str) -> BadSource:
    return BadSource(
        f"line {line} has no text",
        where=str(path),
        why=why,
        remedy=f'a document is a line such as {{"{_COLUMN}": "..."}}',
    )


def _unreadable(path: Path, why: str) -> BadSource:
    return BadSource(
        "the file cannot be read",
        where=str(path),
        why=why,
        remedy="give UTF-8 text, .jsonl or .parquet files that this user may read",
    )


def _package(module: str, where: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise Refused(
            what=f"{name} is not installed",
            where=where,
            why=f"it is needed to read these data, and is optional ({error})",
            remedy=_INSTALL,
        ) from error
