"""Files of token ids as teams have them: raw uint16 or uint32, llm.c's and numpy's with a header, Megatron's pairs."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spikepatch.data.rows import PIECE, DocumentPiece, Reading, unreadable
from spikepatch.errors import BadSource, Refused
from spikepatch.source.local import opened, read_file

#: Endings, in lower case, of files of tokens; ``.npy`` of OLMo's has no header.
ENDINGS = (".bin", ".npy", ".u16", ".u32")

#: The first number of llm.c's header of 256 int32 -> the numbers behind it. Its second number is the version; the third
#: the number of tokens (llm.c: dev/data/data_common.py, write_datafile).
_LLM_C = {20240520: ("uint16", 1), 20240801: ("uint32", 7)}
_LLM_C_BYTES = 1024

#: megatron/core/datasets/indexed_dataset.py: ``_IndexWriter`` and ``DType``.
_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_MEGATRON_HEAD = struct.Struct("<9sQBQQ")


@dataclass(frozen=True)
class TokenFile:
    """``count`` integers of ``dtype``, little-endian, from byte ``start`` on. ``form``: for people.

    ``ends``: where documents end, counted in tokens, if that is known. ``index``: the file that says so.
    ``uses``: as ``documents.Input.uses``.
    """

    path: Path
    form: str
    dtype: str
    start: int
    count: int
    ends: npt.NDArray[np.int64]
    index: Path | None = None
    uses: tuple[str, ...] = ()

    def pieces(self) -> Iterator[DocumentPiece]:
        """All of it, and no more of it in memory than a piece."""
        dtype = np.dtype(self.dtype).newbyteorder("<")
        done = 0
        with opened(self.path) as file:
            file.seek(self.start)
            while done < self.count:
                coming = self.ends[np.searchsorted(self.ends, done, side="right") :][:1]
                end = min(done + PIECE, self.count, *coming.tolist())
                content = file.read((end - done) * dtype.itemsize)
                if len(content) < (end - done) * dtype.itemsize:
                    raise unreadable(self.path, "it has become shorter while it was read")
                done = end
                last = done == self.count or done in coming.tolist()
                yield DocumentPiece(np.frombuffer(content, dtype), last, file.tell())


def token_file(path: Path, reading: Reading) -> TokenFile:
    """What the file is, by its header, by the ``.idx`` beside it, or by ``--token-dtype``.

    Raises:
        BadSource: it is damaged.
        Refused: nothing says what it is.
    """
    with opened(path) as file:
        head = file.read(_LLM_C_BYTES)
    size = path.stat().st_size
    index = path.with_suffix(".idx")
    if path.suffix.lower() == ".bin" and index.exists():
        return _megatron(path, index, size)
    if head[:6] == b"\x93NUMPY":
        return _numpy(path, size)
    if len(head) == _LLM_C_BYTES and (number := int.from_bytes(head[:4], "little")) in _LLM_C:
        dtype, version = _LLM_C[number]
        if int.from_bytes(head[4:8], "little") == version:
            count = int.from_bytes(head[8:12], "little")
            return _plain(path, "llm.c's tokens", dtype, _LLM_C_BYTES, size, count)
    if reading.token_dtype is None:
        raise Refused(
            what="what its numbers are is not known",
            where=str(path),
            why="a file of this name holds raw token ids, and has no header and no .idx file beside it",
            remedy="--token-dtype uint16, as nanoGPT and OLMo write them, or uint32; a text has a name such as a.txt",
        )
    raw = _plain(path, "raw tokens", reading.token_dtype, 0, size, None)
    return replace(raw, uses=("token_dtype",))


def _plain(path: Path, form: str, dtype: str, start: int, size: int, count: int | None) -> TokenFile:
    width = np.dtype(dtype).itemsize
    held, rest = divmod(size - start, width)
    if rest or (count is not None and held != count):
        why = f"{size - start:,} bytes are no whole number of {dtype}" if rest else f"its header says {count:,} tokens"
        raise BadSource(
            "it is truncated, or of another type",
            where=str(path),
            why=why if rest else f"{why}, and there are {held:,}",
            remedy="write it again" if count is not None else "check --token-dtype, and that the file is whole",
        )
    return TokenFile(path, f"{form}, {dtype}", dtype, start, held, np.empty(0, np.int64))


def _numpy(path: Path, size: int) -> TokenFile:
    try:
        found: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise unreadable(path, f"numpy cannot read it ({error})") from error
    if found.ndim != 1 or found.dtype.kind not in "iu" or found.dtype.byteorder == ">":
        raise unreadable(path, f"it is an array of {found.dtype} of shape {found.shape}, and no list of token ids")
    return _plain(path, "numpy's array", str(found.dtype), size - found.nbytes, size, len(found))


def _megatron(path: Path, index: Path, size: int) -> TokenFile:
    def damaged(why: str) -> BadSource:
        return BadSource(
            "the pair of Megatron's files does not fit together",
            where=str(index),
            why=why,
            remedy=f"copy {path.name} and {index.name} again, or make them again",
        )

    stored = read_file(index, limit=1 << 36)
    if len(stored) < _MEGATRON_HEAD.size or stored[:9] != _MEGATRON:
        raise damaged("the index does not begin as Megatron's do")
    _, version, code, sequences, documents = _MEGATRON_HEAD.unpack_from(stored)
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise damaged(f"version {version} and type {code} of the index are not known")
    place = _MEGATRON_HEAD.size
    if len(stored) < place + 12 * sequences + 8 * documents:
        raise damaged(f"the index is truncated: it is to have {sequences:,} sequences and {documents:,} documents")
    dtype = np.dtype(_MEGATRON_DTYPES[code])
    lengths = np.frombuffer(stored, "<i4", sequences, place).astype(np.int64)
    pointers = np.frombuffer(stored, "<i8", sequences, place + 4 * sequences)
    borders = np.frombuffer(stored, "<i8", documents, place + 12 * sequences)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 0).any() or not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise damaged("its sequences do not lie one after the other")
    if ends[-1] * dtype.itemsize != size:
        raise damaged(f"the index has {ends[-1]:,} tokens of {dtype}, and {path.name} {size:,} bytes")
    if len(borders) and (borders.min() < 0 or borders.max() > sequences or (np.diff(borders) < 0).any()):
        raise damaged("its documents are not in order")
    found = np.unique(ends[borders] if len(borders) else ends)
    return TokenFile(path, f"Megatron's pair, {dtype}", str(dtype), 0, int(ends[-1]), found[found > 0], index)
