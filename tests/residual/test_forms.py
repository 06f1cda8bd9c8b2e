"""Inputs of further forms: what runs on patches, clips, spectra or waves is traced; what on none is told truly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig

import spikepatch
from spikepatch.residual.forms import forms
from spikepatch.residual.trace import trace
from spikepatch.source.meta import build_meta

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SPECTRUM = {**SMALL, "num_mel_bins": 16, "num_key_value_heads": 2}


def built(model_type: str, architecture: str, **sizes: Any) -> nn.Module:
    config = AutoConfig.for_model(model_type, **sizes)
    model: nn.Module = build_meta(getattr(transformers, architecture), config, where=model_type)
    return model


@pytest.mark.parametrize(
    ("model_type", "architecture", "sizes", "shapes"),
    [
        ("timesformer", "TimesformerModel", {**SMALL, "image_size": 32, "num_frames": 3},
         {"pixel_values": (1, 3, 3, 32, 32)}),
        ("qwen3_vl_vision", "Qwen3VLVisionModel",
         {**SMALL, "depth": 2, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 64,
          "deepstack_visual_indexes": []},
         {"hidden_states": (16, 3 * 2 * 16 * 16), "grid_thw": (1, 3)}),
        ("wav2vec2-bert", "Wav2Vec2BertModel", {**SMALL, "feature_projection_input_dim": 20},
         {"input_features": (1, 88, 20)}),
        ("parakeet_encoder", "ParakeetEncoder", SPECTRUM, {"input_features": (1, 88, 16)}),
        pytest.param(
            "mimi_encoder", "MimiEncoderModel", {**SMALL, "head_dim": 16, "num_key_value_heads": 2, "num_filters": 4},
            {"input_values": (1, 1, 38400)}, marks=pytest.mark.slow),
        ("blip_2_qformer", "Blip2QFormerModel", {**SMALL, "encoder_hidden_size": 24},
         {"query_embeds": (1, 11, 32), "encoder_hidden_states": (1, 11, 24)}),
    ],
)  # fmt: skip
def test_made_up_from_config_and_signature(
    model_type: str, architecture: str, sizes: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Sizes are the config's; what the forward must have is there, and the map is proven."""
    model = built(model_type, architecture, **sizes)
    assert {name: tuple(value.shape) for name, value in trace(model).example.items()} == shapes
    found = spikepatch.inspect(model)
    assert found.proven
    assert found.sublayers >= 4


class Session(nn.Module):
    """As a transformers model, whose forward must have what no name tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.PreTrainedConfig()
        self.main_input_name = "pixel_values"
        self.linear = nn.Linear(3, 3)

    def forward(self, inference_session: Any, pixel_values: Any = None) -> torch.Tensor:
        out: torch.Tensor = self.linear(pixel_values)
        return out


def test_what_nothing_tells_of_is_named() -> None:
    with pytest.raises(spikepatch.Refused, match="nothing tells what its inference_session may be") as refused:
        spikepatch.inspect(Session())
    assert "it takes no token ids: it is no language model" in str(refused.value)
    assert not [*forms(Session())]


def test_several_models_in_one_name_their_parts() -> None:
    """The remedy, taken literally, works."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = transformers.PreTrainedConfig()
            self.speaker = built("gpt2", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=2, vocab_size=50)

    with pytest.raises(spikepatch.Refused, match="only its parts have one: speaker") as refused:
        spikepatch.inspect(Whole())
    assert "model.speaker" in str(refused.value)
    assert spikepatch.inspect(Whole().speaker).proven


@pytest.mark.slow
def test_the_furthest_pass_is_told() -> None:
    """A default config that fits no input says so in the words of the pass that came furthest."""
    model = built("uvdoc", "UVDocModel")
    with pytest.raises(spikepatch.Refused, match=r"nor on \d+ other forms of inputs; the furthest ends so"):
        spikepatch.inspect(model)


def test_a_stream_that_begins_with_the_callers_vectors() -> None:
    """torch's own encoder: no table, no product before the first sub-layer."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    found = spikepatch.inspect(encoder, example_inputs={"src": torch.randn(1, 11, 32)})
    assert (found.proven, found.sublayers, found.embeddings) == (True, 4, ())


class Stem(nn.Module):
    """A spectrum through convolutions and an activation; with a mask of what is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 32, 3, padding=1)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, sound: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.gelu(self.conv(sound)).mT * heard.unsqueeze(-1)
        out: torch.Tensor = self.encoder(x + torch.linspace(0, 1, 32))
        return out


def test_a_stream_that_begins_with_an_activation() -> None:
    example = {"sound": torch.randn(1, 8, 11), "heard": torch.ones(1, 11, dtype=torch.bool)}
    found = spikepatch.inspect(Stem().eval(), example_inputs=example)
    assert (found.proven, found.sublayers) == (True, 4)


class Compared(nn.Module):
    """Two texts and how alike they are: one number, of which no single tower is all."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.one = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.other = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mine = self.one(one)
        return mine.mean(1) @ self.other(other).mean(1).T, mine


def test_the_output_of_two_towers_is_what_compares_them() -> None:
    example = {"one": torch.randn(1, 11, 32), "other": torch.randn(1, 11, 32)}
    traced = trace(Compared().eval(), example)
    assert traced.output.meta["val"].shape == (1, 1)
