"""Tables that are stored by columns: parquet and arrow files, folders of ``save_to_disk``, data sets of the Hub."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spikepatch.data.rows import BadRow, Column, DocumentPiece, choose, of_value, unreadable
from spikepatch.errors import BadSource, on_one_line
from spikepatch.source.local import opened

DATASETS = "datasets:"

#: Rows of one step; a row may be large.
_ROWS = 64

Batches = Callable[[str | None], Iterator[Any]]
"""Of a column, or of all: pyarrow's record batches."""


def parquet(path: Path) -> tuple[int, Batches]:
    """The number of rows, and a way to read them."""
    from pyarrow.parquet import ParquetFile

    with _checked(path, "parquet"), ParquetFile(path) as file:
        rows = file.metadata.num_rows

    def batches(column: str | None) -> Iterator[Any]:
        with _checked(path, "parquet"), ParquetFile(path) as file:
            yield from file.iter_batches(columns=None if column is None else [column], batch_size=_ROWS)

    return rows, batches


def arrow(path: Path) -> tuple[int, Batches]:
    """The file format, or the stream format, which ``datasets`` writes."""
    import pyarrow

    def whole() -> Iterator[Any]:
        with opened(path) as raw, pyarrow.PythonFile(raw, "r") as file:
            magic = raw.read(6)
            raw.seek(0)
            if magic == b"ARROW1":
                stored = pyarrow.ipc.open_file(file)
                yield from (stored.get_batch(i) for i in range(stored.num_record_batches))
            else:
                yield from pyarrow.ipc.open_stream(file)

    def batches(column: str | None) -> Iterator[Any]:
        with _checked(path, "arrow"):
            for batch in whole():
                part = batch if column is None else batch.select([column])
                yield from (part.slice(start, _ROWS) for start in range(0, part.num_rows, _ROWS))

    with _checked(path, "arrow"):
        return sum(batch.num_rows for batch in whole()), batches


def saved_folder(path: Path, split: str | None) -> tuple[int, Batches] | None:
    """A folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` has written; None where it is none."""
    if not any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return None
    import datasets

    try:
        found: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever its own files raise
        raise BadSource(
            "the folder of a data set cannot be read",
            where=str(path),
            why=on_one_line(error),
            remedy="write it again by save_to_disk",
        ) from error
    return _of_dataset(found, str(path), split)


def of_hub(argument: str, split: str | None, cache: Path) -> tuple[int, Batches]:
    """``datasets:NAME``, ``datasets:NAME:CONFIG`` or ``datasets:NAME:CONFIG:SPLIT``; NAME: of the Hub, or a folder."""
    name, *rest = argument.removeprefix(DATASETS).split(":", 2)
    config = rest[0] if rest and rest[0] else None
    split = rest[1] if len(rest) > 1 else split or "train"
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    try:
        datasets.disable_progress_bars()
        found: Any = datasets.load_dataset(name, config, split=split, cache_dir=str(cache))
    except Exception as error:  # whatever the Hub, the disk and the data set's own files raise
        raise BadSource(
            "the data set cannot be loaded",
            where=argument,
            why=on_one_line(error),
            remedy=f"check {DATASETS}NAME:CONFIG and --split against the data set's page, and the connection",
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    return _of_dataset(found, argument, None)


def _of_dataset(found: Any, where: str, split: str | None) -> tuple[int, Batches]:
    if isinstance(found, dict):
        wanted = split or "train"
        if wanted not in found:
            raise BadSource(
                f"it has no split {wanted!r}",
                where=where,
                why=f"its splits are {', '.join(found)}",
                remedy="--split NAME takes one of them",
            )
        found = found[wanted]

    def batches(column: str | None) -> Iterator[Any]:
        part = found if column is None else found.select_columns([column])
        for table in part.with_format("arrow").iter(batch_size=_ROWS):
            yield from table.to_batches()

    return len(found), batches


def column_of(where: str, batches: Batches, wanted: str | None) -> Column:
    """Where the documents are, by the names of the columns and the types of their values."""
    import pyarrow.types as types

    first = next(batches(None), None)
    if first is None:
        raise BadSource("it has no rows", where=where, why="the table is empty", remedy="give other files")
    kinds = {f.name: [] if types.is_list(f.type) or types.is_large_list(f.type) else "" for f in first.schema}
    kinds |= {f.name: [] for f in first.schema if types.is_fixed_size_list(f.type)}
    return choose(where, kinds, wanted)


def documents(where: str, batches: Batches, column: Column, rows: int, size: int) -> Iterator[DocumentPiece | BadRow]:
    """Each row's document, or why it is none. ``size``: what all of them count, for the progress."""
    done = 0
    for batch in batches(column.name):
        for value in batch.column(0):
            done += 1
            tokens = column.kind == "tokens" and value.is_valid
            found = value.values.to_numpy(zero_copy_only=False) if tokens else value.as_py()
            yield from of_value(found, column, f"{where}: row {done}", size * done // max(rows, 1))


def digest(batches: Batches, column: Column) -> str:
    """SHA-256 of a column's values; of a data set's files nothing is known."""
    found = hashlib.sha256()
    for batch in batches(column.name):
        found.update(repr(batch.column(0).to_pylist()).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


@contextlib.contextmanager
def _checked(path: Path, kind: str) -> Iterator[None]:
    """What pyarrow raises of a file that is damaged, or another one."""
    try:
        yield
    except BadSource:
        raise
    except (ValueError, OSError, NotImplementedError) as error:  # pyarrow's own errors are such
        why = getattr(error, "strerror", None) or f"it is not {kind}, or damaged ({on_one_line(error, 200)})"
        raise unreadable(path, why) from error
