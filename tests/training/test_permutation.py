"""The keyed permutation: it is one, it is another one for another key, and every image is about as likely."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikepatch.training.permutation import permuted

KEYS = st.tuples(st.integers(0, 2**64), st.integers(0, 1000))


@given(n=st.integers(1, 5000), key=KEYS)
def test_it_is_a_permutation(n: int, key: tuple[int, int]) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(n), n, key=key)), np.arange(n))


@given(n=st.integers(1, 2**61), key=KEYS, data=st.data())
def test_any_size(n: int, key: tuple[int, int], data: st.DataObject) -> None:
    """An image depends on its index alone, and different indices have different images."""
    indices = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8, unique=True)))
    images = permuted(indices, n, key=key)
    assert images.min() >= 0
    assert images.max() < n
    assert len(set(images.tolist())) == len(indices)
    for index, image in zip(indices, images, strict=True):
        assert permuted(np.array([index]), n, key=key) == image


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 5, 17, 64, 100])
def test_every_image_is_as_likely(n: int) -> None:
    """Chi-squared of where the first, a middle and the last index go, over 200 n keys; the keys are fixed, so the
    outcome is too. The limit is the mean n - 1 and 5 standard deviations sqrt(2 (n - 1)), and what n = 2 needs."""
    keys = 200 * n
    for index in {0, n // 2, n - 1}:
        images = [int(permuted(np.array([index]), n, key=(seed, 0))[0]) for seed in range(keys)]
        counts = np.bincount(images, minlength=n)
        chi2 = float(((counts - 200) ** 2 / 200).sum())
        assert chi2 < n - 1 + 5 * np.sqrt(2 * (n - 1)) + 8, (n, index, counts)


def test_neighbours_are_not_kept_together() -> None:
    """Adjacent indices have adjacent images about twice in any permutation of n at random (Poisson, mean 2)."""
    n = 10_000
    found = [permuted(np.arange(n), n, key=(seed, 0)) for seed in range(20)]
    adjacent = sum(int((np.abs(np.diff(images)) == 1).sum()) for images in found)
    assert abs(adjacent - 40) < 5 * np.sqrt(40)
    assert sum(int((images == np.arange(n)).sum()) for images in found) < 20 + 5 * np.sqrt(20)  # fixed points: mean 1


def test_epochs_and_seeds_differ() -> None:
    n = 1000
    orders = {tuple(permuted(np.arange(n), n, key=(seed, epoch))) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_is_the_same_everywhere() -> None:
    """Pinned: a run is to be resumed on another machine, by another version."""
    assert permuted(np.arange(10), 10, key=(0, 0)).tolist() == [6, 5, 4, 8, 9, 1, 0, 7, 2, 3]
