"""Plans of models with several residual streams: each by its own width and depth, what they share by both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest

from spikepatch.errors import Refused
from spikepatch.plans.plan import (
    Context,
    Edit,
    EmbeddingEdit,
    Fill,
    Plan,
    Recipe,
    ScaleEmbedding,
    Skip,
    StreamShape,
)
from spikepatch.plans.work_out import make_plan
from spikepatch.recipes.built_in import RECIPES
from spikepatch.residual.map import ResidualMap
from tests.residual.maps import mapped, plan_of

SMALL = math.sqrt(2 / (5 * 64))


def stds(plan: Plan) -> dict[str, tuple[float, int]]:
    return {fill.parameter: (fill.std, fill.stream) for fill in plan.select(Fill)}


def test_each_stream_by_its_own_depth() -> None:
    """t5: the decoder has three sub-layers in each of its layers, the encoder two; a table of both is drawn once."""
    plan = plan_of("t5", changes={"num_layers": 4})
    assert [(stream.width, len(stream.sublayers)) for stream in plan.streams] == [(64, 6), (64, 8)]
    found = stds(plan)
    expected: dict[str, tuple[float, int]] = {"shared.weight": (SMALL, 0)}
    for layer in range(2):
        for i, part in enumerate(("SelfAttention", "EncDecAttention")):
            block = f"decoder.block.{layer}.layer.{i}.{part}"
            expected |= {f"{block}.{x}.weight": (SMALL, 0) for x in "qkv"}
            expected[f"{block}.o.weight"] = (SMALL / math.sqrt(6), 0)
        expected[f"decoder.block.{layer}.layer.2.DenseReluDense.wi.weight"] = (SMALL, 0)
        expected[f"decoder.block.{layer}.layer.2.DenseReluDense.wo.weight"] = (SMALL / math.sqrt(6), 0)
    for layer in range(4):
        block = f"encoder.block.{layer}.layer"
        expected |= {f"{block}.0.SelfAttention.{x}.weight": (SMALL, 1) for x in "qkv"}
        expected[f"{block}.0.SelfAttention.o.weight"] = (SMALL / math.sqrt(8), 1)
        expected[f"{block}.1.DenseReluDense.wi.weight"] = (SMALL, 1)
        expected[f"{block}.1.DenseReluDense.wo.weight"] = (SMALL / math.sqrt(8), 1)
    assert {name: std for name, (std, _) in found.items()} == pytest.approx({n: s for n, (s, _) in expected.items()})
    assert {name: stream for name, (_, stream) in found.items()} == {n: stream for n, (_, stream) in expected.items()}
    scaled = plan.select(ScaleEmbedding)
    assert scaled == [ScaleEmbedding(f"{side}.embed_tokens", 8.0, per_width=True) for side in ("decoder", "encoder")]


def test_kept_weights_of_both_streams() -> None:
    """1/std of the one table for both; a table of its own for each gives a factor of its own."""
    plan = plan_of("t5", reinit="none", std=0.5)
    assert [(edit.module, edit.factor) for edit in plan.select(ScaleEmbedding)] == [
        ("decoder.embed_tokens", 2.0),
        ("encoder.embed_tokens", 2.0),
    ]

    residual, shapes = mapped("t5")
    (encoder,) = residual.streams
    own = dataclasses.replace(encoder.embeddings[0], parameter="own.weight")
    apart = dataclasses.replace(residual, streams=(dataclasses.replace(encoder, embeddings=(own,)),))
    plan = make_plan(
        apart,
        shapes | {"own.weight": (500, 64)},
        RECIPES["scaled-embed"],
        reinit="none",
        seed=0,
        embedding_stds={"shared.weight": 0.5, "own.weight": 0.25},
    )
    assert [edit.factor for edit in plan.select(ScaleEmbedding)] == [2.0, 4.0]


def test_what_two_streams_share_must_get_the_same() -> None:
    """A recipe that draws the table by the depth wants two stds for one table."""

    def by_depth(residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        for embedding in residual.embeddings:
            yield Fill(embedding.parameter, 1 / residual.sublayers)

    recipe = Recipe("by-depth", (by_depth,))
    with pytest.raises(Refused, match=r"two residual streams share a tensor(.|\n)*shared\.weight"):
        plan_of("t5", recipe, changes={"num_layers": 4})
    assert plan_of("t5", recipe).edits == (Fill("shared.weight", 1 / 6),)


def test_a_stream_that_is_not_proven() -> None:
    residual, shapes = mapped("t5")
    doubtful = dataclasses.replace(residual.streams[0], proven=False, leaks=("leak",))
    with pytest.raises(Refused, match=r"not proven(.|\n)*leak"):
        make_plan(
            dataclasses.replace(residual, streams=(doubtful,)),
            shapes,
            RECIPES["vanilla"],
            reinit="all",
            seed=0,
        )


def test_a_post_norm_encoder_decoder() -> None:
    with pytest.raises(Refused, match="post-norm"):
        plan_of("bart", "scaled-embed")
    plan = plan_of("bart", "vanilla")
    assert [len(stream.sublayers) for stream in plan.streams] == [6, 6]


@pytest.mark.parametrize("recipe", ["scaled-embed", "embed-ln", "embed-detach"])
def test_an_encoder_of_sound(recipe: str) -> None:
    """whisper: the decoder has token embeddings, the encoder none. It keeps its own start, and says so."""
    plan = plan_of("whisper", recipe)
    assert [edit.module for edit in plan.select(EmbeddingEdit)] == ["model.decoder.embed_tokens"]
    assert [skip.reason for skip in plan.skips if "embedding of the stream" in skip.target] == [
        "no token embedding enters this stream"
    ]
    assert len({fill.stream for fill in plan.select(Fill)}) == 2


def test_the_streams_of_a_plan() -> None:
    """One projection of each sub-layer, and the axis of its outputs: GPT-2 has (in, out) in memory, Llama (out, in)."""
    for model_type, places, axis in (
        ("gpt2", ("transformer.h.{}.attn.c_proj.weight", "transformer.h.{}.mlp.c_proj.weight"), 1),
        ("llama", ("model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.mlp.down_proj.weight"), 0),
    ):
        sublayers = tuple(place.format(layer) for layer in range(3) for place in places)
        plan = plan_of(model_type, "vanilla")
        assert plan.streams == (StreamShape(64, sublayers, axis),)
        assert (plan.width, plan.sublayers) == (64, sublayers)
