"""The comparison of arms against enumerations and published values."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest

from spikepatch.training.arms import RunSpikes, arms, fisher, more_seeds, permutation, told


def enumerated(a: int, n: int, b: int, m: int) -> Fraction:
    """Fisher's two-sided p by dealing the events out to the runs in every way."""

    def chance(k: int) -> Fraction:
        hits = sum(1 for chosen in itertools.combinations(range(n + m), a + b) if sum(i < n for i in chosen) == k)
        return Fraction(hits, math.comb(n + m, a + b))

    chances = [chance(k) for k in range(a + b + 1)]
    return sum((each for each in chances if each <= chances[a]), Fraction(0))


@pytest.mark.parametrize("n", range(1, 6))
@pytest.mark.parametrize("m", range(1, 6))
def test_fisher_is_the_enumeration(n: int, m: int) -> None:
    for a, b in itertools.product(range(n + 1), range(m + 1)):
        assert fisher(a, n, b, m) == pytest.approx(float(enumerated(a, n, b, m)), rel=1e-12)


@pytest.mark.parametrize(
    ("table", "p"),
    [
        ((8, 8, 0, 8), 1.6e-4), ((8, 8, 1, 8), 1.4e-3), ((8, 8, 1, 16), 1.2e-5), ((5, 5, 0, 5), 0.0079),
        ((3, 4, 1, 4), 0.486),
    ],
)  # fmt: skip
def test_fisher_has_the_published_values(table: tuple[int, int, int, int], p: float) -> None:
    """The last is Fisher's tea; the others from a study of spikes."""
    assert fisher(*table) == pytest.approx(p, rel=0.05)


def test_permutation() -> None:
    assert permutation([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / math.comb(8, 4))
    assert permutation([1, 2, 3, 4], [5, 6, 7, math.inf]) == pytest.approx(2 / math.comb(8, 4))
    assert permutation([1.0, 1.0], [1.0, 1.0, 1.0]) == 1
    assert permutation([1, 4, 5], [2, 3, 6]) == 1  # equal mean ranks
    assert permutation([], [1.0]) is None
    low, high = [float(i) for i in range(12)], [float(i) for i in range(20, 32)]
    assert permutation(low, high) == pytest.approx(1 / 20_001)
    assert permutation(low, high) == permutation(low, high)


def test_more_seeds() -> None:
    assert more_seeds(2, 2, 0, 2) == 2
    assert fisher(4, 4, 0, 4) < 0.05 <= fisher(3, 3, 0, 3)
    assert more_seeds(1, 2, 2, 4) is None
    assert more_seeds(50, 100, 51, 100) is None


def runs(*events: int, excess: float = 1.0) -> list[RunSpikes]:
    return [RunSpikes(each, excess * (1 + each), back=True) for each in events]


def test_arms() -> None:
    found = arms(
        {
            ("base", 1e-3): runs(0, 0), ("new", 1e-3): runs(0, 0),
            ("base", 3e-3): runs(1, 2, 1, 3, 1), ("new", 3e-3): runs(0, 0, 0, 0, 0),
            ("base", 1e-2): [*runs(1, 1), RunSpikes(1, math.inf, back=False)], ("new", 1e-2): runs(1, 0, 0),
            ("new", 3e-2): runs(1),
        },
        "base",
    )  # fmt: skip
    base, new = found[2], found[3]
    assert (base.with_events, base.events, base.excess, base.baseline, base.fisher) == (5, 8, (2, 4), None, None)
    assert (new.with_events, new.runs, new.baseline) == (0, 5, "base")
    assert new.fisher == pytest.approx(1 / 126)
    assert new.permutation == pytest.approx(1 / 126)
    assert new.more_seeds is None
    assert (found[4].excess, found[4].not_back) == ((2, None), 1)
    assert found[5].more_seeds == more_seeds(1, 3, 3, 3)
    assert found[6].baseline is None  # the baseline has no run at this rate
    lines = list(told(found))
    assert lines == [
        "lr 0.001: new: 0 of 2 runs have a loss event, 0 of 2 of base: no difference is seen",
        "lr 0.003: new: 0 of 5 runs have a loss event, 5 of 5 of base: fewer (Fisher's exact test, p = 0.0079)",
        "lr 0.01: new: 1 of 3 runs have a loss event, 3 of 3 of base: nothing can be told (p = 0.4); with these shares"
        f" it would take {found[5].more_seeds} more seeds for both",
    ]
