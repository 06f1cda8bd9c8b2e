"""Plans of models with several residual streams: each by its own width and depth, what they share by both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

import spikepatch
from spikepatch.errors import Refused
from spikepatch.plans.plan import (
    Context,
    Edit,
    EmbeddingEdit,
    Fill,
    NormEmbedding,
    Recipe,
    ScaleEmbedding,
    Skip,
    StreamShape,
)
from spikepatch.plans.work_out import make_plan
from spikepatch.recipes.built_in import RECIPES
from spikepatch.residual.map import ResidualMap
from spikepatch.source.layout import tensor_shapes
from tests.architectures import encoder_decoder, ids, tiny_model

SMALL = math.sqrt(2 / (5 * 64))


def stds(plan: spikepatch.Plan) -> dict[str, tuple[float, int]]:
    return {fill.parameter: (fill.std, fill.stream) for fill in plan.select(Fill)}


def test_each_stream_by_its_own_depth() -> None:
    """t5: the decoder has three sub-layers in each of its layers, the encoder two; a table of both is drawn once."""
    model = encoder_decoder("t5", num_layers=4, num_decoder_layers=2)
    plan = spikepatch.plan(model, "scaled-embed", reinit="all")
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


def test_both_streams_start_at_the_papers_std() -> None:
    model: Any = encoder_decoder("t5")
    spikepatch.patch(model, "scaled-embed", reinit="all")
    everything = torch.arange(500)[None]
    with torch.no_grad():
        out = model(input_ids=everything, decoder_input_ids=everything, output_hidden_states=True)
    for states in (out.encoder_hidden_states, out.decoder_hidden_states):
        assert abs(float(states[0].std()) / math.sqrt(2 / 5) - 1) < 6 / math.sqrt(2 * states[0].numel())


def test_a_generated_class_follows_each_streams_depth() -> None:
    """A config with four times as many layers in the encoder, and the same in the decoder."""
    model: Any = encoder_decoder("t5", num_layers=2)
    spikepatch.patch(model, "scaled-embed", reinit="all")
    config: Any = type(model.config).from_dict(model.config.to_dict() | {"num_layers": 8})
    fresh = type(model)(config)
    checked = 0
    for stack, sublayers in (("encoder", 16), ("decoder", 6)):
        for name, parameter in fresh.named_parameters():
            if name.startswith(stack) and name.endswith(("o.weight", "wo.weight")):
                std = SMALL / math.sqrt(sublayers)
                assert abs(float(parameter.detach().std()) / std - 1) < 6 / math.sqrt(2 * parameter.numel()), name
                checked += 1
    assert checked == 16 + 6


def test_kept_weights_of_both_streams() -> None:
    """1/std of the one table for both; a table of its own for each gives a factor of its own."""
    plan = spikepatch.plan(encoder_decoder("t5"), "scaled-embed", reinit="none")
    factors = {edit.module: edit.factor for edit in plan.select(ScaleEmbedding)}
    assert factors.keys() == {"decoder.embed_tokens", "encoder.embed_tokens"}
    assert len(set(factors.values())) == 1

    model = encoder_decoder("t5")
    residual, shapes = spikepatch.inspect(model), tensor_shapes(model)
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
        spikepatch.plan(encoder_decoder("t5", num_layers=4), recipe, reinit="all")
    assert spikepatch.plan(encoder_decoder("t5"), recipe, reinit="all").edits == (Fill("shared.weight", 1 / 6),)


def test_a_stream_that_is_not_proven() -> None:
    model = encoder_decoder("t5")
    residual = spikepatch.inspect(model)
    doubtful = dataclasses.replace(residual.streams[0], proven=False, leaks=("leak",))
    with pytest.raises(Refused, match=r"not proven(.|\n)*leak"):
        make_plan(
            dataclasses.replace(residual, streams=(doubtful,)),
            tensor_shapes(model),
            RECIPES["vanilla"],
            reinit="all",
            seed=0,
        )


def test_a_post_norm_encoder_decoder() -> None:
    with pytest.raises(Refused, match="post-norm"):
        spikepatch.plan(encoder_decoder("bart"), "scaled-embed", reinit="all")
    plan = spikepatch.plan(encoder_decoder("bart"), "vanilla", reinit="all")
    assert [len(stream.sublayers) for stream in plan.streams] == [6, 6]


@pytest.mark.parametrize("recipe", ["scaled-embed", "embed-ln", "embed-detach"])
def test_an_encoder_of_sound(recipe: str) -> None:
    """whisper: the decoder has token embeddings, the encoder none. It keeps its own start, and says so."""
    small = {"vocab_size": 500, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = AutoConfig.for_model(
        "whisper",
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_source_positions=30,
        max_target_positions=64,
        **small,
    )
    model = AutoModelForSpeechSeq2Seq.from_config(config)
    plan = spikepatch.plan(model, recipe, reinit="all")
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
        plan = spikepatch.plan(tiny_model(model_type), "vanilla", reinit="all")
        assert plan.streams == (StreamShape(64, sublayers, axis),)
        assert (plan.width, plan.sublayers) == (64, sublayers)


@torch.no_grad()
def logits(model: Any, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    result: torch.Tensor = model(**tokens).logits
    return result


@pytest.mark.parametrize("recipe", ["scaled-embed", "embed-ln"])
def test_resizing_keeps_the_patch(recipe: str, tmp_path: Path) -> None:
    """t5 then puts its plain, shared embedding into both stacks: the patched ones, of the same matrix, come back."""
    model: Any = encoder_decoder("t5")
    spikepatch.patch(model, recipe, reinit="all")
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            if recipe == "embed-ln":
                stack.embed_tokens.norm.bias.normal_()
    tokens = {"input_ids": ids(model), "decoder_input_ids": ids(model, 5)}
    before = logits(model, tokens)
    model.resize_token_embeddings(520, mean_resizing=False)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert tuple(model.shared.weight.shape) == (520, 64)
    after = logits(model, tokens)
    slack = 64 * torch.finfo(torch.float32).eps * float(before.abs().max())
    assert float((after[..., :500] - before).abs().max()) < slack  # a longer product may sum in another order
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert float((logits(loaded, tokens) - after).abs().max()) < slack


def test_another_embedding_would_lose_the_patch() -> None:
    for model in (encoder_decoder("t5"), tiny_model("gpt2")):
        spikepatch.patch(model, "scaled-embed", reinit="all")
        patched = {name for name, module in model.named_modules() if hasattr(module, "is_spikepatched")}
        with pytest.raises(ValueError, match="would lose what config"):
            model.set_input_embeddings(torch.nn.Embedding(500, 64))
        assert patched == {name for name, module in model.named_modules() if hasattr(module, "is_spikepatched")}


def test_patched_twice() -> None:
    model = encoder_decoder("t5")
    spikepatch.patch(model, "embed-ln", reinit="none")
    before = model(input_ids=ids(model), decoder_input_ids=ids(model)).logits
    with pytest.raises(Refused, match=r"patched already(.|\n)*encoder\.embed_tokens"):
        spikepatch.patch(model, "scaled-embed", reinit="all")
    assert torch.equal(model(input_ids=ids(model), decoder_input_ids=ids(model)).logits, before)
    assert spikepatch.plan(encoder_decoder("t5"), "embed-ln", reinit="none").edits == tuple(
        NormEmbedding(f"{side}.embed_tokens", 1e-5) for side in ("decoder", "encoder")
    )
