"""Charts: every point in its place, gaps kept, text escaped."""

from __future__ import annotations

import math
import random
import re
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from spikepatch.report.document import Chart, Line, Mark
from spikepatch.report.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from spikepatch.report.svg import kinds, svg


def drawn(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(str(svg(chart)))


def series(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [group for group in root.iter("g") if group.get("class") == "series"]


def circles(root: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(c.attrib["x"]), float(c.attrib["y"])) for group in series(root) for c in group.iter("use")]


def lines(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [path for group in series(root) for path in group.findall("path")]


def dots(line: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", line.attrib["d"])]


def test_linear_axes() -> None:
    root = drawn(Chart("t", "x", "y", (Line("a", ((0, 0.0), (5, 5.0), (10, 10.0))),)))
    (x0, y0), (x1, y1), (x2, y2) = circles(root)
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert HEIGHT - BOTTOM > y0 > y1 > y2 > TOP
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert {"0", "2", "10"} <= {text.text for text in root.iter("text")}


def test_a_logarithmic_axis() -> None:
    root = drawn(Chart("t", "x", "y", (Line("a", ((1, 0.01), (2, 1.0), (3, 100.0))),), log=True))
    heights = [y for _, y in circles(root)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert {"0.01", "0.1", "1", "10", "100"} <= {text.text for text in root.iter("text")}


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, 0.0, -1.0])
def test_what_cannot_be_drawn_leaves_a_gap(missing: float | None) -> None:
    points = ((1, 1.0), (2, 2.0), (3, missing), (4, 3.0), (5, 4.0))
    root = drawn(Chart("t", "x", "y", (Line("a", points),), log=True))
    assert len(circles(root)) == 4
    assert [len(dots(line)) for line in lines(root)] == [2, 2]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "points", [((1, 5.0),), ((1, 5.0), (2, 5.0)), ((1, 1e-30), (2, 1e30)), ((1, 0.999), (2, 1.001))]
)
def test_every_range_can_be_drawn(points: tuple[tuple[float, float], ...], log: bool) -> None:
    root = drawn(Chart("t", "x", "y", (Line("a", points),), log=log))
    assert len(circles(root)) == len(points)
    for x, y in circles(root):
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1


def test_nothing_to_draw() -> None:
    assert "no values" in svg(Chart("t", "x", "y", (Line("a", ((1, None),)),)))


def test_text_is_escaped() -> None:
    hostile = '"><script>alert(1)</script>'
    series = Line(hostile, ((1, 1.0), (2, 2.0)), (Mark(1, 1.0, "ring", hostile, hostile, hostile),))
    chart = Chart(hostile, hostile, hostile, (series,), marks=((hostile, 1.5),))
    assert "<script" not in svg(chart)
    assert drawn(chart).attrib["aria-label"] == hostile


@pytest.mark.parametrize("count", [61, 5_000, 100_000])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_long_line_keeps_every_spike(count: int, sign: int) -> None:
    """Wherever it lies: of each column of pixels the lowest and the highest point are drawn."""
    noise = random.Random(0)
    ys = [noise.gauss(0, 1) for _ in range(count)]
    spikes = {noise.randrange(count): sign * (100.0 + i) for i in range(20)}
    for x, y in spikes.items():
        ys[x] = y
    root = drawn(Chart("t", "x", "y", (Line("a", tuple(enumerate(ys))),)))
    assert not circles(root)
    line, *medians = lines(root)
    assert len(medians) == (count > 4 * WIDTH)
    points = dots(line)
    assert len(points) <= min(count, 4 * (WIDTH - LEFT - RIGHT + 1))
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    scale = (WIDTH - LEFT - RIGHT) / (count - 1)
    columns: dict[int, list[float]] = {}
    for i, y in enumerate(ys):
        columns.setdefault(int(LEFT + i * scale), []).append(y)
    heights = {min(y for _, y in points): max(ys), max(y for _, y in points): min(ys)}
    (top, high), (bottom, low) = sorted(heights.items())
    checked = 0
    for column, values in columns.items():
        ends = [min(values), max(values)]
        expected = [bottom + (value - low) / (high - low) * (top - bottom) for value in ends]
        here = [y for x, y in points if column - 0.1 <= x <= column + 1.1]
        for y in expected:
            assert min(abs(y - other) for other in here) <= 0.11, column
            checked += 1
    assert checked > 100


def test_a_dense_line_has_its_medians() -> None:
    noise = random.Random(0)
    points = tuple((float(x), 100.0 * (x >= 25_000) + noise.random()) for x in range(50_000))
    area, medians = lines(drawn(Chart("t", "x", "y", (Line("a", points),))))
    assert ["opacity" in line.attrib["style"] for line in (area, medians)] == [True, False]
    heights = {round(y) for _, y in dots(medians)}
    tops = [y for _, y in dots(area)]
    assert len(heights) == 2
    assert min(tops) < min(heights) < max(heights) < max(tops)


def test_a_short_line_keeps_every_point() -> None:
    root = drawn(Chart("t", "x", "y", (Line("a", tuple((x, float(x % 7)) for x in range(400))),)))
    assert sum(len(dots(line)) for line in lines(root)) == 400


def test_a_lone_point_of_a_long_line_is_seen() -> None:
    points = tuple((x, None if x in (499, 501) else 1.0) for x in range(1000))
    root = drawn(Chart("t", "x", "y", (Line("a", points),)))
    assert len(circles(root)) == 1


def test_a_line_may_go_back_behind_a_gap() -> None:
    points = ((1, 1.0), (2, 5.0), (3, None), (2, 1.0), (3, 1.0))
    runs = [dots(line) for line in lines(drawn(Chart("t", "x", "y", (Line("a", points),))))]
    assert [len(run) for run in runs] == [2, 2]
    assert runs[0][1][0] == runs[1][0][0]


def event_shapes(root: ElementTree.Element) -> list[tuple[str, tuple[float, float], str | None]]:
    found = []
    for group in root.iter("g"):
        if group.get("class", "").startswith("event"):
            (use,) = group.iter("use")
            at = float(use.attrib["x"]), float(use.attrib["y"])
            found.append((group.attrib["class"].split()[1], at, group.findtext("title")))
    return found


def labels(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [text for group in root.iter("g") if group.get("class") == "label" for text in group.iter("text")]


@pytest.mark.parametrize("log", [False, True])
def test_events_lie_on_their_points(log: bool) -> None:
    points = tuple((x, 10.0 if x == 30 else 1.0) for x in range(50))
    events = (
        Mark(30, 10.0, "triangle", "loss spike", "1", "seen at step 30"),
        Mark(40, None, "cross", "not finite", "2"),
    )
    chart = Chart("t", "x", "y", (Line("a", points, events),), log=log)
    root = drawn(chart)
    assert kinds(chart) == {"loss spike": "▲", "not finite": "✕"}
    (first, at, text), (second, above, kind) = event_shapes(root)
    assert (first, text, second, kind) == ("triangle", "seen at step 30", "cross", "not finite")
    assert at == circles(root)[30]
    assert above == (circles(root)[40][0], TOP)
    assert [text.text for text in labels(root)] == ["1", "2"]


def test_crowded_labels_are_left_out_and_no_shape_is() -> None:
    events = tuple(Mark(x, 1.0, "diamond", "k", str(x)) for x in range(1000))
    root = drawn(Chart("t", "x", "y", (Line("a", tuple((x, 1.0) for x in range(1000)), events),)))
    assert len(event_shapes(root)) == 1000
    places = [float(text.attrib["x"]) for text in labels(root)]
    assert len(places) > 10
    assert min(b - a for a, b in pairwise(places)) > 7


def test_learning_rates_on_a_logarithmic_axis() -> None:
    points = ((1e-4, 3.0), (1e-3, 2.0), (1e-2, 4.0))
    root = drawn(Chart("t", "lr", "loss", (Line("a", points),), log_x=True))
    (x0, _), (x1, _), (x2, _) = circles(root)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert LEFT < x0 < x2 < WIDTH - RIGHT
    assert {"0.0001", "0.001", "0.01"} <= {text.text for text in root.iter("text")}
    assert len(circles(drawn(Chart("t", "lr", "loss", (Line("a", points[:1]),), log_x=True)))) == 1


def test_spans_are_shaded_behind_everything() -> None:
    """At least a pixel wide, cut off at the axis, and none outside of it."""
    line = Line("a", tuple((float(x), float(x)) for x in range(101)))
    root = drawn(Chart("t", "x", "y", (line,), spans=((20, 60), (50, 50), (90, 500), (200, 300))))
    spans = [path for group in root.iter("g") if group.get("class") == "span" for path in group.findall("path")]
    reach = [[x for x, _ in dots(span)] for span in spans]
    widths = [max(xs) - min(xs) for xs in reach]
    assert len(widths) == 3
    assert widths[1] == pytest.approx(1, abs=0.02)
    assert widths[0] == pytest.approx(4 * widths[2], rel=0.01)
    assert max(map(max, reach)) == WIDTH - RIGHT
    order = [element for element in root.iter() if element.tag in ("path", "g")]
    assert order.index(spans[-1]) < order.index(lines(root)[0])


def test_numbers_in_a_name_stay_as_they_are() -> None:
    """What is drawn is rounded to tenths of a pixel; what is written is not."""
    chart = Chart("lr 0.000123456", "x 1.23456", "#000012", (Line("a 0.00012345", ((1, 1.0), (2, 1.1))),))
    text = str(svg(chart))
    for name in ("lr 0.000123456", "x 1.23456", "#000012", "a 0.00012345"):
        assert name in text
    drawn_places = re.findall(r" (?:d|x|y)=\"([^\"]*)\"", text)
    assert len(drawn_places) > 10
    assert not [place for place in drawn_places if re.search(r"\.\d{2}", place)]


def test_a_page_of_long_lines_is_small() -> None:
    long = tuple((float(x), 2.0 + (x % 7) / 10) for x in range(100_000))
    assert len(svg(Chart("t", "x", "y", tuple(Line(str(i), long) for i in range(3))))) < 120_000


def test_drawn_again_it_is_the_same_whatever_matplotlib_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    chart = Chart("t", "x", "y", (Line("a", ((1, 1.0), (2, 3.0))),), marks=(("m", 2.0),), spans=((1, 1.5),))
    first = svg(chart)
    matplotlib = sys.modules["matplotlib"]
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "path")
    assert svg(chart) == first
    assert matplotlib.rcParams["font.size"] == 30


def test_names_of_two_charts_differ() -> None:
    """Both stand in one page."""
    charts = [Chart("t", "x", "y", (Line("a", ((1, 1.0), (2, y))),)) for y in (1.0, 2.0)]
    ids = [set(re.findall(r"id=\"([^\"]*)\"", svg(chart))) for chart in charts]
    assert ids[0]
    assert not ids[0] & ids[1]
