"""results.csv as the tables of docs/results.md: python examples/study/tables.py"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples.study.study import PREFLIGHT, RECIPES, RESULTS, Row, read, units

from spikepatch.training.arms import fisher

#: Fewer runs than these have no rank correlation.
_LEAST = 10


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation; not a number where one side has one value only."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return statistics.correlation(_ranks(first), _ranks(second))


def _ranks(values: Sequence[float]) -> list[float]:
    """Ties get the mean of their places."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


def excess(row: Row) -> float:
    """Largest excess of the loss, in nats; infinite where the run did not come back."""
    return math.inf if row["verdict"] == "not back" else float(row["largest_excess"] or 0)


def groups(rows: Sequence[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """In the order in which they first come."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def outcomes(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each recipe in each regime, architecture and rate, over seeds."""
    yield "| regime | model | lr | recipe | runs with a loss event | events | excess, median / largest, nats |" + (
        " runs with a gradient event | p |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for (regime, architecture, lr), cell in groups(rows, "regime", "architecture", "lr").items():
        by_recipe = groups(cell, "recipe")
        base = [int(row["loss_events"]) > 0 for row in by_recipe.get((RECIPES[0],), ())]
        for (recipe,), own in sorted(by_recipe.items(), key=lambda item: RECIPES.index(item[0][0])):
            hit = [int(row["loss_events"]) > 0 for row in own]
            sizes = [excess(row) for row in own]
            p = f"{fisher(sum(hit), len(hit), sum(base), len(base)):.2g}" if base and recipe != RECIPES[0] else ""
            yield (
                f"| {regime} | {architecture} | {lr} | {recipe} | {sum(hit)} of {len(hit)} |"
                f" {sum(int(row['loss_events']) for row in own)} |"
                f" {statistics.median(sizes):.2f} / {max(sizes):.2f} |"
                f" {sum(int(row['gradient_events']) > 0 for row in own)} | {p} |"
            )


def correlations(rows: Sequence[Row]) -> Iterator[str]:
    """Spearman's correlation of each pre-flight number with the largest excess, over the runs of a group."""
    yield "| regime | model | lr | runs | 1 / stream's std | Eq. 15 excess | gradient ratio |"
    yield "|---|---|---|---|---|---|---|"
    for (regime, architecture, lr), cell in groups(rows, "regime", "architecture", "lr").items():
        if len(cell) < _LEAST:
            continue
        numbers = []
        for name in PREFLIGHT:
            known = [row for row in cell if row[name]]
            sign = -1 if name == "sigma_start" else 1
            numbers.append(spearman([sign * float(row[name]) for row in known], [excess(row) for row in known]))
        shown = " | ".join("-" if math.isnan(number) else f"{number:.2f}" for number in numbers)
        yield f"| {regime} | {architecture} | {lr} | {len(cell)} | {shown} |"


def text(rows: Sequence[Row]) -> str:
    wanted = sum(len(unit.recipes) for unit in units())
    tables = ["", *outcomes(rows), "", *correlations(rows)] if rows else []
    return "\n".join([f"{len(rows)} of {wanted} trainings are done.", *tables, ""])


if __name__ == "__main__":
    print(text(read(RESULTS)), end="")  # noqa: T201
