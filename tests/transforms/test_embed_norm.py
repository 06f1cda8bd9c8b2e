"""Embedding norm: x = LN(E[token]) or RMSNorm(E[token]), with a gain or without, on the token embedding alone."""

from __future__ import annotations

import pytest

from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, NormEmbedding
from spikepatch_transforms.embed_norm import EmbedNorm
from tests.residual.maps import mapped, plan_of


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("inf")])
def test_an_eps_without_sense(eps: float) -> None:
    with pytest.raises(Refused, match="eps must be a positive number"):
        EmbedNorm(eps)


def test_only_the_token_embedding() -> None:
    residual = mapped("gpt2")[0]
    assert len(residual.embeddings) == 2
    assert list(EmbedNorm(eps=1e-3)(residual, Context("all"))) == [NormEmbedding("transformer.wte", 1e-3)]


@pytest.mark.parametrize(("model_type", "message"), [("bloom", "already normalised"), ("gemma2", "already multiplied")])
def test_does_not_apply(model_type: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        plan_of(model_type, "embed-ln", reinit="all")
