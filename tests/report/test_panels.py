"""Rows of small charts: every spike is drawn where it is, and the charts of a column can be compared."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

from spikepatch.report.document import Chart, Line, Mark
from spikepatch.report.html import panel_picture
from spikepatch.report.panels import WIDTH

SVG = "{http://www.w3.org/2000/svg}"


def chart(title: str, values: list[float | None], *, log: bool = False) -> Chart:
    peaks = tuple(Mark(x, y, "ring", "event") for x, y in enumerate(values) if y is None or y > 4)
    return Chart(title, "step", "loss", (Line("seed 0", tuple(enumerate(values)), peaks),), log=log)


def drawn(*charts: tuple[Chart, ...]) -> ElementTree.Element:
    return ElementTree.fromstring(panel_picture(charts))


def heights(root: ElementTree.Element) -> list[list[float]]:
    return [[float(p.split(",")[1]) for p in line.attrib["points"].split()] for line in root.iter(f"{SVG}polyline")]


def test_a_spike_of_one_step_among_many_is_drawn() -> None:
    values: list[float | None] = [2.0] * 3000
    values[1501] = 9.0
    ((*line,),) = heights(drawn((chart("a", values),)))
    assert len(line) < 2 * WIDTH
    assert min(line) < min(sorted(line)[1:]) - 30


def test_columns_share_their_axes() -> None:
    """The same value lies as far below the top of its row in both rows, though one has no spike."""
    root = drawn((chart("a", [2.0, 2.0, 10.0]),), (chart("b", [2.0, 2.0, 2.0]),))
    first, second = heights(root)
    assert first[0] - min(first) > 50
    titles = [float(t.attrib["y"]) for t in root.iter(f"{SVG}text") if t.attrib.get("class") == "title"]
    assert first[0] - titles[0] == second[0] - titles[1]


def test_what_is_not_finite_is_a_gap_and_its_event_lies_at_the_top() -> None:
    root = drawn((chart("a", [2.0, 2.0, None, 2.0, math.nan, 2.0], log=True),))
    assert len(heights(root)) == 3
    (event,) = root.iter(f"{SVG}circle")
    assert float(event.attrib["cy"]) <= min(map(min, heights(root)))


def test_it_fits_and_titles_are_escaped() -> None:
    root = drawn((chart("<b>", [1.0, 5.0]), chart("", [0.1, 100.0], log=True)))
    assert float(root.attrib["viewBox"].split()[2]) == WIDTH <= 440
    xs = [float(p.split(",")[0]) for line in root.iter(f"{SVG}polyline") for p in line.attrib["points"].split()]
    assert 0 < min(xs) < max(xs) < WIDTH
    assert [t.text for t in root.iter(f"{SVG}text") if t.attrib.get("class") == "title"] == ["<b>"]


def test_nothing_to_draw() -> None:
    assert heights(drawn((chart("a", []),))) == []
    assert "nothing to draw" in panel_picture(())
