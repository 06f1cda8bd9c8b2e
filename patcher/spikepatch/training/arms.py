"""Which of two arms has fewer spikes, and how sure that is: exact tests over seeds."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

#: A difference is told below this p.
LEVEL_OF_TEST = 0.05

#: Seeds beyond these are not asked for.
_MOST_SEEDS = 100

#: Up to so many ways to deal the runs out are all gone through; beyond, as many are drawn.
_WAYS = 20_000


@dataclass(frozen=True)
class Arm:
    """One model at one learning rate, over its seeds, and against the first baseline at that rate.

    Attributes:
        model, lr: which.
        runs: how many have a verdict.
        with_events: runs with an event in the loss (or a step that is not finite) that is not the data's.
        events: these events, of all runs.
        excess: largest excess of the loss over its level, in nats: median over runs, and the largest. None where no
            run was judged, or where it is not finite.
        not_back: runs that did not come back.
        baseline: the model that it is compared with; None for that one itself, or where it has no run at this rate.
        fisher: p of Fisher's exact test, two-sided, on runs with and without events.
        permutation: p of the exact permutation test, two-sided, on the ranks of the largest excess.
        more_seeds: where Fisher's test tells nothing: how many seeds more for both arms until it would, if the shares
            of runs with events stay as they are. None where it tells something, or where the shares are equal.
    """

    model: str
    lr: float
    runs: int
    with_events: int
    events: int
    excess: tuple[float | None, float | None]
    not_back: int
    baseline: str | None = None
    fisher: float | None = None
    permutation: float | None = None
    more_seeds: int | None = None


class RunSpikes(NamedTuple):
    """What a run is to its arm: ``excess``: infinite where it ended non-finite; None where nothing was judged."""

    events: int
    excess: float | None
    back: bool


def arms(runs: Mapping[tuple[str, float], Sequence[RunSpikes]], baseline: str) -> tuple[Arm, ...]:
    """(model, learning rate) -> its runs, over seeds; every arm against that of ``baseline`` at its rate."""
    return tuple(_arm(*key, own, runs.get((baseline, key[1]), ()), baseline) for key, own in runs.items())


def _arm(model: str, lr: float, own: Sequence[RunSpikes], others: Sequence[RunSpikes], baseline: str) -> Arm:
    excess = _excess(own)
    a, b = sum(run.events > 0 for run in own), sum(run.events > 0 for run in others)
    compared = model != baseline and len(others) > 0
    p = fisher(a, len(own), b, len(others)) if compared else None
    return Arm(
        model=model,
        lr=lr,
        runs=len(own),
        with_events=a,
        events=sum(run.events for run in own),
        excess=(_finite(statistics.median(excess)), _finite(max(excess))) if excess else (None, None),
        not_back=sum(not run.back for run in own),
        baseline=baseline if compared else None,
        fisher=p,
        permutation=permutation(excess, _excess(others)) if compared else None,
        more_seeds=more_seeds(a, len(own), b, len(others)) if p is not None and p >= LEVEL_OF_TEST else None,
    )


def _excess(runs: Sequence[RunSpikes]) -> list[float]:
    return [run.excess for run in runs if run.excess is not None]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def told(compared: Sequence[Arm]) -> Iterator[str]:
    """What the comparison says, a sentence for each arm."""
    of = {(arm.model, arm.lr): arm for arm in compared}
    for arm in compared:
        if arm.baseline is None or arm.fisher is None:
            continue
        base = of[arm.baseline, arm.lr]
        counts = f"{arm.with_events} of {arm.runs} runs have a loss event, {base.with_events} of {base.runs} of"
        line = f"lr {arm.lr:g}: {arm.model}: {counts} {arm.baseline}"
        if arm.fisher < LEVEL_OF_TEST:
            fewer = arm.with_events * base.runs < base.with_events * arm.runs
            yield f"{line}: {'fewer' if fewer else 'more'} (Fisher's exact test, p = {arm.fisher:.2g})"
        elif arm.with_events * base.runs == base.with_events * arm.runs:
            yield f"{line}: no difference is seen"
        else:
            more = f"{arm.more_seeds} more seeds for both" if arm.more_seeds else f"more than {_MOST_SEEDS} more seeds"
            yield f"{line}: nothing can be told (p = {arm.fisher:.2g}); with these shares it would take {more}"


def fisher(a: int, n: int, b: int, m: int) -> float:
    """p of Fisher's exact test, two-sided: a of n against b of m, given a + b (Fisher 1922; the sum of the
    probabilities of all tables that are as unlikely as this one).
    """
    ways = [math.comb(n, k) * math.comb(m, a + b - k) for k in range(max(0, a + b - m), min(n, a + b) + 1)]
    mine = math.comb(n, a) * math.comb(m, b)
    return sum(each for each in ways if each <= mine) / sum(ways)


def permutation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """p of the permutation test, two-sided, on the difference of mean ranks (ties share theirs; infinity ranks last).

    All ways to deal the values out to both are gone through, or 20,000 random ones with a fixed seed. None for an empty
    side.
    """
    if not first or not second:
        return None
    values = sorted([*first, *second])
    rank = {value: sum(i for i, v in enumerate(values) if v == value) / values.count(value) for value in set(values)}
    ranks = [rank[value] for value in (*first, *second)]
    n, expected = len(first), sum(ranks) * len(first) / len(ranks)
    mine = abs(sum(ranks[:n]) - expected) - 1e-9
    if math.comb(len(ranks), n) <= _WAYS:
        sums = [sum(chosen) for chosen in combinations(ranks, n)]
        return sum(abs(total - expected) >= mine for total in sums) / len(sums)
    rng = random.Random(0)
    hits = sum(abs(sum(rng.sample(ranks, n)) - expected) >= mine for _ in range(_WAYS))
    return (hits + 1) / (_WAYS + 1)


def more_seeds(a: int, n: int, b: int, m: int) -> int | None:
    """The fewest further seeds for both with which Fisher's p is below 0.05, with the shares a / n and b / m kept.

    None where these are equal, or where more than 100 are needed.
    """
    if a * m == b * n:
        return None
    for more in range(1, _MOST_SEEDS + 1):
        grown = [round(share * (runs + more) / runs) for share, runs in ((a, n), (b, m))]
        if fisher(grown[0], n + more, grown[1], m + more) < LEVEL_OF_TEST:
            return more
    return None
