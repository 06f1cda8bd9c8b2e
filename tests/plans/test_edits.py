"""Kinds of edit: what each says of itself, and that its record comes back."""

from __future__ import annotations

import json
import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikepatch.plans.edits import (
    Constant,
    DetachEmbedding,
    Edit,
    EmbeddingEdit,
    Fill,
    NormEmbedding,
    ScaleEmbedding,
    Untie,
    recorded_edit,
)
from spikepatch.plans.in_words import changes, streams
from tests.residual.maps import plan_of

#: One of each kind, and more: its target, its words.
SAYS: tuple[tuple[Edit, tuple[str, str], str], ...] = (
    (Fill("a.weight", 0.0228218), ("values", "a.weight"), "std 0.0228218"),
    (Constant("a.norm", 0.5, -1.0), ("values", "a.norm"), "all -0.5"),
    (ScaleEmbedding("e", 3.0), ("embedding", "e"), "output * 3"),
    (ScaleEmbedding("e", 8.0, per_width=True), ("embedding", "e"), "output * 8 = sqrt(d)"),
    (NormEmbedding("e", 1e-5), ("embedding", "e"), "output through a LayerNorm"),
    (NormEmbedding("e", 1e-5, "rmsnorm", False), ("embedding", "e"), "output through a RMSNorm without gain"),
    (DetachEmbedding("e", 0.1), ("embedding", "e"), "0.1 of its gradient"),
    (Untie("head", "e.weight"), ("head", "head"), "its own matrix, no longer tied to e.weight"),
)

finite = st.floats(min_value=1e-30, max_value=1e30)
embedding_edits = st.one_of(
    st.builds(ScaleEmbedding, st.just("e"), finite),
    st.builds(NormEmbedding, st.just("e"), finite, st.sampled_from(["layernorm", "rmsnorm"]), st.booleans()),
    st.builds(DetachEmbedding, st.just("e"), finite),
)


def test_every_kind_says_what_it_is() -> None:
    assert {type(edit) for edit, _, _ in SAYS} == set(get_args(Edit))
    for edit, target, words in SAYS:
        assert (edit.target, edit.words) == (target, words)


@given(edit=embedding_edits, width=st.integers(1, 2**20))
def test_a_record_comes_back(edit: EmbeddingEdit, width: int) -> None:
    assert recorded_edit("e", json.loads(json.dumps(edit.record)), width) == edit
    root = ScaleEmbedding("e", math.sqrt(width), per_width=True)
    assert root.record == {"factor": "sqrt(width)"}
    assert recorded_edit("e", root.record, width) == root


@pytest.mark.parametrize("entry", [{}, {"factor": 1.0, "eps": 1e-5}, {"norm": "batchnorm", "eps": 1, "affine": True}])
def test_another_record_is_of_no_kind(entry: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="an edit for e that this version does not know"):
        recorded_edit("e", entry, 8)


def test_a_plan_in_words() -> None:
    plan = plan_of("gpt2", untie=True)
    assert streams(plan) == "width d = 64, S = 6 sub-layers"
    assert list(changes(plan, quote="`")) == [
        "`lm_head.weight`: its own matrix, no longer tied to transformer.wte.weight",
        "`transformer.wte`: output * 8 = sqrt(d)",
        "std 0.0790569: 9 parameters, such as `transformer.h.2.mlp.c_fc.weight`",
        "std 0.0322749: 6 parameters, such as `transformer.h.2.mlp.c_proj.weight`",
        "26 other tensors: by the architecture's own initialiser",
    ]
