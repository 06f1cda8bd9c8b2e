"""A heat map as inline SVG around a small image, one pixel a cell."""

from __future__ import annotations

import base64
import bisect
import math
import struct
import zlib
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from spikepatch.report.axes import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, log_ticks, names, nothing, opening, ticks
from spikepatch.report.document import HeatMap

#: Room for the scale at the right.
RIGHT = 92

#: Columns that are drawn at most; of the measurements that share one, each row shows its largest value.
COLUMNS = 240

#: Anchors of viridis (van der Walt and Smith 2015): even steps look even, in every kind of colour vision and in grey;
#: both its ends stand out from a light and from a dark page.
_ANCHORS = "440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725"

#: Colours of the scale; what has no value is transparent.
_LEVELS = 255


def heat(chart: HeatMap) -> Markup:
    """The heat map with its scale; a text where it has nothing to draw."""
    columns, values = _thinned(chart)
    present = [value for row in values for value in row if value is not None]
    if not present:
        return nothing()
    low, high = chart.scale or (min(present), max(present))
    if low == high:
        low, high = low / 1.1, high * 1.1
    cells = [bytes(_level(value, low, high) for value in row) for row in reversed(values)]
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    scale, name = WIDTH - RIGHT + 12, escape(chart.value)
    parts = [
        opening(chart.title),
        *names(chart.x, chart.y, RIGHT),
        _image(cells, LEFT, TOP, width, height),
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{width}" height="{height}"/>',
        *_rows(chart.rows, height),
        *_columns(columns, width),
        _image([bytes([level]) for level in range(_LEVELS, 0, -1)], scale, TOP, 14, height),
        f'<text x="{scale + 14}" y="{HEIGHT - BOTTOM + 34}" text-anchor="middle">{name}</text>',
    ]
    for value in _scale(low, high):
        at = TOP + height * (1 - (math.log(value) - math.log(low)) / (math.log(high) - math.log(low)))
        parts.append(f'<text class="scale" x="{scale + 19}" y="{at + 4:.1f}">{value:.3g}</text>')
    parts.append("</svg>")
    if len(present) < sum(map(len, values)):
        parts.append('<p class="empty">no colour: no finite value</p>')
    return Markup("".join(parts))


def _thinned(chart: HeatMap) -> tuple[list[float], list[list[float | None]]]:
    """At most ``COLUMNS`` columns; the largest value of those that are joined, for a spike must not disappear."""
    per = math.ceil(len(chart.columns) / COLUMNS) or 1
    starts = range(0, len(chart.columns), per)
    joined = [[_largest(row[i : i + per]) for i in starts] for row in chart.values]
    return [chart.columns[i] for i in starts], joined


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None and 0 < value < math.inf), default=None)


def _level(value: float | None, low: float, high: float) -> int:
    if value is None:
        return 0
    at = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return 1 + round((_LEVELS - 1) * min(max(at, 0.0), 1.0))


def _scale(low: float, high: float) -> list[float]:
    """The ends, and round numbers that are not too near to them."""
    margin = 10 ** (0.08 * (math.log10(high) - math.log10(low)))
    return [low, *(tick for tick in log_ticks(low, high) if low * margin < tick < high / margin), high]


def _rows(rows: Sequence[str], height: float) -> Iterable[str]:
    every = math.ceil(len(rows) / 12)
    for i in range(0, len(rows), every):
        at = TOP + height * (1 - (i + 0.5) / len(rows))
        yield f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{escape(rows[i])}</text>'


def _columns(columns: Sequence[float], width: float) -> Iterable[str]:
    """Round numbers at their places between the columns' middles."""
    whole = ticks(columns[0], columns[-1], whole=True) if len(columns) > 1 else columns
    for x in whole:
        i = max(bisect.bisect_right(columns, x) - 1, 0)
        part = (x - columns[i]) / (columns[i + 1] - columns[i]) if i + 1 < len(columns) else 0.0
        at = LEFT + width * (i + part + 0.5) / len(columns)
        yield f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>'


def _image(rows: Sequence[bytes], x: float, y: float, width: float, height: float) -> str:
    data = base64.b64encode(png(rows)).decode()
    return (
        f'<image x="{x}" y="{y}" width="{width}" height="{height}" preserveAspectRatio="none"'
        f' href="data:image/png;base64,{data}"/>'
    )


def png(rows: Sequence[bytes]) -> bytes:
    """An image of one byte a pixel: 0 is transparent, 1 to 255 are the colours of the scale (PNG, third edition)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)  # 8 bits, colours from a palette
    palette = bytes(3) + b"".join(_colour(i / (_LEVELS - 1)) for i in range(_LEVELS))
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)  # each row without a filter
    chunks = ((b"IHDR", header), (b"PLTE", palette), (b"tRNS", b"\0"), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def _colour(at: float) -> bytes:
    """Red, green and blue at ``at``, from 0 to 1, between the anchors."""
    anchors = [bytes.fromhex(anchor) for anchor in _ANCHORS.split()]
    place = at * (len(anchors) - 1)
    i = min(int(place), len(anchors) - 2)
    return bytes(round(a + (b - a) * (place - i)) for a, b in zip(anchors[i], anchors[i + 1], strict=True))
