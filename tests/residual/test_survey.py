"""`spikepatch architectures`: one row for each type, whatever its config or code does."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from spikepatch.residual import survey
from tests.test_architectures_page import ROWS, of_this_version


@of_this_version
@pytest.mark.parametrize(
    ("task", "model_type"),
    [
        ("image", "vit"),
        ("image", "swin"),
        ("image-text", "llava"),
        ("image-text", "glm4v"),
        ("image-text", "aya_vision"),
        pytest.param("speech", "speecht5", marks=pytest.mark.slow),
        pytest.param("other", "clip", marks=pytest.mark.slow),
        pytest.param("image-text", "qwen3_vl", marks=pytest.mark.slow),
    ],
)
def test_a_type_is_surveyed_as_the_page_has_it(task: str, model_type: str) -> None:
    (entry,) = (e for e in survey.types(model_type) if e[:2] == (task, model_type))
    (row,) = survey.rows_of([entry])
    assert json.loads(json.dumps(dataclasses.asdict(row))) == ROWS[task, model_type]


def test_a_bug_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other types are told all the same."""
    mapped = survey._mapped

    def fails(model_type: str, architecture: str) -> Any:
        if model_type == "opt":
            raise ZeroDivisionError("oh")
        return mapped(model_type, architecture)

    monkeypatch.setattr(survey, "_mapped", fails)
    bad, good = survey.rows_of([("causal", "opt", "OPTForCausalLM"), ("causal", "gpt2", "GPT2LMHeadModel")])
    assert bad.reason == f"{survey.BUG}: ZeroDivisionError: oh"
    assert good.proven
