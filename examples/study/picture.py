"""results.csv as a picture beside it: the share of runs with a loss event by recipe and rate."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from examples.study.study import RATES, RECIPES, Row
from matplotlib.figure import Figure

#: Dots of a recipe lie so far from those of its neighbour, of the distance between two rates.
_BESIDE = 0.14

#: Recipes with a small shortcut warm, those with a large one cold (Okabe and Ito's colours for all eyes).
_COLOURS = ("#d55e00", "#e69f00", "#cc79a7", "#0072b2", "#009e73")


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel for each architecture (columns) in each regime (rows) that all recipes were trained in."""
    cells: dict[tuple[str, str, str, str], list[bool]] = {}
    for row in rows:
        key = (row["regime"], row["architecture"], row["recipe"], row["lr"])
        cells.setdefault(key, []).append(int(row["loss_events"]) > 0)
    whole = {key[:2] for key in cells if key[2] not in (RECIPES[0], RECIPES[3])}
    regimes, architectures = (list(dict.fromkeys(key[i] for key in cells if key[:2] in whole)) for i in (0, 1))
    rates = [f"{rate:g}" for rate in sorted(RATES)]
    with mpl.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, 0.8 + 2.1 * len(regimes)), layout="constrained")
        axes = figure.subplots(len(regimes), len(architectures), squeeze=False, sharex=True, sharey=True)
        for (r, regime), (a, architecture) in itertools.product(enumerate(regimes), enumerate(architectures)):
            panel = axes[r, a]
            panel.set_title(f"{architecture}, {regime}", loc="left", fontsize=9)
            for i, recipe in enumerate(RECIPES):
                found = [cells.get((regime, architecture, recipe, rate), []) for rate in rates]
                places = [x + _BESIDE * (i - 2) for x in range(len(rates))]
                shares = [sum(own) / len(own) if own else float("nan") for own in found]
                panel.vlines(places, 0, shares, color=_COLOURS[i], linewidth=2)
                panel.plot(places, shares, "o", color=_COLOURS[i], markersize=5, label=recipe)
            panel.set_xticks(range(len(rates)), rates)
            panel.set_ylim(-0.06, 1.06)
            panel.spines[["top", "right"]].set_visible(False)
        figure.supxlabel("learning rate", fontsize=9)
        figure.supylabel("share of runs with a loss event", fontsize=9)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
        figure.savefig(path, metadata={"Date": None})
