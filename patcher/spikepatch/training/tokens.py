"""All documents as tokens in one file: made once, described beside it, and held against its hash whenever it is used.

    tokens = prepare(["builtin:stdlib"], tokenizer, Path("runs/x/data"))

The tokens of all documents lie one after the other, each document of text ended by EOS; the last ``held_out`` of them
are for evaluation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spikepatch.apply.disk.atomic import locked, placing
from spikepatch.data.documents import BadRows, Input, check_used, inputs, said
from spikepatch.data.rows import PIECE, BadRow, DocumentPiece, Reading
from spikepatch.data.tokenizing import Bos, Tokenizing, encoded
from spikepatch.errors import BadSource, BadTarget, Refused, on_one_line
from spikepatch.progress import Progress, silent
from spikepatch.source.local import opened, read_file
from spikepatch.source.typed import parsed
from spikepatch.training.folder import LOCK, TOKENS

#: Of what is written here; files of another version are made anew.
_VERSION = 2

#: Bytes that are hashed at once.
_BLOCK = 1 << 24

#: Of what is said of tokens, what is not part of their fingerprint.
_NOT_HASHED = ("file", "fingerprint", "tokenizer")

#: Without data for evaluation, this share of the tokens is kept for it, and never more than this number.
_HELD_OUT, _HELD_OUT_MOST = 0.05, 1 << 18


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
        tokenizer: its name, for people.
        eos: the id that ends each document, if it is known.
        left_out: the number of rows without a document.
    """

    file: Path
    count: int
    dtype: str
    documents: int
    fingerprint: str
    vocabulary: int
    held_out: int
    tokenizer: str = ""
    eos: int | None = None
    left_out: int = 0

    @property
    def trained(self) -> int:
        """The number of tokens before those that are held out."""
        return self.count - self.held_out

    def windows(self, length: int) -> int:
        """The number of windows of ``length`` + 1 tokens to train on."""
        return max(self.trained - 1, 0) // length


def prepare(
    data: Sequence[str],
    tokenizer: Callable[[bool], Tokenizing],
    folder: Path,
    *,
    eval_data: Sequence[str] = (),
    reading: Reading | None = None,
    bos: Bos = "auto",
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Tokens:
    """Tokenise the data once, into ``folder``; a later call with the same data and tokenizer finds the file there.

    Whether they are the same is told by hashes of the contents, not by names or dates; so is whether the file is as it
    was written. Processes may call this at the same time: one tokenises, the others wait for it. A file appears under
    its name once it is whole.

    Args:
        data: see ``documents.inputs``.
        tokenizer: called with whether there is text among the data, gives the tokenizer.
        eval_data: to be held out, instead of the last 5 % of the tokens (at most 2^18).
        reading: how the data are to be read.
        bos: whether each document of text begins with a token of its own; see ``Tokenizing.front``.
        progress: told (step, bytes read, bytes in all).
        say: told what is taken for what.

    Raises:
        BadSource, Refused: the data cannot be read, hold no text, or do not fit the tokenizer or a model; or the file
            is damaged that an earlier call has made.
        BadTarget: the folder cannot be written to.
    """
    report: Progress = progress or silent
    how = reading or Reading()
    report("reading the data")
    cache = folder / f"{TOKENS}cache"
    training = inputs(data, reading=how, cache=cache)
    evaluation = inputs(eval_data, "--eval-data", reading=how, cache=cache)
    _check_apart(training, evaluation)
    for sentence in said([*training, *evaluation]):
        say(sentence)
    check_used([*training, *evaluation], how)
    tokenizing = tokenizer(any(each.kind == "text" for each in (*training, *evaluation)))
    front = tokenizing.front(bos)
    key = _key(training, evaluation, tokenizing, front, how)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, wait=True):
            found = _read(folder, key, tokenizing)
            return found or _write(folder, key, training, evaluation, tokenizing, front, how, report)
    except OSError as error:
        raise BadTarget(
            "the tokens cannot be written",
            where=str(folder),
            why=error.strerror or str(error),
            remedy="check the disk's free space and the folder's permissions",
        ) from error


def _check_apart(training: Iterable[Input], evaluation: Iterable[Input]) -> None:
    both = {each.name for each in training} & {each.name for each in evaluation}
    if both:
        raise Refused(
            what="the same data are for training and for evaluation",
            where=min(both),
            why="--data and --eval-data both name them; a loss on what was learned says nothing",
            remedy="leave it out of one of them",
        )


