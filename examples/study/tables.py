"""results.csv and turns.csv as tables; with --write, in docs/results.md: python examples/study/tables.py [--write]"""

from __future__ import annotations

import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples.study.study import COLUMNS, RECIPES, RESULTS, TURNS, Row, read, units

from spikepatch.training.arms import fisher

#: Fewer cells than these have no rank correlation; a cell has the seeds of a recipe at a rate, two of them at least.
_LEAST, _SEEDS = 10, 2

#: Where the tables stand in the page.
BEGIN, END = "<!-- tables -->", "<!-- end of the tables -->"

#: Draws of the bootstrap.
_DRAWS = 2000

#: What is known before training, so that a larger number is to mean more spikes.
PREDICTORS: dict[str, Callable[[Row], float | None]] = {
    "1 / std of the stream": lambda row: 1 / float(row["sigma_start"]),
    "Eq. 15 excess": lambda row: float(row["eq15_excess_layer1"]) if row["eq15_excess_layer1"] else None,
    "gradient ratio": lambda row: float(row["gradient_ratio"]),
    "turn (the less, the more)": lambda row: -float(row["turn"]) if "turn" in row else None,
}


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
    """Spearman's correlation of each predictor, averaged over seeds, with the share of runs with a loss event."""
    cells = [own for own in groups(rows, "regime", "architecture", "recipe", "lr").values() if len(own) >= _SEEDS]
    yield "| known before training | cells | correlation with the share of runs with a loss event | 95 % interval |"
    yield "|---|---|---|---|"
    for name, known in PREDICTORS.items():
        pairs = []
        for own in cells:
            values = [value for row in own if (value := known(row)) is not None]
            if values:
                share = statistics.fmean(int(row["loss_events"]) > 0 for row in own)
                pairs.append((statistics.fmean(values), share))
        if len(pairs) >= _LEAST:
            low, high = interval(pairs)
            yield f"| {name} | {len(pairs)} | {spearman(*zip(*pairs, strict=True)):.2f} | {low:.2f} to {high:.2f} |"


def interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of Spearman's correlation, 95 %, by the bootstrap over pairs; draws without one say nothing."""
    rng = random.Random(0)
    drawn = [spearman(*zip(*rng.choices(pairs, k=len(pairs)), strict=True)) for _ in range(_DRAWS)]
    found = sorted(value for value in drawn if not math.isnan(value)) or [math.nan]
    return found[int(0.025 * len(found))], found[int(0.975 * len(found))]


def with_turns(rows: Sequence[Row], turns: Sequence[Row]) -> list[Row]:
    """Each training with its turn, where one was measured."""
    known = {tuple(row[key] for key in COLUMNS[:5]): row["turn"] for row in turns}
    return [row | {"turn": known[key]} if (key := tuple(row[k] for k in COLUMNS[:5])) in known else row for row in rows]


def text(rows: Sequence[Row]) -> str:
    wanted = sum(len(unit.recipes) for unit in units())
    tables = ["", *outcomes(rows), "", *correlations(rows)] if rows else []
    return "\n".join([BEGIN, f"{len(rows)} of {wanted} trainings are done.", *tables, END, ""])


def main() -> None:
    found, page = text(with_turns(read(RESULTS), read(TURNS))), RESULTS.parents[2] / "docs" / "results.md"
    if sys.argv[1:] == ["--write"]:
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        page.write_text(before + found + rest.split(f"{END}\n")[1], encoding="utf-8")
    print(found, end="")  # noqa: T201


if __name__ == "__main__":
    main()
