"""What is read of one tensor, against numpy; from memory and from disk, in blocks or at once."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from spikepatch.auditing import contents
from spikepatch.auditing.contents import Contents, merged, of_entry, of_tensor
from spikepatch.source.header import read_header

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def drawn(*shape: int, std: float = 0.02, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_are_numpys(dtype: torch.dtype) -> None:
    tensor = drawn(96, 130).to(dtype)
    found, plain = of_tensor(tensor), tensor.double().numpy()
    assert found.elements == found.sampled == plain.size
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # sums are of pairs: few roundings each
    assert found.mean == pytest.approx(plain.mean(), rel=0, abs=8 * eps * found.largest)
    assert found.std == pytest.approx(plain.std(), rel=8 * eps)
    centred = plain - plain.mean()
    assert found.kurtosis == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2, rel=32 * eps)
    assert found.largest == np.abs(plain).max()
    assert found.edges == (plain.min(), plain.max())


def test_the_error_of_a_std_is_that_of_many_draws() -> None:
    stds = [of_tensor(drawn(40, 50, seed=i)) for i in range(200)]
    spread = float(np.std([c.std for c in stds])) / 0.02
    assert stds[0].error == pytest.approx(spread, rel=0.2)  # of 200 draws it is known to 1/sqrt(400) = 5 %


@given(st.integers(1, 40), st.integers(1, 90), st.sampled_from(DTYPES), st.integers(1, 500))
def test_blocks_do_not_matter(rows: int, columns: int, dtype: torch.dtype, block: int) -> None:
    tensor = drawn(rows, columns).to(dtype)
    whole = contents.measure([tensor], (rows, columns), dtype)
    parts = [tensor[i : i + block] for i in range(0, rows, block)]
    assert contents.measure(parts, (rows, columns), dtype) == whole


def test_a_large_tensor_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = drawn(2000, 64)
    tensor[1777, 3] = 5.0
    monkeypatch.setattr(contents, "_SAMPLE", 1 << 12)
    found = of_tensor(tensor)
    assert 1 << 12 <= found.sampled < 1 << 14
    assert found.std == pytest.approx(0.02, rel=0.05)
    assert found.largest == 5.0  # every element counts there


def test_what_is_not_finite_is_counted() -> None:
    tensor = drawn(30, 40)
    tensor[4, 2:9], tensor[7, 0] = math.nan, -math.inf
    found = of_tensor(tensor)
    assert (found.nonfinite, found.where) == (8, "2 rows from 4 on")
    assert math.isfinite(found.std)
    assert math.isfinite(found.largest)


def test_parts() -> None:
    tensor = drawn(64, 96)
    tensor[10:20], tensor[:, 5] = 0, 0
    tensor[30] *= 1e-4
    found = of_tensor(tensor)
    assert (found.zero_rows, found.zero_columns, found.weak_rows, found.weak_columns) == (10, 1, 1, 0)


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize(("shape", "axis", "shift"), [((64, 96), 0, 32), ((64, 96), 1, 24), ((4, 20, 70), 0, 20)])
def test_copies_are_found(shape: tuple[int, ...], axis: int, shift: int, scale: float) -> None:
    tensor = drawn(*shape)
    assert of_tensor(tensor).repeat is None
    rows = tensor.view(-1, shape[-1])
    if axis == 0:
        rows[shift : 2 * shift] = scale * rows[:shift]
    else:
        rows[:, shift : 2 * shift] = scale * rows[:, :shift]
    repeat = of_tensor(tensor).repeat
    assert repeat is not None
    assert (repeat.axis, repeat.shift) == (axis, shift)
    assert repeat.share == pytest.approx(shift / rows.shape[axis])


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_rows_of_large_blocks_are_counted(dtype: torch.dtype) -> None:
    """Of most rows only the first elements are looked at apart; these must be found all the same."""
    tensor = drawn(1000, 300, std=1).to(dtype)
    tensor[17], tensor[500:520] = 0, 0
    tensor[30], tensor[999] = tensor[30] * 1e-4, -tensor[999].abs() * 1e-4
    found = of_tensor(tensor)
    assert (found.zero_rows, found.weak_rows, found.strong_rows) == (21, 2, 0)
    tensor[40, 290] = -200  # behind the first elements
    assert of_tensor(tensor).strong_rows == 1
    assert of_tensor(tensor).largest == 200
    tensor[400:] = 0  # most rows
    assert of_tensor(tensor).zero_rows == 601
    assert of_tensor(-drawn(1000, 300).abs().to(dtype)).weak_rows == 0
    assert of_tensor(torch.where(torch.arange(300) < 200, drawn(900, 300) * 1e-5, 1.0)).weak_rows == 0
    tensor[:] = 0
    assert of_tensor(tensor).is_zero


def test_floats_of_eight_bits_are_read() -> None:
    tensor = drawn(64, 96, std=1).to(torch.float8_e4m3fn)
    assert of_tensor(tensor).std == pytest.approx(1, rel=0.1)


def test_parts_at_another_std() -> None:
    for tensor in (drawn(384, 130), drawn(130, 384)):
        assert of_tensor(tensor).uneven < 1.1
        tensor.view(-1)[: tensor.numel() // 3] *= 3
        assert of_tensor(tensor).uneven == pytest.approx(3, rel=0.1)
    tensor[:, :192] *= 5
    assert of_tensor(tensor).uneven > 3


def test_one_seed_shows_in_the_prefix() -> None:
    one, other, scaled = (of_tensor(t) for t in (drawn(64, 96), drawn(64, 96, seed=1), drawn(96, 64, std=0.003)))
    assert one.prefix == scaled.prefix != other.prefix
    assert of_tensor(torch.ones(64, 96)).prefix is None
    assert of_tensor(torch.zeros(8)).prefix is None


def test_drawn_trained_and_computed() -> None:
    """Independent draws have rows that differ by sampling alone; a rank-one change makes them differ by more."""
    for values in (drawn(256, 512), torch.rand(256, 512) - 0.5):
        assert of_tensor(values).is_drawn
    rows = torch.linspace(-1, 1, 256).exp().unsqueeze(1)
    assert of_tensor(drawn(256, 512) * rows).row_spread > contents.LEARNED_SPREAD
    angles = torch.arange(256.0).unsqueeze(1) / 10_000 ** (torch.arange(32.0) / 32)
    assert of_tensor(torch.cat([angles.sin(), angles.cos()], 1)).row_spread < 0.1


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (5, 0), (7,), (3, 1, 4)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    found = of_tensor(torch.ones(shape))
    assert found.elements == math.prod(shape)
    assert isinstance(found, Contents)


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_disk_it_is_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"matrix": drawn(300, 70).to(dtype), "vector": drawn(50).to(dtype), "stack": drawn(3, 20, 64).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    entries, _ = read_header(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        assert of_entry(entries[name]) == of_tensor(tensor)


def test_parts_are_merged() -> None:
    stack = torch.stack([drawn(30, 70, seed=i) for i in range(4)])
    whole, parts = of_tensor(stack), [of_tensor(part) for part in stack]
    found = merged(parts, tuple(stack.shape))
    for field in ("shape", "elements", "largest", "sampled", "zero_rows"):
        assert getattr(found, field) == getattr(whole, field), field
    for field in ("mean", "std"):
        assert getattr(found, field) == pytest.approx(getattr(whole, field), rel=1e-6), field
    # Each part's is about its own mean; those of 2,100 draws differ by 0.02 of a std: six times its square.
    assert found.kurtosis == pytest.approx(whole.kurtosis, rel=6 * 5e-4)
    copied = merged([*parts[:3], dataclasses.replace(parts[0])], tuple(stack.shape))
    assert copied.repeat is not None
    assert copied.repeat.share == 0.25