def _key(
    training: Iterable[Input],
    evaluation: Iterable[Input],
    tokenizing: Tokenizing,
    front: Sequence[int],
    reading: Reading,
) -> str:
    """SHA-256 of all that the tokens depend on."""
    parts = [
        [_VERSION, PIECE, tokenizing.fingerprint, tokenizing.vocabulary, front, reading.skip_bad],
        [[each.taken, each.digest()] for each in training],
        [[each.taken, each.digest()] for each in evaluation],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _paths(folder: Path, key: str) -> tuple[Path, Path]:
    return folder / f"{TOKENS}{key[:16]}.bin", folder / f"{TOKENS}{key[:16]}.json"


def _read(folder: Path, key: str, tokenizing: Tokenizing) -> Tokens | None:
    """What an earlier call has left; the description is written last, so what it describes was whole.

    Raises:
        BadSource: it is not as it was written.
    """
    file, description = _paths(folder, key)

    def damaged(where: Path, why: str) -> BadSource:
        return BadSource(
            "the tokens are not as they were written",
            where=str(where),
            why=why,
            remedy=f"delete {file.name} and {description.name} there: the tokens are made again, the same ones",
        )

    try:
        record = json.loads(read_file(description))
        found = parsed(Tokens, {"file": file, **record["tokens"]})
        width = np.dtype(found.dtype).itemsize
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(description, on_one_line(error)) from error
    hashed = _begun(tokenizing)
    try:
        with opened(file) as stored:
            size = os.fstat(stored.fileno()).st_size
            if size != found.count * width:
                raise damaged(file, f"it has {size:,} bytes, and {found.count:,} tokens of {found.dtype} have others")
            while block := stored.read(_BLOCK):
                hashed.update(block)
    except FileNotFoundError as error:
        raise damaged(file, "there is no such file") from error
    if _ended(hashed, found) != found.fingerprint or record.get("key") != key:
        raise damaged(file, f"its hash, with what {description.name} says of it, is another one")
    return found


def _begun(tokenizing: Tokenizing) -> Any:
    return hashlib.sha256(tokenizing.fingerprint.encode())


def _ended(hashed: Any, tokens: Tokens) -> str:
    """The fingerprint: of the tokenizer, all tokens, and what is said of them."""
    described = {name: value for name, value in dataclasses.asdict(tokens).items() if name not in _NOT_HASHED}
    hashed.update(json.dumps(described, sort_keys=True).encode())
    return str(hashed.hexdigest())


def _write(
    folder: Path,
    key: str,
    training: Sequence[Input],
    evaluation: Sequence[Input],
    tokenizing: Tokenizing,
    front: Sequence[int],
    reading: Reading,
    report: Progress,
) -> Tokens:
    file, description = _paths(folder, key)
    dtype = np.dtype("uint16" if tokenizing.vocabulary <= 1 << 16 else "uint32")
    total = sum(each.size for each in (*training, *evaluation))
    hashed, documents = _begun(tokenizing), 0
    counts, bad = [], []  # of training, of evaluation
    with placing(file) as scratch:
        with open(scratch, "wb") as out:
            for files, before in ((training, 0), (evaluation, sum(each.size for each in training))):
                start, rows = out.tell(), BadRows()
                for name, pieces, read in _gathered(files, rows, reading.skip_bad):
                    parts = encoded(pieces, tokenizing, front, name)
                    block = b"".join(ids.astype(dtype.newbyteorder("<")).tobytes() for ids in parts)
                    out.write(block)
                    hashed.update(block)
                    documents += sum(piece.last for piece, _ in pieces)
                    report("tokenising", before + read, total)
                if not reading.skip_bad:
                    rows.check("--data" if files is training else "--eval-data")
                counts.append((out.tell() - start) // dtype.itemsize)
                bad.append(rows.count)
        if not counts[0] or (evaluation and not counts[1]):
            raise _no_text("--eval-data" if counts[0] else "--data")
    held_out = counts[1] if evaluation else min(int(counts[0] * _HELD_OUT), _HELD_OUT_MOST)
    unhashed = Tokens(
        file, sum(counts), str(dtype), documents, "", tokenizing.vocabulary, held_out, tokenizing.name, tokenizing.eos,
        sum(bad),
    )  # fmt: skip
    found = dataclasses.replace(unhashed, fingerprint=_ended(hashed, unhashed))
    record = {name: value for name, value in dataclasses.asdict(found).items() if name != "file"}
    with placing(description) as scratch:
        scratch.write_text(json.dumps({"key": key, "tokens": record}, indent=2))
    return found


def _no_text(option: str) -> Refused:
    return Refused(what="the data hold no text", where=option, why="all documents are empty", remedy="give other files")


#: A piece, and whether it begins a document.
_Pieces = list[tuple[DocumentPiece, bool]]


def _gathered(files: Iterable[Input], bad: BadRows, skip: bool) -> Iterator[tuple[str, _Pieces, int]]:
    """Of one file: its name, pieces of about ``PIECE`` characters or tokens in all, to be tokenised at once, and the
    bytes read so far. Behind the first bad row, rows are only counted, unless they are to be skipped.
    """
    done = 0
    for file in files:
        size, begins = 0, True
        pieces: _Pieces = []
        for piece in file.read():
            if isinstance(piece, BadRow):
                bad.add(piece)
                continue
            if bad.count and not skip:
                continue
            pieces.append((piece, begins))
            size, begins = size + len(piece.content), piece.last
            if size >= PIECE:
                yield file.name, pieces, done + piece.read
                pieces, size = [], 0
        done += file.size
        if pieces:
            yield file.name, pieces, done
