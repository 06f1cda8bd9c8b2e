"""The maps that are stored for the light tests are those of today's models, and today's analysis."""

from __future__ import annotations

import inspect
import json

import pytest
import transformers

from spikepatch.residual import map as residual_map
from spikepatch.runtime import embedding
from tests.residual.maps import FILE, builders, entry

STORED = json.loads(FILE.read_text())


@pytest.mark.skipif(STORED["transformers"] != transformers.__version__, reason="maps.json is of another transformers")
@pytest.mark.parametrize("key", builders())
def test_stored_maps(key: str) -> None:
    assert entry(builders()[key]()) == STORED["maps"][key]


def test_none_is_left_over() -> None:
    assert list(STORED["maps"]) == list(builders())
    assert len(STORED["maps"]) >= 20


def test_generated_code_has_the_same_pattern_of_names() -> None:
    ours, theirs = (inspect.getsource(module.pattern).splitlines()[-1] for module in (residual_map, embedding))
    assert ours == theirs.replace("parameter", "name")
