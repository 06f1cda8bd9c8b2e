"""The study as tables: python examples/study/tables.py [--write], which also writes docs/study.md and the picture."""

from __future__ import annotations

import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples.study.picture import draw
from examples.study.study import COLUMNS, RECIPES, RESULTS, TURNS, UNITS, Row, read
from examples.study.turn import MEASURED

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
    "growth": lambda row: float(row["growth"]) if "growth" in row else None,
    "turn (the less, the more)": lambda row: -float(row["turn"]) if "turn" in row else None,
    "random turn (the less, the more)": lambda row: -float(row["random_turn"]) if "random_turn" in row else None,
}

#: A predictor is chosen on the cells of this architecture, and what it is worth is told by those of all others.
CHOSEN_ON = "gpt2"


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
    """A line for each recipe in each regime and architecture: runs with a loss event by rate, the rest over all."""
    rates = sorted({row["lr"] for row in rows}, key=float)
    yield (
        f"| regime | model | recipe | {' | '.join(f'lr {lr}' for lr in rates)} | events |"
        " excess, median / largest, nats | gradient peak, median / largest | held-out loss | p |"
    )
    yield f"|{'---|' * (8 + len(rates))}"
    for (regime, architecture), cell in groups(rows, "regime", "architecture").items():
        by_recipe = groups(cell, "recipe")
        base = by_recipe.get((RECIPES[0],), [])
        for (recipe,), own in sorted(by_recipe.items(), key=lambda item: RECIPES.index(item[0][0])):
            by_rate = groups(own, "lr")
            shares = [f"{_hit(by_rate[lr,])} of {len(by_rate[lr,])}" if (lr,) in by_rate else "" for lr in rates]
            sizes = [excess(row) for row in own]
            peaks = [float(row["largest_gradient_ratio"] or 1) for row in own]
            p = f"{fisher(_hit(own), len(own), _hit(base), len(base)):.2g}" if base and recipe != RECIPES[0] else ""
            yield (
                f"| {regime} | {architecture} | {recipe} | {' | '.join(shares)} |"
                f" {sum(int(row['loss_events']) for row in own)} |"
                f" {statistics.median(sizes):.2f} / {max(sizes):.2f} |"
                f" {_times(statistics.median(peaks))} / {_times(max(peaks))} |"
                f" {statistics.fmean(float(row['held_out_loss']) for row in own):.3f} | {p} |"
            )


def _times(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _hit(rows: Sequence[Row]) -> int:
    """Runs with a loss event."""
    return sum(int(row["loss_events"]) > 0 for row in rows)


def correlations(rows: Sequence[Row]) -> Iterator[str]:
    """Spearman's correlation of each predictor, averaged over seeds, with the share of runs with a loss event.

    Over the cells of the architecture that a predictor is chosen on, over those of the others, with the interval of
    the latter, and within each regime of the others alone: whether spikes come hangs on the regime, which none knows.
    """
    cells = [own for own in groups(rows, "regime", "architecture", "recipe", "lr").values() if len(own) >= _SEEDS]
    halves = {on: [own for own in cells if (own[0]["architecture"] == CHOSEN_ON) is on] for on in (True, False)}
    if min(map(len, halves.values())) < _LEAST:
        return
    parts = {}
    for on, name in ((True, CHOSEN_ON), (False, "others")):
        parts[f"{name}, {len(halves[on])} cells"] = halves[on]
        for (regime,), own in groups([row for cell in halves[on] for row in cell], "regime").items():
            parts[f"{name}, {regime}"] = [*groups(own, "architecture", "recipe", "lr").values()]
    yield f"| known before training | {' | '.join(parts)} | 95 % interval, others |"
    yield f"|{'---|' * (2 + len(parts))}"
    for name, known in PREDICTORS.items():
        figures = [_number(correlation(_pairs(part, known))) for part in parts.values()]
        told = _pairs(halves[False], known)
        between = " to ".join(map(_number, interval(told))) if not math.isnan(correlation(told)) else ""
        yield f"| {name} | {' | '.join(figures)} | {between} |"


def _number(value: float) -> str:
    """Empty where there is none: all were the same, or nothing was known."""
    return "" if math.isnan(value) else f"{value:.2f}"


def _pairs(cells: Sequence[Sequence[Row]], known: Callable[[Row], float | None]) -> list[tuple[float, float]]:
    """Of each cell, what was known and the share of runs with a loss event; without those where nothing was known."""
    found = []
    for own in cells:
        values = [value for row in own if (value := known(row)) is not None]
        if values:
            found.append((statistics.fmean(values), statistics.fmean(int(row["loss_events"]) > 0 for row in own)))
    return found


def correlation(pairs: Sequence[tuple[float, float]]) -> float:
    return spearman(*zip(*pairs, strict=True)) if pairs else math.nan


def interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of Spearman's correlation, 95 %, by the bootstrap over pairs; draws without one say nothing."""
    rng = random.Random(0)
    drawn = [correlation(rng.choices(pairs, k=len(pairs))) for _ in range(_DRAWS if pairs else 0)]
    found = sorted(value for value in drawn if not math.isnan(value)) or [math.nan]
    return found[int(0.025 * len(found))], found[int(0.975 * len(found))]


def with_turns(rows: Sequence[Row], turns: Sequence[Row]) -> list[Row]:
    """Each training with what was measured before it, where it was."""
    known = {tuple(row[key] for key in COLUMNS[:5]): {name: row[name] for name in MEASURED} for row in turns}
    return [row | known.get(tuple(row[key] for key in COLUMNS[:5]), {}) for row in rows]


def text(rows: Sequence[Row]) -> str:
    wanted = sum(len(unit.cells) for unit in UNITS)
    tables = ["", *outcomes(rows), "", *correlations(rows)] if rows else []
    return "\n".join([BEGIN, f"{len(rows)} of {wanted} trainings are done.", *tables, END, ""])


def main() -> None:
    rows = read(RESULTS)
    found, page = text(with_turns(rows, read(TURNS))), RESULTS.parents[2] / "docs" / "study.md"
    if sys.argv[1:] == ["--write"]:
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        page.write_text(before + found + rest.split(f"{END}\n")[1], encoding="utf-8")
        draw(rows, RESULTS.with_suffix(".svg"))
    print(found, end="")  # noqa: T201


if __name__ == "__main__":
    main()
