"""What a report is made of, as frozen data: the same tables go to the terminal and to HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Tone = Literal["good", "warning", "bad", "neutral"]
_NUMBER = re.compile(r"-|n/a|[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?[x%]?")
#: Entries that say nothing.
EMPTY = ("", "-", "n/a")
Shape = Literal["triangle", "diamond", "cross", "square", "ring"]


@dataclass(frozen=True)
class Table:
    """Rows of text; a column of numbers only is aligned to the right.

    ``usual``: by header, the entry that goes without saying, such as a default.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    usual: Mapping[str, str] = field(default_factory=dict)

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Whether a column has numbers only."""
        return tuple(all(_NUMBER.fullmatch(row[i]) for row in self.rows) for i in range(len(self.headers)))

    @property
    def shown(self) -> Table:
        """Without the columns that say nothing: all empty, or all as usual. The first one stays."""
        silent = [{*EMPTY, self.usual.get(header, "")} for header in self.headers]
        kept = [i for i in range(len(self.headers)) if not i or any(row[i] not in silent[i] for row in self.rows)]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return replace(self, headers=tuple(self.headers[i] for i in kept), rows=rows) if self.rows else self


@dataclass(frozen=True)
class Mark:
    """A point of a line that stands out; a y of None, such as a loss that is not finite, lies at the upper edge.

    ``shape`` and ``kind``, what the shape stands for, go to the legend; ``label`` is a few characters beside the point,
    and ``text`` what is seen on pointing at it.
    """

    x: float
    y: float | None
    shape: Shape
    kind: str
    label: str = ""
    text: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a chart: (x, y) in the order in which they are joined; a y of None leaves a gap.

    The line may go back to a smaller x behind a gap only.
    """

    name: str
    points: tuple[tuple[float, float | None], ...]
    events: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Chart:
    """Lines; ``log``, ``log_x``: that axis is logarithmic, and only what is positive there is drawn.

    ``marks`` are labelled horizontal lines, such as a threshold; ``spans`` are shaded, each from one x to another.
    """

    title: str
    x: str
    y: str
    series: tuple[Line, ...]
    log: bool = False
    log_x: bool = False
    marks: tuple[tuple[str, float], ...] = ()
    spans: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class HeatMap:
    """Positive values by row and column as colours on a logarithmic scale; None, or what is not positive, has none.

    ``values`` has a tuple for each of ``rows``, the lowest first, with a value for each of ``columns``. ``scale``: the
    values at its ends, for maps that are to be compared; by default the smallest and the largest value.
    """

    title: str
    x: str
    y: str
    value: str
    rows: tuple[str, ...]
    columns: tuple[float, ...]
    values: tuple[tuple[float | None, ...], ...]
    scale: tuple[float, float] | None = None


@dataclass(frozen=True)
class Badge:
    """A few words that are to be seen first."""

    label: str
    value: str
    tone: Tone = "neutral"


@dataclass(frozen=True)
class Ranked:
    """A finding: how bad it is in a word, which its colour says again, and what it is."""

    rank: str
    text: str
    tone: Tone = "neutral"


@dataclass(frozen=True)
class Section:
    """``code``: texts that are shown letter by letter, such as commands. ``folded``: closed until it is opened.
    ``ranked``: findings, the worst first.
    """

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    heat_maps: tuple[HeatMap, ...] = ()
    code: tuple[str, ...] = ()
    folded: bool = False
    ranked: tuple[Ranked, ...] = ()


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    badges: tuple[Badge, ...]
    sections: tuple[Section, ...]
    footer: str = ""


def number(value: float | None, digits: int = 3) -> str:
    """A number as it is shown everywhere; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"
