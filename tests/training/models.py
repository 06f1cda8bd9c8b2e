"""Tiny models of real architectures, and tokens of a small text, for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

from spikepatch.training.entries import parse_entries, tokenizer_of
from spikepatch.training.tokens import Tokens, prepare

SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": None,
    },
    "gemma": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
    },
    "mixtral": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 64,
    },
}  # fmt: skip


def config_folder(folder: Path, model_type: str = "gpt2", **changes: Any) -> Path:
    """A folder with nothing but the config of a model of bytes."""
    sizes = {**SMALL[model_type], "vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, **changes}
    AutoConfig.for_model(model_type, **sizes).save_pretrained(folder)
    return folder


def small_model(model_type: str = "gpt2", **changes: Any) -> Any:
    """The architecture's own initialisation, seed 0, in train mode and without dropout."""
    sizes = {**SMALL[model_type], "vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, **changes}
    config = AutoConfig.for_model(model_type, **sizes)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, changes.get(name, 0.0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).train()


def text(folder: Path, lines: int = 1500) -> Path:
    """A text that has something to be learned in it, the same on every machine."""
    path = folder / "text.txt"
    path.write_text("\n".join(f"{i} squared is {i * i}, and {i**5 % 9973}" for i in range(lines)))
    return path


def small_tokens(folder: Path) -> Tokens:
    entries = parse_entries([str(config_folder(folder / "model"))])
    return prepare([str(text(folder))], lambda text: tokenizer_of(entries, for_text=text), folder / "data")


def on_cpu(precision: str = "no") -> Accelerator:
    return Accelerator(cpu=True, mixed_precision=precision)
