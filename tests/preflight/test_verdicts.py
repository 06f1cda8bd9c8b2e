"""The tables of docs/audit-measured.md: what is stored is on the page, and some of it is measured again."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from tests.pages import DOCS, with_parts
from tests.preflight.verdicts import FILE, PAGE, key, tables, verdict_of
from tests.residual.configs import Mapping, entries

STORED: dict[str, Any] = json.loads(FILE.read_text())
of_this_version = pytest.mark.skipif(
    STORED["transformers"] != transformers.__version__, reason=f"of transformers {STORED['transformers']}"
)


def test_the_page_is_what_is_stored() -> None:
    """``python -m tests.preflight.verdicts --write`` makes it so."""
    assert (DOCS / PAGE).read_text() == with_parts(PAGE, tables(STORED["types"]))


@of_this_version
def test_all_defaults_are_there() -> None:
    assert STORED["types"].keys() == {key(*entry) for entry in entries()}
    verdicts = [each.get("verdict") for each in STORED["types"].values()]
    assert verdicts.count("stable") > 200
    assert 20 < verdicts.count("at-risk") < 80  # it tells them apart


@of_this_version
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mapping", "model_type"), [("causal", "olmo2"), ("causal", "jamba"), ("causal", "xlnet"), ("masked", "bert")]
)
def test_a_default_is_judged_as_stored(mapping: Mapping, model_type: str) -> None:
    found, stored = verdict_of(mapping, model_type), STORED["types"][key(mapping, model_type)]
    assert {**found, "ratio": pytest.approx(found["ratio"], rel=0.02)} == stored
