"""Healthy designs that differ from each other: an audit must not cry wolf about them."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from tests.auditing.bug_models import RESIDUAL, gemma, gpt2, layer_of, llama, mamba, mixtral, neox, plain, qwen3, t5
from tests.auditing.diagnosis import Control


def torchtitan_like() -> Any:
    """Depth scaling by the layer's own index, of up, down and output; gate constant; head 1/sqrt(d), E ~ N(0, 1)."""
    model = llama()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            layer = layer_of(name)
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight", "up_proj.weight")):
                std = 0.02 / math.sqrt(2 * (layer + 1))
            if "embed" in name:
                std = 1.0
            if "lm_head" in name:
                std = 128**-0.5
            nn.init.trunc_normal_(p.data, 0, std, -3 * std, 3 * std)
    return model


def mitchell() -> Any:
    """OLMo's: 1/sqrt(in), residual projections / sqrt(2 (l + 1)), cut at 3 std."""
    model = llama()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            std = p.shape[1] ** -0.5
            if layer_of(name) is None:
                std = 128**-0.5
            elif name.endswith(RESIDUAL):
                std /= math.sqrt(2 * (layer_of(name) + 1))
            nn.init.trunc_normal_(p.data, 0, std, -3 * std, 3 * std)
    return model


def mup_like() -> Any:
    """Width-scaled hidden matrices, readout and queries zero."""
    model = llama()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.02 if layer_of(name) is None else 0.02 * math.sqrt(64 / p.shape[1]))
            if name.endswith(("lm_head.weight", "q_proj.weight")):
                p.data.zero_()
    return model


def zero_projections() -> Any:
    """nanochat's: E ~ N(0, 1), head 0.001, uniform 1/sqrt(d), residual projections zero."""
    model = llama()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            bound = math.sqrt(3 / 128)
            p.data.uniform_(-bound, bound)
            if name.endswith(RESIDUAL):
                p.data.zero_()
            if layer_of(name) is None:
                p.data.normal_(0, 0.001 if "lm_head" in name else 1.0)
    return model


def by_recipe(kind: Any, recipe: str, **options: Any) -> nn.Module:
    import spikepatch

    model = kind(**options)
    return spikepatch.patch(model, spikepatch.plan(model, recipe, reinit="all"))


CONTROLS = [
    Control("hf-default-llama", llama),
    Control("hf-default-gpt2", gpt2),
    Control("hf-default-mixtral", mixtral),
    Control("hf-default-mamba", mamba),
    Control("hf-default-t5-tied", lambda: t5(tie=True)),
    Control("hf-default-gemma", gemma),
    Control("scaled-embed-gpt2", lambda: by_recipe(gpt2, "scaled-embed")),
    Control("xavier-qwen3", lambda: by_recipe(qwen3, "xavier")),
    Control("wang-neox", lambda: by_recipe(neox, "wang")),
    Control("mitchell-llama", mitchell),
    Control("torchtitan-like-llama", torchtitan_like),
    Control("mup-like-llama", mup_like),
    Control("zero-projections-llama", zero_projections),
    Control("torch-default-plain", plain),
]
