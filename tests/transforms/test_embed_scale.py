"""Scaled embedding: x = c E[token], to the last bit; where it applies, and where it does not."""

from __future__ import annotations

import dataclasses
import math

import pytest

from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, ScaleEmbedding
from spikepatch_transforms.embed_scale import EmbedScale
from tests.residual.maps import mapped, plan_of


def test_positions() -> None:
    residual = mapped("gpt2")[0]
    scaled = [e for e in EmbedScale(positions=True)(residual, Context("all")) if isinstance(e, ScaleEmbedding)]
    assert [edit.module for edit in scaled] == ["transformer.wte", "transformer.wpe"]
    rotary = mapped("llama")[0]
    assert len(list(EmbedScale(positions=True)(rotary, Context("all")))) == 1


def test_already_multiplied() -> None:
    with pytest.raises(Refused, match=r"already multiplied by 8(.|\n)*embed_tokens(.|\n)*vanilla"):
        plan_of("gemma2", "scaled-embed", reinit="all")
    with pytest.raises(Refused, match="already multiplied by 12"):
        plan_of("granite", "scaled-embed", reinit="all", changes={"embedding_multiplier": 12.0})


def test_already_normed() -> None:
    with pytest.raises(Refused, match=r"already normalised(.|\n)*cancels any factor"):
        plan_of("bloom", "scaled-embed", reinit="all")


def test_replace_of_the_same_factor() -> None:
    """gemma2 multiplies by sqrt(d) as the recipe does: nothing to replace, and the recipe applies to the rest."""
    plan = plan_of("gemma2", "scaled-embed", reinit="all", replace=True)
    assert not plan.select(ScaleEmbedding)
    assert not plan.structural
    reasons = {skip.target: skip.reason for skip in plan.skips}
    assert reasons["model.embed_tokens * 8"] == "the architecture multiplies by that already"


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_replace_without_a_factor_to_replace(model_type: str) -> None:
    with pytest.raises(Refused, match="no factor to replace") as refused:
        plan_of(model_type, "scaled-embed", reinit="all", replace=True)
    assert "leave --replace (replace) out" in refused.value.remedy


def test_a_table_narrower_than_the_stream() -> None:
    """A projection of unknown size stands between: a factor is not worked out, but it can be given."""
    narrow = {"word_embed_proj_dim": 32}
    with pytest.raises(Refused, match=r"token embedding is 32 wide, the stream 64(.|\n)*--factor"):
        plan_of("opt", "scaled-embed", changes=narrow)
    plan = plan_of("opt", "scaled-embed", reinit="none", factor=2.0, changes=narrow)
    assert plan.edits == (ScaleEmbedding("model.decoder.embed_tokens", 2.0),)


def test_post_norm() -> None:
    with pytest.raises(Refused, match="post-norm"):
        plan_of("opt", "scaled-embed", reinit="all", changes={"do_layer_norm_before": False})


@pytest.mark.parametrize("factor", [0.0, -2.0, math.nan, math.inf])
def test_a_factor_without_sense(factor: float) -> None:
    with pytest.raises(Refused, match="factor must be a positive number"):
        EmbedScale(factor)


@pytest.mark.parametrize("std", [0.0, math.nan, math.inf])
def test_learned_embedding_without_scale(std: float) -> None:
    residual = mapped("gpt2")[0]
    with pytest.raises(Refused, match="no usable scale"):
        list(EmbedScale()(residual, Context("none", std)))
    assert list(EmbedScale(2.0)(residual, Context("none", std))) == [ScaleEmbedding("transformer.wte", 2.0)]


def test_not_a_language_model() -> None:
    residual = dataclasses.replace(mapped("gpt2")[0], embeddings=())
    with pytest.raises(Refused, match="no token embedding"):
        list(EmbedScale()(residual, Context("all")))
