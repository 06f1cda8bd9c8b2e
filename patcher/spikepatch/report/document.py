"""What a report is made of, as frozen data: the same tables go to the terminal and to HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tone = Literal["good", "warning", "bad", "neutral"]


@dataclass(frozen=True)
class Table:
    """Rows of text; a column of numbers only is aligned to the right."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Series:
    """One line of a chart: (x, y) in order of x; a y of None leaves a gap."""

    name: str
    points: tuple[tuple[float, float | None], ...]


@dataclass(frozen=True)
class Chart:
    """Lines over a linear x axis; ``log``: the y axis is logarithmic, and only positive values are drawn.

    ``marks`` are labelled horizontal lines, such as a threshold.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    log: bool = False
    marks: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Badge:
    """A few words that are to be seen first."""

    label: str
    value: str
    tone: Tone = "neutral"


@dataclass(frozen=True)
class Section:
    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()


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
