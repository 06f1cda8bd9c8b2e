"""Embed Detach: the same output, a tenth of the lookup's gradient, and a tied head's own gradient untouched."""

from __future__ import annotations

import dataclasses

import pytest

from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, DetachEmbedding, Skip
from spikepatch_transforms.embed_detach import EmbedDetach
from tests.residual.maps import mapped


def test_plan() -> None:
    residual = mapped("gpt2")[0]
    assert list(EmbedDetach(0.5)(residual, Context("none"))) == [DetachEmbedding("transformer.wte", 0.5)]


@pytest.mark.parametrize("gradient", [-0.1, 1.0, float("nan")])
def test_a_share_without_sense(gradient: float) -> None:
    with pytest.raises(Refused, match="from 0 to below 1"):
        EmbedDetach(gradient)


def test_no_token_embedding() -> None:
    """Of the stream that feeds the output: refused. Of another one, a spectrogram's or an image's: left as it is."""
    residual = dataclasses.replace(mapped("gpt2")[0], embeddings=())
    with pytest.raises(Refused, match="no token embedding"):
        list(EmbedDetach()(residual, Context("all")))
    (item,) = EmbedDetach()(residual, Context("all", stream=1))
    assert isinstance(item, Skip)
    assert "no token embedding" in item.reason
