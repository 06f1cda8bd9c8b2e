"""Models with several residual streams, patched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

import spikepatch
from spikepatch.errors import Refused
from spikepatch.plans.plan import (
    NormEmbedding,
)
from tests.architectures import encoder_decoder, ids, tiny_model

SMALL = math.sqrt(2 / (5 * 64))


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
