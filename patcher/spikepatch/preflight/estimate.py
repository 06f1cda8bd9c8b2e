"""How long a measurement will take, before it begins: one matrix is made and multiplied, the rest goes by size."""

from __future__ import annotations

import time

import torch

from spikepatch.preflight.program import Program, Weights

#: Elements; what is smaller is measured in less time than it takes to read about it.
_LONG = 500_000_000
#: Elements of the matrix that is timed, at least.
_ENOUGH = 1 << 20
#: Every weight is made for the forward pass and again for the backward one.
_MADE = 2
#: Layers whose growth says enough of the others.
_FEW = 8
#: Products of a weight with all tokens: forward, again before going back, and two on the way back.
_PRODUCTS = 4


def estimate(program: Program, weights: Weights, tokens: int, *, of: int) -> str:
    """Such as ``about 50 minutes: 70.6 billion weights ...``; empty where it is not worth saying.

    Args:
        tokens: of all sequences.
        of: layers of the model.
    """
    sizes = {p: p.meta["val"].numel() for piece in program.pieces for p in piece.parameters}
    total = sum(sizes[p] for piece in program.pieces for p in piece.parameters)
    matrices = [p for p, size in sizes.items() if size >= _ENOUGH and p.meta["val"].ndim == 2]
    if total < _LONG or not matrices:
        return ""
    one = min(matrices, key=sizes.__getitem__)
    start = time.perf_counter()
    matrix = program.parameter(one, weights)
    made = time.perf_counter()
    x = torch.ones(tokens, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    float((x @ matrix.T).sum())
    multiplied = time.perf_counter() - made
    made -= start
    seconds = total / sizes[one] * (_MADE * made + _PRODUCTS * multiplied)
    return f"about {_in_words(seconds)} for {total / 1e9:.3g} billion weights" + (
        f"; --layers {_FEW} runs {_FEW} of {of} layers" if seconds > 120 and of > 2 * _FEW else ""
    )


def _in_words(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
