"""What is worked out from a learned tensor, a piece at a time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spikepatch.recipes.plan_of import element_std
from spikepatch.source.checkpoint import read_checkpoint
from spikepatch.source.header import TensorEntry
from spikepatch.source.match import _equal
from spikepatch.source.pieces import loaded_pieces, pieces


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spikepatch.source.pieces.PIECE", 1000)


def stored(folder: Path, **tensors: torch.Tensor) -> list[TensorEntry]:
    save_file(tensors, folder / "model.safetensors")
    entries = read_checkpoint(folder).tensors
    return [entries[name] for name in tensors]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_std(tmp_path: Path, dtype: torch.dtype, mean: float) -> None:
    """Against numpy in longer floats; n sums in float64 are off by less than n eps, and a mean costs its square."""
    x = (mean + 0.02 * torch.randn(70, 331, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    exact = np.std(x.double().numpy().astype(np.longdouble), ddof=1)
    (entry,) = stored(tmp_path, x=x)

    assert element_std(pieces(entry), entry.elements) == pytest.approx(
        float(exact), rel=x.numel() * np.finfo(np.float64).eps
    )
    assert element_std(loaded_pieces(x.t().contiguous().t()), x.numel()) == element_std(pieces(entry), entry.elements)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_std_of_what_is_not_finite(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(2500, dtype=dtype)
    x[1700] = bad
    (entry,) = stored(tmp_path, x=x)
    assert not math.isfinite(element_std(pieces(entry), entry.elements))


def test_std_of_little(tmp_path: Path) -> None:
    one, equal = stored(tmp_path, one=torch.ones(1), equal=torch.full((9,), 0.1))
    assert math.isnan(element_std(pieces(one), one.elements))
    assert element_std(pieces(equal), equal.elements) == 0


def test_equal(tmp_path: Path) -> None:
    x = torch.arange(3000.0)
    y = x.clone()
    y[2999] += 1
    entries = stored(tmp_path, a=x, b=x.clone(), c=y, d=x.clone().reshape(30, 100))
    assert [_equal(entries[0], other) for other in entries] == [True, True, False, False]
