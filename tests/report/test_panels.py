"""Rows of small charts: every spike is drawn where it is, and the charts of a column can be compared."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from spikepatch.report.document import Chart, Line, Mark
from spikepatch.report.html import panel_picture
from spikepatch.report.panels import NARROW

SVG = "{http://www.w3.org/2000/svg}"


def chart(title: str, values: list[float | None], *, log: bool = False) -> Chart:
    peaks = tuple(Mark(x, y, "ring", "event") for x, y in enumerate(values) if y is None or y > 4)
    return Chart(title, "step", "loss", (Line("seed 0", tuple(enumerate(values)), peaks),), log=log)


def drawn(*charts: tuple[Chart, ...]) -> ElementTree.Element:
    return ElementTree.fromstring(panel_picture(charts))


def groups(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [group for group in root.iter(f"{SVG}g") if group.get("class") == name]


def points(root: ElementTree.Element) -> list[list[tuple[float, float]]]:
    paths = [path for group in groups(root, "run") for path in group.findall(f"{SVG}path")]
    return [[(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.attrib["d"])] for path in paths]


def heights(root: ElementTree.Element) -> list[list[float]]:
    return [[y for _, y in line] for line in points(root)]


def titles(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [text for group in groups(root, "title") for text in group.iter(f"{SVG}text")]


def test_a_spike_of_one_step_among_many_is_drawn() -> None:
    values: list[float | None] = [2.0] * 3000
    values[1501] = 9.0
    ((*line,),) = heights(drawn((chart("a", values),)))
    assert len(line) < 2 * NARROW
    assert min(line) < min(sorted(line)[1:]) - 30


def test_columns_share_their_axes() -> None:
    """The same value lies as far below the top of its row in both rows, though one has no spike."""
    root = drawn((chart("a", [2.0, 2.0, 10.0]),), (chart("b", [2.0, 2.0, 2.0]),))
    first, second = heights(root)
    assert first[0] - min(first) > 50
    above = [float(text.attrib["y"]) for text in titles(root)]
    assert first[0] - above[0] == pytest.approx(second[0] - above[1], abs=0.2)


def test_what_is_not_finite_is_a_gap_and_its_event_lies_at_the_top() -> None:
    root = drawn((chart("a", [2.0, 2.0, None, 2.0, math.nan, 2.0], log=True),))
    assert len(heights(root)) == 3
    (event,) = (use for group in groups(root, "event") for use in group.iter(f"{SVG}use"))
    assert float(event.attrib["y"]) <= min(map(min, heights(root)))


def test_it_fits_and_titles_are_escaped() -> None:
    root = drawn((chart("<b>", [1.0, 5.0]), chart("", [0.1, 100.0], log=True)))
    assert float(root.attrib["viewBox"].split()[2]) == NARROW <= 440
    xs = [x for line in points(root) for x, _ in line]
    assert 0 < min(xs) < max(xs) < NARROW
    assert [text.text for text in titles(root)] == ["<b>"]


def test_nothing_to_draw() -> None:
    assert heights(drawn((chart("a", []),))) == []
    assert "nothing to draw" in panel_picture(())
