"""A report as one self-contained HTML file: no script, nothing from the network, readable in light and dark."""

from __future__ import annotations

import os
from pathlib import Path

import jinja2

from spikepatch.report.document import Page
from spikepatch.report.heat import heat
from spikepatch.report.svg import STYLES, kinds, shape_svg, svg


def render(page: Page) -> str:
    """The page as HTML; every text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    drawing = {"svg": svg, "heat": heat, "kinds": kinds, "shape_svg": shape_svg, "styles": STYLES}
    return environment.get_template("page.html").render(page=page, **drawing)


def write_page(page: Page, path: str | os.PathLike[str]) -> None:
    """Write the page to ``path``, which is replaced."""
    Path(path).write_text(render(page), encoding="utf-8")
