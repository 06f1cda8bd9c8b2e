"""Tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from spikepatch.report.document import Table


def print_table(table: Table, console: Console) -> None:
    """One table; numbers to the right, texts folded rather than cut."""
    rich = RichTable(title=table.title or None, title_justify="left", title_style="", pad_edge=False)
    for header, numeric in zip(table.headers, table.numeric, strict=True):
        rich.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        rich.add_row(*(Text(entry) for entry in row))
    console.print(rich)
