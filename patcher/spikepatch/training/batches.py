"""Tokens in one memory-mapped file, and batches of it by arithmetic.

    tokens = prepare(["builtin:stdlib"], tokenizing, Path("runs/x/data"))
    rows = batch(tokens, seed=0, index=step, sequences=128, length=512)      # (128, 513): inputs and targets

The tokens of all documents lie one after the other, each document ended by EOS; the last ``held_out`` of them are for
evaluation. Window w of the others is tokens w * length to (w + 1) * length inclusive: its last token is the first of
the next window, so that every token but the first is a target once per epoch. Within an epoch the windows come in the
order of a keyed permutation that is computed for each index, so a batch is a pure function of its number: to resume, or
to skip, is to go on counting.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spikepatch.apply.disk.atomic import locked, placing
from spikepatch.errors import BadTarget, Refused
from spikepatch.progress import Progress, silent
from spikepatch.source.local import read_file
from spikepatch.source.typed import parsed
from spikepatch.training.documents import PIECE, Input, TextPiece, inputs
from spikepatch.training.folder import LOCK, TOKENS
from spikepatch.training.tokenizing import Tokenizing, too_narrow

#: Of what is written here; files of another version are made anew.
_VERSION = 1

#: Without data for evaluation, this share of the tokens is kept for it, and never more than this number.
_HELD_OUT, _HELD_OUT_MOST = 0.05, 1 << 18

Batch = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """The tokens of all documents, in a file.

    Attributes:
        file: of ``count`` little-endian integers.
        dtype: ``uint16``, or ``uint32`` where the vocabulary needs it.
        documents: how many there are; empty ones are left out.
        fingerprint: SHA-256 of the tokens, of the tokenizer, and of which of them are held out.
        vocabulary: all ids are below it.
        held_out: the number of tokens, at the end, that are for evaluation and in no batch.
    """

    file: Path
    count: int
    dtype: str
    documents: int
    fingerprint: str
    vocabulary: int
    held_out: int

    @property
    def trained(self) -> int:
        """The number of tokens before those that are held out."""
        return self.count - self.held_out

    def windows(self, length: int) -> int:
        """The number of windows of ``length`` + 1 tokens to train on."""
        return max(self.trained - 1, 0) // length


def prepare(
    data: Sequence[str],
    tokenizing: Tokenizing,
    folder: Path,
    *,
    eval_data: Sequence[str] = (),
    progress: Progress | None = None,
) -> Tokens:
    """Tokenise the data once, into ``folder``; a later call with the same data and tokenizer finds the file there.

    Whether they are the same is told by hashes of the contents, not by names or dates. Processes may call this at the
    same time: one tokenises, the others wait for it. A file appears under its name once it is whole.

    Args:
        data: see ``documents.inputs``.
        eval_data: to be held out, instead of the last 5 % of the tokens (at most 2^18).
        progress: told (step, bytes read, bytes in all).

    Raises:
        BadSource, Refused: the data cannot be read, hold no text, or do not fit the tokenizer or a model.
        BadTarget: the folder cannot be written to.
    """
    report: Progress = progress or silent
    training = inputs(data)
    evaluation = inputs(eval_data, "--eval-data")
    _check_apart(training, evaluation)
    key = _key(training, evaluation, tokenizing, report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, wait=True):
            found = _read(folder, key)
            return found if found is not None else _write(folder, key, training, evaluation, tokenizing, report)
    except OSError as error:
        raise BadTarget(
            "the tokens cannot be written",
            where=str(folder),
            why=error.strerror or str(error),
            remedy="check the disk's free space and the folder's permissions",
        ) from error


def check_enough(tokens: Tokens, *, sequences: int, length: int) -> None:
    """Refuse data that are too few for one batch of training, or one window of evaluation."""
    windows = tokens.windows(length)
    if windows < sequences:
        raise Refused(
            what="the data are too few for one batch",
            where="--data",
            why=f"{tokens.trained:,} tokens, without the {tokens.held_out:,} held out for evaluation, are {windows:,}"
            f" windows of {length} + 1; a batch has {sequences:,}",
            remedy="give more data, or a smaller --batch-tokens or --seq-len",
        )
    if tokens.held_out < length + 1:
        raise Refused(
            what="the data for evaluation are too few",
            where="--eval-data",
            why=f"{tokens.held_out:,} tokens are held out; a window has {length} + 1",
            remedy="give (more) --eval-data, or a smaller --seq-len",
        )


def batch(
    tokens: Tokens, *, seed: int, index: int, sequences: int, length: int, rank: int = 0, ranks: int = 1
) -> Batch:
    """Batch ``index``, counted from 0: a pure function of its arguments.

    Args:
        seed: of the order of the windows; each epoch has another one.
        sequences: in the batch, on all ranks together; a multiple of ``ranks``.
        length: of a sequence; a row has one token more, for the targets.
        rank, ranks: the rows of one rank; those of all ranks, one after the other, are the batch of a single one.

    Returns:
        (sequences / ranks, length + 1).
    """
    assert sequences % ranks == 0, (sequences, ranks)
    mine = sequences // ranks
    windows = tokens.windows(length)
    assert windows > 0, "check_enough comes first"
    first = index * sequences + rank * mine
    places = np.arange(first, first + mine)
    found = np.empty(mine, dtype=np.int64)
    for epoch in np.unique(places // windows):
        rows = places // windows == epoch
        found[rows] = permuted(places[rows] % windows, windows, key=(seed, int(epoch)))
    return _rows(tokens, found * length, length)


def held_out_batches(tokens: Tokens, *, sequences: int, length: int) -> Iterator[Batch]:
    """The windows held out, in order: (sequences, length + 1), and fewer rows in the last one."""
    windows = max(tokens.held_out - 1, 0) // length
    starts = tokens.trained + length * np.arange(windows)
    for first in range(0, windows, sequences):
        yield _rows(tokens, starts[first : first + sequences], length)


def _rows(tokens: Tokens, starts: npt.NDArray[np.int64], length: int) -> Batch:
    values: npt.NDArray[Any] = _mapped(tokens)[starts[:, None] + np.arange(length + 1)]
    return values.astype(np.int64)


@functools.lru_cache(maxsize=4)
def _mapped(tokens: Tokens) -> Any:
    return np.memmap(tokens.file, dtype=np.dtype(tokens.dtype).newbyteorder("<"), mode="r", shape=(tokens.count,))


def _check_apart(training: Iterable[Input], evaluation: Iterable[Input]) -> None:
    both = {each.name for each in training} & {each.name for each in evaluation}
    if both:
        raise Refused(
            what="the same data are for training and for evaluation",
            where=min(both),
            why="--data and --eval-data both name them; a loss on what was learned says nothing",
            remedy="leave it out of one of them",
        )


def _key(training: Iterable[Input], evaluation: Iterable[Input], tokenizing: Tokenizing, report: Progress) -> str:
    """SHA-256 of all that the tokens depend on."""
    report("reading the data")
    parts = [
        [_VERSION, PIECE, tokenizing.fingerprint, tokenizing.vocabulary],
        [each.digest() for each in training],
        [each.digest() for each in evaluation],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _paths(folder: Path, key: str) -> tuple[Path, Path]:
    return folder / f"{TOKENS}{key[:16]}.bin", folder / f"{TOKENS}{key[:16]}.json"


def _read(folder: Path, key: str) -> Tokens | None:
    """What an earlier call has left; the description is written last, so what it describes is whole."""
    file, description = _paths(folder, key)
    try:
        record = json.loads(read_file(description))
        found = parsed(Tokens, {"file": file, **record["tokens"]})
        whole = file.stat().st_size == found.count * np.dtype(found.dtype).itemsize
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it is made anew
        return None
    return found if whole and record["key"] == key else None


def _write(
    folder: Path,
    key: str,
    training: Sequence[Input],
    evaluation: Sequence[Input],
    tokenizing: Tokenizing,
    report: Progress,
) -> Tokens:
    file, description = _paths(folder, key)
    dtype = np.dtype("uint16" if tokenizing.vocabulary <= 1 << 16 else "uint32")
    total = sum(each.size for each in (*training, *evaluation))
    hashed = hashlib.sha256(tokenizing.fingerprint.encode())
    documents = 0
    counts = []  # of training, of evaluation
    with placing(file) as scratch:
        with open(scratch, "wb") as out:
            for files, before in ((training, 0), (evaluation, sum(each.size for each in training))):
                start = out.tell()
                for pieces, read in _gathered(files):
                    block = _encoded(pieces, tokenizing, dtype.newbyteorder("<"))
                    out.write(block)
                    hashed.update(block)
                    documents += sum(piece.last for piece in pieces)
                    report("tokenising", before + read, total)
                counts.append((out.tell() - start) // dtype.itemsize)
        if not counts[0] or (evaluation and not counts[1]):
            raise _no_text("--eval-data" if counts[0] else "--data")
    held_out = counts[1] if evaluation else min(int(counts[0] * _HELD_OUT), _HELD_OUT_MOST)
    hashed.update(b"%d" % held_out)
    found = Tokens(file, sum(counts), str(dtype), documents, hashed.hexdigest(), tokenizing.vocabulary, held_out)
    record = {name: value for name, value in dataclasses.asdict(found).items() if name != "file"}
    with placing(description) as scratch:
        scratch.write_text(json.dumps({"key": key, "tokenizer": tokenizing.name, "tokens": record}, indent=2))
    return found


def _no_text(option: str) -> Refused:
    return Refused(what="the data hold no text", where=option, why="all documents are empty", remedy="give other files")


def _gathered(files: Iterable[Input]) -> Iterator[tuple[list[TextPiece], int]]:
    """Pieces of about ``PIECE`` characters in all, to be tokenised at once, and the bytes read so far."""
    done, characters = 0, 0
    pieces: list[TextPiece] = []
    for file in files:
        for piece in file.read():
            pieces.append(piece)
            characters += len(piece.text)
            if characters >= PIECE:
                yield pieces, done + piece.read
                pieces, characters = [], 0
        done += file.size
    if pieces:
        yield pieces, done


def _encoded(pieces: Sequence[TextPiece], tokenizing: Tokenizing, dtype: np.dtype[Any]) -> bytes:
    """Their tokens, with EOS where a document ends."""
    eos = np.array([tokenizing.eos])
    found: list[npt.NDArray[Any]] = []
    for piece, ids in zip(pieces, tokenizing.encode([piece.text for piece in pieces]), strict=True):
        if len(ids) and (highest := int(ids.max())) >= tokenizing.limit:
            raise too_narrow(tokenizing, highest)
        found += [ids, eos] if piece.last else [ids]
    return np.concatenate(found).astype(dtype).tobytes()


#: Four make a Feistel network of random functions indistinguishable from a random permutation (Luby and Rackoff 1988);
#: ours are no more than good mixers, so twice that.
_ROUNDS = 8


def permuted(indices: npt.NDArray[np.int64], n: int, *, key: Sequence[int]) -> npt.NDArray[np.int64]:
    """The images of ``indices`` under the permutation of 0 .. n - 1 with this key.

    A balanced Feistel network permutes the smallest 0 .. 4^b - 1 that holds them, with the output mixer of SplitMix64
    (Steele, Lea and Flood 2014) as its round function; an image that is not below ``n`` is permuted again until it is
    (cycle walking, Black and Rogaway 2002), fewer than four times on average.

    Args:
        indices: each in 0 .. n - 1; any shape.
        n: at least 1, below 2^62.
        key: integers; SHA-256 makes the round keys of them.
    """
    half = max((n - 1).bit_length() + 1, 2) // 2
    keys = _round_keys(key)
    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        values[outside] = _network(values[outside], half, keys)
        outside = values >= n
    return values.astype(np.int64)


def _network(values: npt.NDArray[np.uint64], half: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Values of 2 ``half`` bits."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << bits) | right


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(key: Sequence[int]) -> npt.NDArray[np.uint64]:
    text = ",".join(str(int(part)) for part in key).encode()
    digest = b"".join(hashlib.sha256(b"%d:" % i + text).digest() for i in range(_ROUNDS // 4))
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)
