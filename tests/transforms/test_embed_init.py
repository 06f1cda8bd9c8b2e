"""Embedding initialisation: E ~ N(0, s^2) on the token embedding; a tied head is refused, and why is measured."""

from __future__ import annotations

import dataclasses
import math

import pytest

from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, Fill, Recipe, Reinit
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


def test_behind_a_norm() -> None:
    with pytest.raises(Refused, match=r"does not matter(.|\n)*a norm stands between"):
        plan_of("bloom", "unit-embed", reinit="all")


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
