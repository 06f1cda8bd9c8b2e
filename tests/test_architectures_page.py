"""docs/architectures.md is what the surveys say, and some types are surveyed again."""

from __future__ import annotations

import json
from collections import Counter
from importlib.metadata import version
from typing import Any

import pytest

from tests.architectures_page import FILE, GOLDEN, LANGUAGE, PAGE, STATES, Entry, entries, of_row, tables
from tests.pages import DOCS, with_parts

SURVEY: dict[str, Any] = json.loads(FILE.read_text())
ROWS: dict[tuple[str, str], dict[str, Any]] = {(row["task"], row["type"]): row for row in SURVEY["rows"]}
of_this_version = pytest.mark.skipif(
    SURVEY["transformers"] != version("transformers"), reason=f"the survey is of transformers {SURVEY['transformers']}"
)


def test_the_page_is_what_the_files_say() -> None:
    """``python -m tests.architectures_page --write`` makes it so."""
    assert (DOCS / PAGE).read_text() == with_parts(PAGE, tables(entries()))


def test_every_entry_is_on_it_once() -> None:
    found = entries()
    assert len(found) == len({(e.task, e.type) for e in found}) > 600
    assert {e.state for e in found} == set(STATES)
    assert Counter(e.state for e in found)["proven"] >= 450
    assert all(e.reason for e in found if e.state != "proven")


def test_no_type_meets_a_bug() -> None:
    assert [row["type"] for row in ROWS.values() if "a bug in spikepatch" in row["reason"]] == []


def test_defaults_are_as_in_the_golden_file() -> None:
    """Where a default config has a map, it is the one of the golden file, but for how many layers were kept."""
    maps = json.loads(GOLDEN.read_text())["maps"]
    compared = 0
    for (task, model_type), row in ROWS.items():
        if task in LANGUAGE and row["placement"] is not None:
            known = maps[f"{task}/{model_type}"]
            assert (known["proven"], known["placement"]) == (row["proven"], row["placement"]), model_type
            assert set(row["kinds"]) <= set(known["kinds"]), model_type  # it may have fewer kinds of layers
            compared += 1
    assert compared > 250


def test_states() -> None:
    row = {"task": "image", "type": "x", "proven": True, "conditions": [], "reason": ""}
    assert of_row(row) == Entry("image", "x", "proven")
    assert of_row(row | {"conditions": ["a", "b"]}) == Entry("image", "x", "for some inputs", "a; b")
    for reason, state in {
        "the default config cannot be built: no": "cannot be built",
        "the forward pass cannot be traced, so: no": "not traced",
        "not proven: a gate": "refused",
    }.items():
        assert of_row(row | {"proven": False, "reason": reason}).state == state
