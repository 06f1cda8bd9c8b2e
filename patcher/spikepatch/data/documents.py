"""What DATA means: files of text or tokens, globs, data sets, the standard library -> documents, piece by piece."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from spikepatch.data import columns, rows
from spikepatch.data.columns import DATASETS
from spikepatch.data.rows import BadRow, Column, DocumentPiece, Reading, endings, unreadable
from spikepatch.data.token_files import ENDINGS, token_file
from spikepatch.errors import BadSource, Refused
from spikepatch.source.local import local_path, opened

STDLIB = "builtin:stdlib"

#: Bad rows that an error names.
_NAMED = 5


@dataclass(frozen=True)
class Input:
    """A file, or a data set.

    Attributes:
        name: the file's real path.
        size: in bytes, as ``DocumentPiece.read`` is; of a data set, in rows.
        kind: what its documents are.
        taken: as what it is read, for people.
        read: its documents.
        digest: SHA-256 of what they depend on.
        uses: the fields of ``Reading`` that it depends on.
    """

    name: str
    size: int
    kind: Literal["text", "tokens"]
    taken: str
    read: Callable[[], Iterator[DocumentPiece | BadRow]]
    digest: Callable[[], str]
    uses: tuple[str, ...] = ()


def inputs(
    data: Sequence[str], option: str = "--data", *, reading: Reading | None = None, cache: Path | None = None
) -> tuple[Input, ...]:
    """What DATA stands for, in the order of the arguments, and within a glob of the paths.

    - ``builtin:stdlib``: the Python standard library's own ``.py`` files on this machine, those in UTF-8;
    - ``datasets:NAME``, ``datasets:NAME:CONFIG``, ``datasets:NAME:CONFIG:SPLIT``: a data set, by default its split
      ``train``; NAME is of the Hub, or a folder;
    - a folder that ``save_to_disk`` of ``datasets`` has written;
    - a file, or a glob: ``.parquet`` and ``.arrow``; ``.jsonl`` and ``.json`` (an object on each line, or an array of
      them); ``.csv`` and ``.tsv``; ``.bin`` and ``.npy`` (tokens: Megatron's with its ``.idx``, llm.c's, numpy's, raw
      ones of ``reading.token_dtype``); any other is one document of UTF-8 text. Text may be compressed: ``.gz``,
      ``.zst``, ``.bz2``, ``.lz4``, ``.xz``.

    A table's documents are its column ``text``, or ``input_ids``, or the one that ``reading`` names; lists of numbers
    are token ids, which are taken as they are.

    Args:
        cache: where ``datasets`` keeps what it loads.

    Raises:
        BadSource: there is no such file, or it cannot be read, or it has no such column.
        Refused: the same file is named twice, or it is not known what it is.
    """
    found: dict[str, Input] = {}
    for argument in data:
        for each in _resolve(argument, option, reading or Reading(), cache):
            if each.name in found:
                raise Refused(
                    what="the same data are given twice",
                    where=each.name,
                    why=f"{option} {argument} names them again",
                    remedy="name every file once; globs must not overlap",
                )
            found[each.name] = each
    return tuple(found.values())


def check_used(found: Iterable[Input], reading: Reading) -> None:
    """Refuse an option that nothing of the data takes: it was meant for something."""
    used = {name for each in found for name in each.uses}
    for name in ("text_column", "split", "token_dtype"):
        if getattr(reading, name) is not None and name not in used:
            option = "--" + name.replace("_", "-")
            raise Refused(
                what=f"{option} has no meaning for these data",
                where=f"{option} {getattr(reading, name)}",
                why=f"none of them {_MEANT_FOR[name]}",
                remedy="leave it out, or look at what is taken for what",
            )


#: What each of the options is of.
_MEANT_FOR = {
    "text_column": "is a table", "split": "is a data set with splits", "token_dtype": "is a file of raw tokens",
}  # fmt: skip


def said(found: Iterable[Input]) -> Iterator[str]:
    """What is taken for what: a sentence for each kind of file."""
    found = list(found)
    for taken, count in Counter(each.taken for each in found).items():
        first = next(each.name for each in found if each.taken == taken)
        yield f"{first}: {taken}" if count == 1 else f"{count:,} files such as {first}: {taken}"


class BadRows:
    """Counts rows that are no documents, and names the first."""

    def __init__(self) -> None:
        self.count: int = 0
        self.named: list[str] = []

    def add(self, row: BadRow) -> None:
        self.count += 1
        if len(self.named) < _NAMED:
            self.named.append(f"{row.where}: {row.why}")

    def check(self, option: str) -> None:
        """Raises BadSource if there were any."""
        if self.count:
            more = f" (and {self.count - len(self.named):,} more)" if self.count > len(self.named) else ""
            raise BadSource(
                f"{self.count:,} row{' has' if self.count == 1 else 's have'} no document",
                where=option,
                why="\n       ".join(self.named) + more,
                remedy="--text-column names another column; --skip-bad leaves such rows out",
            )


def _resolve(argument: str, option: str, reading: Reading, cache: Path | None) -> list[Input]:
    if argument == STDLIB:
        return _standard_library()
    if argument.startswith(DATASETS):
        assert cache is not None
        found = columns.of_hub(argument, reading.split, cache)
        return [_of_columns(argument, "a data set", *found, reading, uses=("split",))]
    path = local_path(argument)
    if path.is_dir():
        saved = columns.saved_folder(path, reading.split)
        if saved is not None:
            splits = ("split",) if (path / "dataset_dict.json").exists() else ()
            return [_of_columns(os.path.realpath(path), "a saved data set", *saved, reading, uses=splits)]
        raise BadSource(
            "is a folder", where=f"{option} {argument}", why="it is none of save_to_disk, and which of its files are"
            " meant is not guessed",
            remedy=f"give a glob in quotes, such as '{argument.rstrip('/')}/**/*.txt'",
        )  # fmt: skip
    if path.exists():
        return [_file(path, reading)]
    files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if not os.path.isdir(name))
    if not files:
        raise BadSource(
            "no file is there",
            where=f"{option} {argument}",
            why="it is no file, and as a glob it matches none",
            remedy=f"give a file, a glob in quotes, {DATASETS}NAME for a data set of the Hub, or {STDLIB}",
        )
    return [_file(file, reading) for file in files]


def _file(path: Path, reading: Reading) -> Input:
    kind, packed = endings(path)
    try:
        opened(path).close()
        if kind in (".parquet", ".arrow") and not packed:
            table = columns.parquet(path) if kind == ".parquet" else columns.arrow(path)
            return _of_columns(os.path.realpath(path), f"{kind[1:]}", *table, reading, file=path)
        if kind in ENDINGS and not packed:
            found = token_file(path, reading)
            return _input(
                path, "tokens", f"{found.form}, taken as they are", found.pieces, beside=found.index, uses=found.uses
            )
        how = f", {packed[1:]}" if packed else ""
        if kind in rows.LINES:
            column = rows.column_of_lines(path, reading.text_column)
            read = partial(rows.lines, path, column)
            return _input(path, column.kind, f"JSON{how}, {_named(column)}", read, uses=("text_column",))
        if kind in rows.TABLES:
            column = rows.column_of_table(path, reading.text_column)
            read = partial(rows.table, path, column)
            return _input(path, "text", f"CSV{how}, {_named(column)}", read, uses=("text_column",))
    except rows.UNREADABLE as error:
        raise unreadable(path, getattr(error, "strerror", None) or str(error)) from error
    return _input(path, "text", f"plain text{how}, one document", partial(rows.text, path))


def _named(column: Column) -> str:
    return f"column {column.name!r}" + (" of token ids, taken as they are" if column.kind == "tokens" else "")


def _input(
    path: Path,
    kind: Literal["text", "tokens"],
    taken: str,
    reader: Callable[[], Iterator[DocumentPiece | BadRow]],
    *,
    beside: Path | None = None,
    uses: tuple[str, ...] = (),
) -> Input:
    files = [path] if beside is None else [path, beside]

    def read() -> Iterator[DocumentPiece | BadRow]:
        try:
            yield from reader()
        except rows.UNREADABLE as error:
            raise unreadable(path, getattr(error, "strerror", None) or str(error)) from error

    return Input(os.path.realpath(path), path.stat().st_size, kind, taken, read, partial(_digest, *files), uses)


def _of_columns(
    name: str,
    form: str,
    count: int,
    batches: columns.Batches,
    reading: Reading,
    *,
    file: Path | None = None,
    uses: tuple[str, ...] = (),
) -> Input:
    column = columns.column_of(name, batches, reading.text_column)
    size = count if file is None else file.stat().st_size
    read = partial(columns.documents, name, batches, column, count, size)
    digest = partial(columns.digest, batches, column) if file is None else partial(_digest, file)
    return Input(name, size, column.kind, f"{form}, {_named(column)}", read, digest, (*uses, "text_column"))


def _digest(*paths: Path) -> str:
    found = []
    for path in paths:
        try:
            with opened(path) as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise unreadable(path, error.strerror or str(error)) from error
    return " ".join(found)


def _standard_library() -> list[Input]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    paths = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
    own = [path for path in paths if skipped.isdisjoint(path.relative_to(root).parts) and path.is_file()]
    found = [_file(path, Reading()) for path in own if _is_utf8(path)]
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
        content = path.read_bytes()
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in content
