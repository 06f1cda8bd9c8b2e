"""Charts: every point in its place, gaps kept, text escaped."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from spikepatch.report.document import Chart, Series
from spikepatch.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, svg


def drawn(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(str(svg(chart)))


def circles(root: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter("circle")]


def test_linear_axes() -> None:
    root = drawn(Chart("t", "x", "y", (Series("a", ((0, 0.0), (5, 5.0), (10, 10.0))),)))
    (x0, y0), (x1, y1), (x2, y2) = circles(root)
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert (y0, y2) == (HEIGHT - BOTTOM, TOP)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)


def test_a_logarithmic_axis() -> None:
    root = drawn(Chart("t", "x", "y", (Series("a", ((1, 0.01), (2, 1.0), (3, 100.0))),), log=True))
    heights = [y for _, y in circles(root)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    labels = {text.text for text in root.iter("text")}
    assert {"0.01", "0.1", "1", "10", "100"} <= labels


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, 0.0, -1.0])
def test_what_cannot_be_drawn_leaves_a_gap(missing: float | None) -> None:
    points = ((1, 1.0), (2, 2.0), (3, missing), (4, 3.0), (5, 4.0))
    root = drawn(Chart("t", "x", "y", (Series("a", points),), log=True))
    assert len(circles(root)) == 4
    assert [len(line.attrib["points"].split()) for line in root.iter("polyline")] == [2, 2]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "points", [((1, 5.0),), ((1, 5.0), (2, 5.0)), ((1, 1e-30), (2, 1e30)), ((1, 0.999), (2, 1.001))]
)
def test_every_range_can_be_drawn(points: tuple[tuple[float, float], ...], log: bool) -> None:
    root = drawn(Chart("t", "x", "y", (Series("a", points),), log=log))
    assert len(circles(root)) == len(points)
    for x, y in circles(root):
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1


def test_nothing_to_draw() -> None:
    assert "no values" in svg(Chart("t", "x", "y", (Series("a", ((1, None),)),)))


def test_text_is_escaped() -> None:
    hostile = '"><script>alert(1)</script>'
    chart = Chart(hostile, hostile, hostile, (Series(hostile, ((1, 1.0), (2, 2.0))),), marks=((hostile, 1.5),))
    assert "<script" not in svg(chart)
    assert drawn(chart).attrib["aria-label"] == hostile
