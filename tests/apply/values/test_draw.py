"""New weights: the bits and distributions of random fills."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikepatch.apply.values import draw as fill
from spikepatch.apply.values.draw import BLOCK, draw, gaussian, pieces
from spikepatch.plans.plan import Constant, Fill, cut_std

GOLDEN = {
    (0, "transformer.wte.weight", 0): ("0x1.44cc06p-2", "-0x1.74283cp-1", "0x1.7a4fc2p+0"),
    (0, "transformer.wte.weight", 1): ("-0x1.924dc6p-4", "-0x1.27556ap-1", "0x1.b4c2a8p+0"),
    (7, "lm_head.weight", 0): ("0x1.8e60e0p-2", "0x1.5ef0e0p-2", "-0x1.2e9bdep+0"),
    (2**40, "é", 3): ("0x1.47293cp-1", "-0x1.7c5d56p-4", "-0x1.ed3fdcp-3"),
}


@pytest.mark.parametrize(("seed", "name", "block"), GOLDEN)
def test_golden_vector(seed: int, name: str, block: int) -> None:
    expected = [float.fromhex(x) for x in GOLDEN[seed, name, block]]
    assert gaussian(seed, name, block * BLOCK, block * BLOCK + 3, 1.0).tolist() == expected


def test_golden_hash() -> None:
    """65,536 values, and 2,000 across the border of two blocks."""
    start = gaussian(0, "probe", 0, 1 << 16, 1.0).numpy().tobytes()
    border = gaussian(0, "probe", BLOCK - 1000, BLOCK + 1000, 1.0).numpy().tobytes()
    assert hashlib.sha256(start).hexdigest() == "9cf24bda59b5313a12876d2aa0f1d6b60288caced749894ab1f9a19d1cb827a1"
    assert hashlib.sha256(border).hexdigest() == "95d76c295cc66544abc5146781abef457c6081c1d18d2bb4f519845e85d68dca"


@pytest.fixture(scope="module")
def whole() -> torch.Tensor:
    return gaussian(1, "whole", 0, 2 * BLOCK + 5000, 0.5)


@settings(max_examples=40)
@given(data=st.data())
def test_any_slice_is_a_slice_of_the_whole(whole: torch.Tensor, data: st.DataObject) -> None:
    border = st.sampled_from([0, BLOCK, 2 * BLOCK, len(whole)])
    place = st.one_of(
        st.integers(0, len(whole)), st.builds(lambda b, d: min(max(b + d, 0), len(whole)), border, st.integers(-3, 3))
    )
    start, stop = sorted((data.draw(place), data.draw(place)))
    assert torch.equal(gaussian(1, "whole", start, stop, 0.5), whole[start:stop])


@settings(max_examples=200)
@given(data=st.data())
def test_pieces_are_the_box(data: st.DataObject) -> None:
    """Put together they are the box; in blocks of 8 and chunks of 32, no chunk is larger, no foreign row is drawn."""
    shape = data.draw(st.lists(st.integers(1, 9), max_size=4))
    box = [range(*sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))) for n in shape]
    whole = torch.arange(math.prod(shape)).view(shape)
    inside = whole[tuple(slice(r.start, r.stop) for r in box)]
    drawn: list[tuple[int, int]] = []

    def draw(start: int, stop: int) -> torch.Tensor:
        drawn.append((start, stop))
        return whole.flatten()[start:stop]

    found = torch.full_like(inside, -1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fill, "BLOCK", 8)
        patched.setattr(fill, "CHUNK", 32)
        for where, values in pieces(draw, shape, box):
            assert bool((found[where] == -1).all())
            found[where] = values
    assert torch.equal(found, inside)
    assert all(0 < stop - start <= 32 for start, stop in drawn)
    assert inside.numel() <= sum(stop - start for start, stop in drawn) or not inside.numel()
    if shape and shape[-1] > 8:  # rows longer than a block
        assert sum(stop - start for start, stop in drawn) == inside.numel()


def test_pieces_of_a_gaussian_across_blocks(whole: torch.Tensor) -> None:
    """Columns of a matrix whose rows end inside blocks."""
    rows, columns = 7, len(whole) // 7
    matrix = whole[: rows * columns].view(rows, columns)
    box = (range(2, 6), range(columns - 1000, columns))
    found = torch.empty(4, 1000)
    for where, values in pieces(lambda start, stop: gaussian(1, "whole", start, stop, 0.5), matrix.shape, box):
        found[where] = values
    assert torch.equal(found, matrix[2:6, -1000:])


def test_a_hundred_thousand_blocks_differ() -> None:
    """Of seeds, names and block numbers: no two start with the same eight values."""
    starts = np.empty((100_000, 8), dtype=np.float32)
    keys = [
        (seed, f"layers.{layer}.w", block)
        for seed in (0, 1, 2**32, 2**64 + 1)
        for layer in range(250)
        for block in range(100)
    ]
    for row, (seed, name, block) in zip(starts, keys, strict=True):
        np.copyto(row, gaussian(seed, name, block * BLOCK, block * BLOCK + 8, 1.0).numpy())
    assert len(set(keys)) == len(np.unique(starts, axis=0)) == 100_000


def test_moments_and_distribution() -> None:
    """Within 5 standard errors of N(0, 1)'s moments, and within the Kolmogorov-Smirnov bound at level 1e-6."""
    n = 1 << 20
    x = gaussian(3, "distribution", 0, n, 1.0).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) < 5 * math.sqrt(variance / n), power
    cdf = torch.special.ndtr(x.sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max(float((steps[1:] - cdf).max()), float((cdf - steps[:-1]).max()))
    assert distance < math.sqrt(math.log(2 / 1e-6) / (2 * n))


def test_blocks_are_uncorrelated() -> None:
    n = 1 << 16
    a, b = gaussian(0, "a", 0, n, 1.0), gaussian(0, "b", 0, n, 1.0)
    c = gaussian(1, "a", 0, n, 1.0)
    for x, y in ((a, b), (a, c), (a[1:], a[:-1])):
        assert abs(float(x.double() @ y.double())) / n < 5 / math.sqrt(n)


@given(std=st.floats(1e-30, 1e30))
def test_std_is_one_float32_multiplication(std: float) -> None:
    unit = gaussian(0, "std", 0, 64, 1.0).numpy()
    assert np.array_equal(gaussian(0, "std", 0, 64, std).numpy(), unit * np.float32(std))


# Distributions other than the normal one.

CUT, UNIFORM = Fill("x", 0.5, "truncated", 2.0), Fill("x", 0.5, "uniform")


@pytest.mark.parametrize(
    ("edit", "digest"),
    [
        (UNIFORM, "b38306e2ec1e6ef49703871d9a532b1a0a939bc9fa9caaa30f38c6e0aa887703"),
        (CUT, "7334bbf7ea429ee391c05c6311937811fa4ff4ab85f5c506e95317537b584493"),
    ],
)
def test_golden_hash_of_the_others(edit: Fill, digest: str) -> None:
    unit = dataclasses.replace(edit, std=1.0)
    parts = draw(unit, 0, "probe", 0, 1 << 16), draw(unit, 0, "probe", BLOCK - 1000, BLOCK + 1000)
    assert hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest() == digest


@pytest.fixture(scope="module")
def wholes() -> dict[Fill, torch.Tensor]:
    return {edit: draw(edit, 1, "whole", 0, BLOCK + 5000) for edit in (CUT, UNIFORM)}


@settings(max_examples=20)
@given(data=st.data(), edit=st.sampled_from([CUT, UNIFORM]))
def test_any_slice_of_the_others(wholes: dict[Fill, torch.Tensor], edit: Fill, data: st.DataObject) -> None:
    """A truncated draw takes as many numbers as it rejects, and still depends on nothing but its place."""
    places = st.one_of(st.integers(0, BLOCK + 5000), st.integers(BLOCK - 3, BLOCK + 3), st.integers(0, 3))
    start, stop = sorted((data.draw(places), data.draw(places)))
    assert torch.equal(draw(edit, 1, "whole", start, stop), wholes[edit][start:stop])


def test_a_truncated_draw_is_the_normal_one_without_its_tails() -> None:
    """The definition: what is left of the block's normal draws, in their order."""
    normal = gaussian(1, "whole", 0, BLOCK, 1.0)
    left = normal[normal.abs() <= 2]
    assert len(left) > 0.9 * BLOCK
    expected = left.numpy() * np.float32(0.5 / cut_std(2.0))
    assert np.array_equal(draw(CUT, 1, "whole", 0, len(left)).numpy(), expected)


def _normal_cdf_cut_at_2(x: torch.Tensor) -> torch.Tensor:
    before = 0.5 / cut_std(2.0)
    outside = torch.special.ndtr(torch.tensor(-2.0, dtype=torch.float64))
    result: torch.Tensor = (torch.special.ndtr(x / before) - outside) / (1 - 2 * outside)
    return result


@pytest.mark.parametrize(
    ("edit", "cdf", "bound"),
    [
        (UNIFORM, lambda x: (x / (math.sqrt(3) * 0.5) + 1) / 2, math.sqrt(3) * 0.5),
        (CUT, _normal_cdf_cut_at_2, 2 * 0.5 / cut_std(2.0)),
    ],
)
def test_std_and_distribution_of_the_others(edit: Fill, cdf: Any, bound: float) -> None:
    """std is that of what is drawn, within 5 standard errors of a normal one's; Kolmogorov-Smirnov at level 1e-6."""
    n = 1 << 20
    x = draw(edit, 3, "distribution", 0, n).double()
    assert abs(float(x.mean())) < 5 * 0.5 / math.sqrt(n)
    assert abs(float((x**2).mean()) / 0.25 - 1) < 5 * math.sqrt(2 / n)
    assert float(x.abs().max()) <= bound * (1 + torch.finfo(torch.float32).eps)
    assert float(x.abs().max()) > 0.999 * bound
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    found = cdf(x.sort().values)
    distance = max(float((steps[1:] - found).max()), float((found - steps[:-1]).max()))
    assert distance < math.sqrt(math.log(2 / 1e-6) / (2 * n))


def test_uniform_draws_are_symmetric() -> None:
    """Odd multiples of 2^-24 between -1 and 1: none is zero, and each has its negative."""
    unit = draw(Fill("x", 1 / math.sqrt(3), "uniform"), 0, "grid", 0, 1 << 18)
    assert Fill("x", 1 / math.sqrt(3), "uniform").size == 1.0
    multiples = unit.double() * 2**24
    assert torch.equal(multiples, multiples.round())
    assert bool((multiples.long() % 2 == 1).all())


@pytest.mark.parametrize(("cut", "expected"), [(2.0, 0.8796256610342398), (3.0, 0.9865783925581086), (40.0, 1.0)])
def test_std_of_a_cut_normal_distribution(cut: float, expected: float) -> None:
    """0.87962566 is the constant of TensorFlow's and JAX's variance scaling; and the integral itself, in float64."""
    assert cut_std(cut) == pytest.approx(expected, rel=1e-15)
    x = torch.linspace(-min(cut, 10), min(cut, 10), 200_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)
    variance = torch.trapezoid(x**2 * density, x) / torch.trapezoid(density, x)
    assert cut_std(cut) == pytest.approx(float(variance.sqrt()), rel=1e-8)


def test_constants() -> None:
    values = draw(Constant("x", 0.25, offset=-1.0), 0, "x", BLOCK - 2, BLOCK + 3)
    assert torch.equal(values, torch.full((5,), -0.75))
