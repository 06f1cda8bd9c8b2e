"""A drawing of matplotlib's as SVG text that takes the colours of its page, light or dark; the same bytes every time.

matplotlib is imported where something is drawn, and nowhere else.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from spikepatch.errors import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: Pixels of a chart on a page: at 420 its letters are as large as they are meant.
WIDTH, HEIGHT = 440, 270

#: Pixels around the axes.
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 12, 42

#: Of tick labels and of the axes' names.
SMALL, LARGE = 11, 12

#: The style sheet has a colour for so many lines.
STYLES = 8

_NAMED = ("text", "soft", "rule", "card", "bad", *(f"s{i}" for i in range(STYLES)))

#: A colour of the style sheet by its name -> one that matplotlib can draw, and nothing else is drawn in.
INK = {name: f"#0000{i:02x}" for i, name in enumerate(_NAMED, start=16)}

_SETTINGS: dict[Any, Any] = {
    "path.simplify": False,  # what is drawn is thin already, and each of its points counts
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "DejaVu Sans", "font.size": SMALL,
    "axes.linewidth": 0.8, "text.color": INK["soft"], "axes.labelcolor": INK["soft"], "axes.edgecolor": INK["soft"],
    "xtick.color": INK["soft"], "ytick.color": INK["soft"], "axes.labelsize": LARGE, "axes.axisbelow": True,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip

#: What a ``draw`` of below returns: by the ``gid`` of an artist, the SVG that its group begins with.
Groups = dict[str, str]


def nothing() -> Markup:
    return Markup('<p class="empty">nothing to draw: no values</p>')


def drawn(draw: Callable[[Figure], Groups], width: float, height: float, content: object) -> Markup:
    """The SVG's inside, without its root element.

    Args:
        content: what is drawn; two drawings of one page have no name in common but where they draw the same.
    """
    salt = hashlib.sha256(repr(content).encode("utf-8", "replace")).hexdigest()
    with _calm():
        import matplotlib
        from matplotlib.figure import Figure
    with _calm(), matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own are
        matplotlib.rcParams.update({**_SETTINGS, "svg.hashsalt": salt})
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        groups = draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Markup(_in_colours_of_the_page(out.getvalue(), groups))


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Neither what a library says of another one, nor fonts without the letters of a name: a browser has others."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _in_colours_of_the_page(text: str, groups: Mapping[str, str]) -> str:
    inside = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    inside = re.sub(r"\s*<defs>\s*<style.*?</defs>|\s*<metadata>.*?</metadata>", "", inside, count=2, flags=re.DOTALL)
    used = {*groups, *re.findall(r"(?:href=\"|url\()#([^\")]+)", inside)}
    inside = re.sub(r"<[^>]*>", lambda tag: _in_short(tag[0], used), inside)  # between tags is somebody's text
    return re.sub(r"<g id=\"([^\"]*)\">", lambda m: groups.get(m[1], "<g>"), inside).strip()


def _in_short(tag: str, used: Collection[str]) -> str:
    """A tag with colours by name, tenths of a pixel, and the font of its page; an id only if it is ``used``."""
    names = {ink: name for name, ink in INK.items()}
    tag = re.sub(r"(fill|stroke): (#0000[0-9a-f]{2})\b", lambda m: f"{m[1]}: var(--{names.get(m[2], 'text')})", tag)
    tag = re.sub(r" id=\"([^\"]*)\"", lambda m: m[0] if m[1] in used else "", tag)
    tag = re.sub(r"font-family: [^;\"]*; |(?<=;) font-family: [^;\"]*(?=\")", "", tag)
    tag = re.sub(r" (d|x|y|width|height)=\"[^\"]*\"", _in_tenths, tag)
    tag = re.sub(r" transform=\"rotate\(-?0 [^)]*\)\"", "", tag)
    return tag.replace("xlink:href", "href")


def _in_tenths(attribute: re.Match[str]) -> str:
    """Places in tenths of a pixel; behind a move or a line to one, another pair of numbers is a line to that."""
    places = re.sub(r"-?\d+\.\d{2,}", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), attribute[0])
    return re.sub(r"(?<=[\d.]) \n(?:L (?=[-\d]))?", " ", places)


def inside(
    figure: Figure, *, left: float = LEFT, right: float = RIGHT, top: float = TOP, bottom: float = BOTTOM
) -> None:
    """Room around the axes, in pixels."""
    width, height = figure.get_size_inches() * 72
    figure.subplots_adjust(left=left / width, right=1 - right / width, top=1 - top / height, bottom=bottom / height)


def plain(axes: Axes, x: str, y: str) -> None:
    """Names of the axes, a grid to read heights by, and no frame."""
    axes.set_xlabel(visible(x))
    axes.set_ylabel(visible(y))
    axes.grid(axis="y", color=INK["rule"], linewidth=0.8)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def ticks(
    axis: Axis, low: float, high: float, *, log: bool, whole: bool = False, most: int = 6, values: Sequence[float] = ()
) -> None:
    """Round numbers, or ``values`` where they are few, written out."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if log and 1 < len(values) <= most:
        axis.set_major_locator(FixedLocator(values))
    elif log and high >= 10 * low:
        subs = (1.0, 2.0, 5.0) if high / low < 10 ** (most / 3) else (1.0,)
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=most + 1))
    else:
        axis.set_major_locator(MaxNLocator(most, integer=whole, steps=[1, 2, 2.5, 5, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))


def written(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e6 and abs(value) >= 10_000 else f"{value:.4g}"
