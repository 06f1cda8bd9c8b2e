"""Spectral norms by Golub-Kahan-Lanczos bidiagonalisation: of weight matrices, and of Jacobians of parts of a graph.

A Jacobian J is never formed. J^T w is a backward pass; J v is the derivative by w of <J^T w, v>, a backward pass of the
backward pass (both graphs are built once), so no operation needs a forward-mode derivative. Plain power iteration would
converge with the ratio of neighbouring singular values, which is nearly 1 where J is the identity and a small
perturbation; Lanczos needs the square root of as many products.

Golub & Kahan 1965; re-orthogonalised in full, which is cheap at a few dozen vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

#: Steps, each of one product with J and one with its transpose.
STEPS = 20
#: Enough once the residual is below this part of the estimate: the error of the largest singular value is of second
#: order in it.
TOLERANCE = 0.01

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SpectralNorm:
    """``value``: the largest singular value, from below; ``residual``: there is one within this of ``value``."""

    value: float
    residual: float
    steps: int


def jacobian_products(function: Product, at: torch.Tensor) -> tuple[Product, Product]:
    """(v -> J v, w -> J^T w) of the Jacobian J of ``function`` at ``at``; shapes as of ``at`` and of its value.

    Raises:
        RuntimeError: an operation has no second derivative.
    """
    with torch.enable_grad():
        x = at.detach().clone().requires_grad_()
        y = function(x)
        w = torch.zeros_like(y, requires_grad=True)
        (back,) = torch.autograd.grad(y, x, w, create_graph=True)

    def forwards(v: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(back, w, v, retain_graph=True)[0]

    def backwards(u: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y, x, u, retain_graph=True)[0]

    return forwards, backwards


def spectral_norm(
    forwards: Product,
    backwards: Product,
    like: torch.Tensor,
    *,
    steps: int = STEPS,
) -> SpectralNorm:
    """The largest singular value of the linear map ``forwards``, whose transpose is ``backwards``.

    Args:
        like: an argument of ``forwards``, for its shape, dtype and device; the start vector is drawn on the CPU.
        steps: at most; one product with each map.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)
    right: list[torch.Tensor] = [start / start.norm()]
    left: list[torch.Tensor] = []
    diagonal: list[float] = []
    above: list[float] = []  # the diagonal
    best = SpectralNorm(0.0, 0.0, 0)
    for step in range(1, min(steps, like.numel()) + 1):
        u = forwards(right[-1])
        u = _orthogonal(u, left)
        diagonal.append(float(u.norm()))
        if not math.isfinite(diagonal[-1]):
            return SpectralNorm(math.nan, math.nan, step)
        if diagonal[-1] == 0.0:
            return SpectralNorm(best.value, 0.0, step)
        left.append(u / diagonal[-1])
        v = _orthogonal(backwards(left[-1]), right)
        above.append(float(v.norm()))
        vectors, values, _ = torch.linalg.svd(_bidiagonal(diagonal, above[:-1]))
        best = SpectralNorm(float(values[0]), above[-1] * abs(float(vectors[-1, 0])), step)
        if best.residual <= TOLERANCE * best.value or above[-1] <= 1e-12 * best.value:
            break
        right.append(v / above[-1])
    return best


def matrix_norm(matrix: torch.Tensor, steps: int = STEPS) -> SpectralNorm:
    """The spectral norm of a matrix, by products with vectors."""
    return spectral_norm(lambda v: matrix @ v, lambda u: u @ matrix, matrix[0], steps=steps)


def _orthogonal(vector: torch.Tensor, basis: list[torch.Tensor]) -> torch.Tensor:
    """``vector`` without its parts along ``basis``; twice is enough (Kahan)."""
    for _ in range(2):
        for other in basis:
            vector = vector - (vector * other).sum() * other
    return vector


def _bidiagonal(diagonal: list[float], above: list[float]) -> torch.Tensor:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    return matrix + torch.diag(torch.tensor(above, dtype=torch.float64), 1) if above else matrix
