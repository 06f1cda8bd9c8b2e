"""Tiny configs of real architectures, shared by the tests. Names of architectures belong here, never in the engine."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)

_SMALL = {
    "hidden_size": 64, "n_embd": 64, "intermediate_size": 96, "ffn_dim": 128, "num_hidden_layers": 3, "n_layer": 3,
    "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8, "state_size": 8,
    "vocab_size": 500, "max_position_embeddings": 64, "n_positions": 64, "word_embed_proj_dim": 64,
    "num_local_experts": 4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The architecture's default config, cut to a width of 64 and three layers."""
    default = AutoConfig.for_model(model_type)
    known = set(default.to_dict()) | set(getattr(default, "attribute_map", {}))
    return AutoConfig.for_model(model_type, **{k: v for k, v in _SMALL.items() if k in known} | changes)


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """A tiny model with the architecture's own initialisation, seed 0, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).eval()


_ENCODER_DECODER = {
    "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 500, "max_position_embeddings": 64,
    "decoder_start_token_id": 0,
}  # fmt: skip


def encoder_decoder(model_type: str, **changes: Any) -> PreTrainedModel:
    """As ``tiny_model``: an encoder of three layers, a decoder of two, a width of 64."""
    default = AutoConfig.for_model(model_type)
    small = {name: value for name, value in _ENCODER_DECODER.items() if hasattr(default, name)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **small | changes)
        return AutoModelForSeq2SeqLM.from_config(config).eval()


def tiny_whisper() -> PreTrainedModel:
    """An encoder of sound, which has no token embeddings, and a decoder of text; two layers each, a width of 64."""
    config = AutoConfig.for_model(
        "whisper", d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=30,
        max_target_positions=64, vocab_size=500, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForSpeechSeq2Seq.from_config(config).eval()


def ids(model: PreTrainedModel, tokens: int = 12) -> torch.Tensor:
    """Token ids in the tiny vocabulary; (1, tokens)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, model.config.vocab_size, (1, tokens), generator=generator)
