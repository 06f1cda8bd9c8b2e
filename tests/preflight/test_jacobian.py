"""Golub-Kahan-Lanczos against a dense SVD in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from spikepatch.preflight.forward import QUICK_STEPS
from spikepatch.preflight.jacobian import STEPS, jacobian_products, matrix_norm, spectral_norm


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MATRICES: dict[str, Callable[[], torch.Tensor]] = {
    "square": lambda: gaussian(300, 300),
    "wide": lambda: gaussian(128, 512),
    "tall": lambda: gaussian(512, 128),
    "nearly the identity": lambda: torch.eye(600, dtype=torch.float64) + 0.005 * gaussian(600, 600),
    "identity and as much": lambda: torch.eye(600, dtype=torch.float64) + 0.04 * gaussian(600, 600),
    "rank one": lambda: torch.outer(gaussian(50), gaussian(70, seed=1)),
    "block diagonal": lambda: torch.block_diag(*(gaussian(24, 24, seed=i) for i in range(16))),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("name", MATRICES)
def test_the_norm_of_a_matrix(name: str) -> None:
    matrix = MATRICES[name]()
    dense = float(torch.linalg.svdvals(matrix)[0])
    found = matrix_norm(matrix)
    assert found.steps <= STEPS
    assert found.value == pytest.approx(dense, rel=0.01)
    assert found.value <= dense * (1 + 1e-9)  # from below


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_of_a_jacobian(dtype: torch.dtype) -> None:
    """A pre-norm MLP over several tokens, shortcut included: not symmetric, not linear."""
    tokens, width, hidden = 6, 16, 40
    first, second = gaussian(width, hidden).to(dtype), gaussian(hidden, width, seed=1).to(dtype)

    def step(x: torch.Tensor) -> torch.Tensor:
        normed = functional.layer_norm(x, (width,))
        return x + functional.gelu(normed @ first) @ second * 0.1

    at = gaussian(tokens, width, seed=2).to(dtype)
    dense = torch.autograd.functional.jacobian(step, at).reshape(at.numel(), at.numel())  # type: ignore[no-untyped-call]
    found = spectral_norm(*jacobian_products(step, at), at)
    assert found.value == pytest.approx(float(torch.linalg.svdvals(dense)[0]), rel=0.01)


def test_the_products_are_adjoint() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True).double()
    at, v, u = gaussian(1, 5, 16), gaussian(1, 5, 16, seed=1), gaussian(1, 5, 16, seed=2)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        forwards, backwards = jacobian_products(layer, at)
    left, right = float((u * forwards(v)).sum()), float((backwards(u) * v).sum())
    assert left == pytest.approx(right, rel=1e-12)
    numeric = (layer(at + 1e-6 * v) - layer(at - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(forwards(v), numeric.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (256, 1024)])
def test_few_steps_tell_a_gaussian(shape: tuple[int, int]) -> None:
    """What a check without Jacobians relies on: 5 % below at most, and a learned-like matrix far off."""
    matrix = gaussian(*shape)
    dense = float(torch.linalg.svdvals(matrix)[0])
    assert matrix_norm(matrix, QUICK_STEPS).value == pytest.approx(dense, rel=0.05)
    outlier = matrix + torch.ones(shape, dtype=torch.float64)
    dense = float(torch.linalg.svdvals(outlier)[0])
    assert matrix_norm(outlier, QUICK_STEPS).value == pytest.approx(dense, rel=1e-3)


def test_a_map_to_zero_and_one_that_overflows() -> None:
    at = torch.ones(4)
    assert spectral_norm(lambda v: 0 * v, lambda u: 0 * u, at).value == 0.0
    assert math.isnan(spectral_norm(lambda v: v * math.inf, lambda u: u * math.inf, at).value)


def test_the_same_seed_gives_the_same_bits() -> None:
    matrix = gaussian(80, 60).float()
    assert matrix_norm(matrix) == matrix_norm(matrix)
