"""Heat maps: every cell the colour of its value, in its place, beside a scale that says what a colour stands for."""

from __future__ import annotations

import base64
import io
import math
import re
from itertools import pairwise

import pytest
from PIL import Image

from spikepatch.report.document import HeatMap
from spikepatch.report.heat import COLUMNS, heat

Pixel = tuple[int, int, int] | None


def images(chart: HeatMap) -> tuple[list[list[Pixel]], list[Pixel]]:
    """The cells, the top row first; and the scale, from its top."""
    found = []
    for data in re.findall(r'href="data:image/png;base64,([^"]*)"', heat(chart)):
        image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")
        pixels = [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]
        rows = [pixels[i : i + image.width] for i in range(0, len(pixels), image.width)][::-1]  # it is drawn turned
        found.append([[pixel[:3] if pixel[3] else None for pixel in row] for row in rows])
    cells, scale = found
    return cells, [pixel for (pixel,) in scale]


def chart(*values: tuple[float | None, ...], columns: tuple[float, ...] | None = None) -> HeatMap:
    rows = tuple(str(i + 1) for i in range(len(values)))
    return HeatMap("t", "step", "layer", "std", rows, columns or tuple(map(float, range(len(values[0])))), values)


def luminance(pixel: Pixel) -> float:
    """Relative luminance of an sRGB colour (WCAG 2)."""
    assert pixel is not None
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in pixel)]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_a_cell_has_the_colour_that_the_scale_gives_its_value() -> None:
    cells, scale = images(chart((0.1, 1.0), (10.0, 1000.0)))
    places = [[scale[::-1].index(pixel) / (len(scale) - 1) for pixel in row] for row in cells]
    expected = [[math.log10(value / 0.1) / 4 for value in row] for row in ((10.0, 1000.0), (0.1, 1.0))]
    for row, wanted in zip(places, expected, strict=True):
        assert row == pytest.approx(wanted, abs=0.5 / (len(scale) - 1))


def test_the_scale_is_ordered_by_lightness() -> None:
    _, scale = images(chart((1.0, 2.0)))
    assert len(scale) == 255
    light = [luminance(pixel) for pixel in scale[::4]]  # neighbours may be the same in 8 bits
    assert all(above > below for above, below in pairwise(light))


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, 0.0, -1.0])
def test_what_has_no_value_has_no_colour(missing: float | None) -> None:
    cells, _ = images(chart((1.0, missing), (2.0, 3.0)))
    assert [[pixel is None for pixel in row] for row in cells] == [[False, False], [False, True]]
    assert "no finite value" in heat(chart((1.0, missing)))
    assert "no finite value" not in heat(chart((1.0, 2.0)))


@pytest.mark.parametrize("count", [COLUMNS, COLUMNS + 1, 10 * COLUMNS - 1, 10_000])
def test_many_columns_are_joined_and_no_peak_is_lost(count: int) -> None:
    for spike in (0, 1, count // 2, count - 1):
        values = tuple(100.0 if i == spike else 1.0 for i in range(count))
        cells, scale = images(chart(values))
        assert len(cells[0]) <= COLUMNS
        assert cells[0].count(scale[0]) == 1
        place = cells[0].index(scale[0]) / len(cells[0])
        assert place == pytest.approx(spike / count, abs=1 / len(cells[0]))


def test_numbers_beside_it() -> None:
    values = tuple((0.02 * (i + 1), 0.5) for i in range(30))
    text = str(heat(chart(*values, columns=(50.0, 100.0))))
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert {"50", "100", "1", "4", "28", "0.02", "0.6", "step", "layer", "std"} <= set(labels)
    assert len(labels) < 30


@pytest.mark.parametrize("values", [((1.0,),), ((1.0, 1.0), (1.0, 1.0)), ((1e-300, 1e300),)])
def test_every_range_can_be_drawn(values: tuple[tuple[float, ...], ...]) -> None:
    cells, _ = images(chart(*values))
    assert all(pixel is not None for row in cells for pixel in row)


@pytest.mark.parametrize("values", [((None, math.nan),), ((),), ()])
def test_nothing_to_draw(values: tuple[tuple[float | None, ...], ...]) -> None:
    assert "no values" in heat(HeatMap("t", "x", "y", "v", ("1",) * len(values), (1.0, 2.0), values))


def test_text_is_escaped() -> None:
    hostile = '"><script>alert(1)</script>'
    assert "<script" not in heat(HeatMap(hostile, hostile, hostile, hostile, (hostile,), (1.0,), ((1.0,),)))
