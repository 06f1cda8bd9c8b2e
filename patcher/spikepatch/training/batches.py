"""Batches of the tokens in a file, by arithmetic.

    rows = batch(tokens, seed=0, index=step, sequences=128, length=512)      # (128, 513): inputs and targets

Window w of the tokens to train on is tokens w * length to (w + 1) * length inclusive: its last token is the first of
the next window, so that every token but the first is a target once per epoch. Within an epoch the windows come in the
order of a keyed permutation that is computed for each index, so a batch is a pure function of its number: to resume, or
to skip, is to go on counting.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from spikepatch.errors import Refused
from spikepatch.training.permutation import permuted
from spikepatch.training.tokens import Tokens

Batch = npt.NDArray[np.int64]


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
