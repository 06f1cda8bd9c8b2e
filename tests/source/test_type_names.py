"""The types behind ``arch:``, as they are read from the source of transformers."""

from __future__ import annotations

from spikepatch.residual.survey import types
from spikepatch.source.type_names import model_types


def test_they_are_those_that_are_mapped() -> None:
    found = set(model_types())
    mapped = {name for _, name, _ in types()}
    assert len(mapped) > 100
    assert len(mapped - found) < len(mapped) / 50, mapped - found  # those that it lists elsewhere
    assert {"gpt2", "llama", "qwen3", "t5", "bert"} <= found
