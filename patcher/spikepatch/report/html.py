"""A report as one self-contained file, HTML or an SVG picture: no script, nothing from the network, light and dark."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from spikepatch.apply.disk.atomic import placing
from spikepatch.errors import BadTarget
from spikepatch.report.document import Chart, Page
from spikepatch.report.figures import STYLES
from spikepatch.report.heat import heat
from spikepatch.report.panels import panels, stacked
from spikepatch.report.svg import kinds, svg

#: What every page and picture says of itself, near its beginning.
MARK = "made by spikepatch"

_ELSEWHERE = "give another path"

_FULL = (errno.ENOSPC, errno.EDQUOT)


def render(page: Page) -> str:
    """The page as HTML; every text is escaped."""
    drawing = {"heat": heat, "kinds": kinds, "svg": svg, "styles": STYLES}
    return _environment().get_template("page.html").render(page=page, mark=MARK, **drawing)


def picture(charts: Sequence[Chart]) -> str:
    """The charts, one below the other, as one SVG document; they have the same series, and share a legend."""
    return _document(*stacked(charts))


def panel_picture(rows: Sequence[Sequence[Chart]]) -> str:
    """Rows of small charts as one SVG document."""
    return _document(*panels(rows))


def _document(drawn: Markup, width: int, height: int) -> str:
    template = _environment().get_template("picture.svg")
    return template.render(drawn=drawn, width=width, height=height, mark=MARK)


def check_page(
    path: str | os.PathLike[str], *, overwrite: bool = False, sources: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Refuse a place for a page or a picture before the work for it is done. What lies in ``sources`` stays as it is.

    Raises:
        BadTarget: it is no file, or somebody's, which is replaced only with ``overwrite``; or none can be made there.
    """
    real = Path(os.path.realpath(path))
    inside = [str(each) for each in sources if Path(os.path.realpath(each)) in (real, *real.parents)]
    if inside:
        what, why, remedy = "it would be written into a source", f"{inside[0]} is read, and stays as it is", _ELSEWHERE
    elif not str(path) or os.path.isdir(real):
        what, why, remedy = "the page cannot be put there", "it is a folder", "give the name of a file"
    elif os.path.lexists(real) and not os.path.isfile(real):
        what, why, remedy = "the page cannot be put there", "it is no file, and a page is one", _ELSEWHERE
    elif not os.access(real.parent, os.W_OK | os.X_OK) or not os.path.isdir(real.parent):
        why = f"{real.parent} is no folder that this user may write to"
        what, remedy = "the page cannot be put there", "make it first, or give another path"
    elif not overwrite and not _is_ours(real):
        what, why = "there is a file that is no page of spikepatch", "it would be lost"
        remedy = f"{_ELSEWHERE}, or --overwrite (in Python, overwrite=True) to replace it"
    else:
        return
    raise BadTarget(what, where=str(path), why=why, remedy=remedy)


def write_page(page: Page, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Put the page in place whole, or leave what is there.

    Raises:
        BadTarget: as ``check_page``, or it cannot be written.
    """
    _put(render(page), path, overwrite)


def write_picture(charts: Sequence[Chart], path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Put the charts in place as SVG, as ``write_page`` does."""
    _put(picture(charts), path, overwrite)


def write_panels(rows: Sequence[Sequence[Chart]], path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Put rows of small charts in place as SVG, as ``write_page`` does."""
    _put(panel_picture(rows), path, overwrite)


def _put(text: str, path: str | os.PathLike[str], overwrite: bool) -> None:
    check_page(path, overwrite=overwrite)
    try:
        with placing(Path(os.path.realpath(path))) as new:  # a link keeps pointing to it
            new.write_bytes(text.encode("utf-8", "replace"))  # a name may have what is no text
    except OSError as error:
        raise BadTarget(
            "the page cannot be written",
            where=str(path),
            why=f"{error.strerror}; what was there before is as it was",
            remedy="make room on the disk" if error.errno in _FULL else _ELSEWHERE,
        ) from error


def _is_ours(path: Path) -> bool:
    """There is no file, an empty one, or one that says of itself that it is a page or a picture of ours."""
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return not head or MARK.encode() in head


@functools.cache  # its templates are compiled once
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
