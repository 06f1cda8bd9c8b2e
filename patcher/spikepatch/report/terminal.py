"""Tables and prose on the terminal. At any width numbers and names are whole, and lines end between words."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, zip_longest
from typing import TextIO

import click

from spikepatch.report.document import EMPTY, Table

#: Prose is no wider, and no line is narrower, than so many columns.
_WIDEST, _NARROWEST = 100, 20

#: Columns of text are not folded below this, where they have more.
_FOLDED = 16

#: Between two columns of a table, and between two entries of a block.
_GAP, _APART = "  ", "   "

#: Stands for a space that no line ends at.
_HELD = "\ue000"

#: What is there to be copied, and stays on one line: what is in backticks, and a command at a line's beginning.
_COPIED = re.compile(r"`[^`\n]+`|(?<=^remedy: )spikepatch [a-z]+ .*|^spikepatch [a-z]+ .*")


def columns_of(stream: TextIO) -> int | None:
    """How wide a line on ``stream`` may be: COLUMNS where it is set, else as wide as the terminal; None where it is
    none, for files and pipes take lines of any length.
    """
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return max(int(asked), _NARROWEST)
    try:
        found = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return None
    return max(found, _NARROWEST) if found else None


def wrapped(text: str, width: int | None) -> Iterator[str]:
    """Each line of ``text`` between words, what follows its first line further in; a word that is longer is whole."""
    for line in text.split("\n"):
        if width is None or len(line) <= min(width, _WIDEST):
            yield line
            continue
        body = line.lstrip(" ")
        indent = " " * (len(line) - len(body))
        held = _COPIED.sub(lambda found: found[0].replace(" ", _HELD), body)
        for part in _folded(held, min(width, _WIDEST), indent, f"{indent}  "):
            yield part.replace(_HELD, " ")


def say(text: str, *, err: bool = False) -> None:
    """Prose, on stdout or stderr."""
    for line in wrapped(text, columns_of(sys.stderr if err else sys.stdout)):
        click.echo(line, err=err)


def print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    """Rows without headers, on stdout."""
    if rows:
        print_table(Table("", ("",) * len(rows[0]), tuple(rows)))


def print_table(table: Table) -> None:
    """A table on stdout, with a blank line behind it if it has headers."""
    for line in table_lines(table, columns_of(sys.stdout)):
        click.echo(line)
    if any(table.headers):
        click.echo()


def table_lines(table: Table, width: int | None) -> Iterator[str]:
    """The table in lines of at most ``width`` columns. Columns of numbers are never folded and text between words only;
    where that is too wide, each row is a block of ``name: value``. Columns that say nothing are left out.
    """
    shown = table.shown
    if not shown.rows:
        return
    if shown.title:
        yield shown.title
    widths = _widths(shown, width)
    if widths is None:
        yield from _blocks(shown, width or _WIDEST)
        return
    numeric = shown.numeric
    if any(shown.headers):
        yield from _row(shown.headers, widths, numeric)
        yield _GAP.join("─" * wide for wide in widths)
    for row in shown.rows:
        yield from _row(row, widths, numeric)


def _widths(table: Table, width: int | None) -> list[int] | None:
    """Of each column; None where they do not fit."""
    least, most = [], []
    for header, numeric, entries in zip(table.headers, table.numeric, zip(*table.rows, strict=True), strict=True):
        widest = max(map(_cells, entries))
        words = max((_cells(word) for entry in (header, *entries) for word in entry.split()), default=0)
        most.append(max(widest, _cells(header)))
        least.append(max(words, widest if numeric else min(widest, _FOLDED)))
    if width is None:
        return most
    left = width - sum(least) - len(_GAP) * (len(least) - 1)
    if left < 0:
        return None
    widths = least
    wanting = sorted(range(len(least)), key=lambda i: most[i] - least[i])
    for place, i in enumerate(wanting):
        more = min(most[i] - least[i], left // (len(wanting) - place))
        widths[i] += more
        left -= more
    return widths


def _row(entries: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> Iterator[str]:
    columns = []
    for entry, wide in zip(entries, widths, strict=True):
        indent = " " * (len(entry) - len(entry.lstrip(" ")))
        columns.append(_folded(entry.strip(), wide, indent, indent) if _cells(entry) > wide else [entry])
    for parts in zip_longest(*columns, fillvalue=""):
        line = _GAP.join(map(_padded, parts, widths, numeric))
        yield line.rstrip()


def _blocks(table: Table, width: int) -> Iterator[str]:
    """The first entry of each row, and below it the others: side by side, but for one that takes a line of its own."""
    for row in table.rows:
        first, *others = (
            f"{header}: {entry}" if header else entry
            for i, (header, entry) in enumerate(zip(table.headers, row, strict=True))
            if not i or entry not in EMPTY
        )
        yield from _folded(first, width, "", "  ")
        for long, texts in groupby(others, key=lambda text: _cells(text) + 2 > width):
            if long:
                for text in texts:
                    yield from _folded(text, width, "  ", "    ")
            else:
                held = _APART.join(text.replace(" ", _HELD) for text in texts)
                yield from (line.replace(_HELD, " ") for line in _folded(held, width, "  ", "  "))


def _folded(text: str, width: int, first: str, others: str) -> list[str]:
    """Lines of whole words; ``textwrap`` would take a letter of two columns for one."""
    lines: list[str] = []
    for gap, word in re.findall(r"( *)([^ ]+)", text):
        if lines and _cells(lines[-1] + gap + word) <= width:
            lines[-1] += gap + word
        else:
            lines.append((others if lines else first) + word)
    return lines


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - _cells(text))
    return space + text if right else text + space


def _cells(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # letters of some scripts take two columns

    return cell_len(text)
