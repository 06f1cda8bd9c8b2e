"""Parts of pages in ``docs/`` that a command writes: between ``<!-- NAME -->`` and ``<!-- end of NAME -->``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def with_parts(page: str, parts: Mapping[str, str]) -> str:
    """The text of ``page`` with its parts written anew."""
    text = (DOCS / page).read_text()
    for name, part in parts.items():
        head, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition(f"<!-- end of {name} -->")
        if not begin or not end:
            raise ValueError(f"docs/{page} has no part {name}")
        text = head + begin + part + end + tail
    return text
