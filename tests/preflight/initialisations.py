"""The five initialisations of GPT-2 classes that the verdict is calibrated on."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import spikepatch
from spikepatch import StabilityReport


def gpt2(layers: int, width: int, heads: int, *, vocabulary: int = 50257, positions: int = 1024) -> GPT2LMHeadModel:
    """transformers' own initialisation, seed 0."""
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=positions,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


def xavier(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Every matrix Xavier normal, no depth scaling."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.xavier_normal_(parameter)
    return model


def reports(model: GPT2LMHeadModel, *, tokens: int, batch: int = 1) -> dict[str, StabilityReport]:
    """By the paper's names. ``model`` is left with the Xavier initialisation."""
    found = spikepatch.check(model, recipes=["vanilla", "scaled-embed", "embed-ln"], tokens=tokens, batch=batch)
    named = dict(zip(("Vanilla", "Scaled Embed", "Embed LN"), found.models, strict=True))
    return {"HF default": found, **named, "Xavier": spikepatch.check(xavier(model), tokens=tokens, batch=batch)}
