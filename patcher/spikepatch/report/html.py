"""A report as one self-contained file, HTML or an SVG picture: no script, nothing from the network, light and dark."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jinja2

from spikepatch.report.axes import HEIGHT, WIDTH
from spikepatch.report.document import Chart, Page
from spikepatch.report.heat import heat
from spikepatch.report.svg import STYLES, kinds, shape_svg, svg

#: Pixels of a picture: a title's height, a legend line's, a name's letter at 12 px, and what is beside a name.
_TITLE, _LINE, _LETTER, _SWATCH = 34, 22, 7, 58


def render(page: Page) -> str:
    """The page as HTML; every text is escaped."""
    drawing = {"heat": heat, "kinds": kinds, "shape_svg": shape_svg}
    return _environment().get_template("page.html").render(page=page, svg=svg, styles=STYLES, **drawing)


def picture(charts: Sequence[Chart]) -> str:
    """The charts, one below the other, as one SVG document; they have the same series, and share a legend."""
    places = [(chart, i * (_TITLE + HEIGHT)) for i, chart in enumerate(charts)]
    x, y, legend = 16, len(charts) * (_TITLE + HEIGHT) + _LINE, []
    for name in (series.name for series in charts[0].series):
        wide = _SWATCH + _LETTER * len(name)
        if x > 16 and x + wide > WIDTH:
            x, y = 16, y + _LINE
        legend.append((name, x, y))
        x += wide
    size = {"width": WIDTH, "height": y + _LINE, "title": _TITLE}
    return (
        _environment().get_template("picture.svg").render(charts=places, legend=legend, svg=svg, styles=STYLES, **size)
    )


def write_page(page: Page, path: str | os.PathLike[str]) -> None:
    """Write the page to ``path``, which is replaced."""
    Path(path).write_text(render(page), encoding="utf-8")


def write_picture(charts: Sequence[Chart], path: str | os.PathLike[str]) -> None:
    """Write the charts as SVG to ``path``, which is replaced."""
    Path(path).write_text(picture(charts), encoding="utf-8")


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
