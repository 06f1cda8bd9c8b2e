"""Embedding initialisation: E ~ N(0, s^2) on the token embedding; a tied head is refused, and why is measured."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, Fill, Recipe, Reinit, ScaleEmbedding
from spikepatch_transforms.embed_init import EmbedInit
from spikepatch_transforms.small_init import SmallInit
from tests.residual.maps import mapped, plan_of


def test_only_the_token_embedding() -> None:
    residual = mapped("gpt2")[0]
    assert list(EmbedInit(0.7)(residual, Context("all", untied=True))) == [Fill("transformer.wte.weight", 0.7)]


def test_it_does_not_follow_the_width() -> None:
    """s is a constant of the recipe: a generated class draws it whatever the width."""
    plan = plan_of("gpt2", "unit-embed", reinit="all")
    (entry,) = [f for f in plan.record("1")["init"]["fills"] if f["parameter"] == "transformer.wte.weight"]
    assert (entry["size"], entry["fan"], entry["depth"]) == (1.0, 0, 0.0)


@pytest.mark.parametrize("std", [1.0, 3.01 / 8])
def test_a_tied_head(std: float) -> None:
    recipe = Recipe("tied", (SmallInit(token_embedding=False), EmbedInit(std)))
    with pytest.raises(Refused, match=rf"do not fit a tied head(.|\n)*about {8 * std:.1f}(.|\n)*untie"):
        plan_of("gpt2", recipe, reinit="all")
    assert plan_of("gpt2", recipe, reinit="all", untie=True).select(Fill)


@pytest.mark.parametrize("reinit", ["residual", "none"])
def test_learned_embeddings_are_kept(reinit: Reinit) -> None:
    with pytest.raises(Refused, match=r"draws the token embedding afresh(.|\n)*reinit=" + reinit):
        plan_of("gpt2", "unit-embed", reinit=reinit)


@pytest.mark.parametrize(
    ("model", "changes", "why"),
    [
        ("bloom", {}, "already normalised"),
        ("gemma2", {}, r"already multiplied by 8(.|\n)*the large shortcut is there"),
        ("granite", {"embedding_multiplier": 12.0}, r"multiplied by 12(.|\n)*scaled-embed with --replace"),
        ("opt", {"word_embed_proj_dim": 32}, "the token embedding is 32 wide, the stream 64"),
        ("opt", {"do_layer_norm_before": False}, "does not apply to a post-norm model"),
    ],
)
def test_where_the_stream_would_not_start_with_it(model: str, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(Refused, match=why):
        plan_of(model, "unit-embed", reinit="all", changes=changes)


def test_the_remedy_where_it_is_multiplied() -> None:
    changes = {"embedding_multiplier": 12.0}
    (scaled,) = plan_of("granite", reinit="all", changes=changes, replace=True).select(ScaleEmbedding)
    assert scaled.factor == pytest.approx(8 / 12)


def test_two_transforms_for_one_table() -> None:
    with pytest.raises(Refused, match=r"two transforms(.|\n)*transformer\.wte\.weight"):
        plan_of("gpt2", Recipe("both", (SmallInit(), EmbedInit(0.1))), reinit="all")


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_a_std_without_sense(std: float) -> None:
    with pytest.raises(Refused, match="std of an embedding must be a positive number"):
        EmbedInit(std)


def test_no_embedding_no_edit() -> None:
    residual = dataclasses.replace(mapped("gpt2")[0], embeddings=())
    assert list(EmbedInit()(residual, Context("all"))) == []
