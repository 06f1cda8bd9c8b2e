"""Healthy starts of the literature: nothing may be at-risk; written down before the rules were looked at."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers as tf
from torch import nn

from tests.auditing import bug_models
from tests.auditing.bug_models import RESIDUAL, V, gpt2, healthy, in_layers, is_norm, layer_of, llama, matrices, plain
from tests.auditing.diagnosis import Control


class Block(nn.Module):
    """Pre-norm. ``gate``: a factor of the branch; ``unit``: weights of std 1, divided by sqrt(in) when used."""

    def __init__(self, d: int, gate: torch.Tensor | None, unit: bool, post: bool) -> None:
        super().__init__()
        self.norm_a, self.norm_f = nn.LayerNorm(d), nn.LayerNorm(d)
        self.post_a: nn.Module = nn.LayerNorm(d) if post else nn.Identity()
        self.post_f: nn.Module = nn.LayerNorm(d) if post else nn.Identity()
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)
        self.gate_a = nn.Parameter(gate.clone()) if gate is not None else None
        self.gate_f = nn.Parameter(gate.clone()) if gate is not None else None
        self.unit = unit

    def product(self, linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = linear(x) * linear.in_features**-0.5 if self.unit else linear(x)
        return result

    def forward(self, x: torch.Tensor, values: torch.Tensor | None) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.product(self.qkv, self.norm_a(x)).view(b, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4).unbind(0)
        if values is not None:
            v = v + 0.5 * values.view(b, t, 4, d // 4).transpose(1, 2)
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        a = self.post_a(self.product(self.out, a))
        x = x + (a if self.gate_a is None else self.gate_a * a)
        f = self.post_f(self.product(self.down, nn.functional.gelu(self.product(self.up, self.norm_f(x)))))
        result: torch.Tensor = x + (f if self.gate_f is None else self.gate_f * f)
        return result


class Decoder(nn.Module):
    def __init__(
        self, *, gate: torch.Tensor | None = None, unit: bool = False, post: bool = False, values: bool = False
    ) -> None:
        super().__init__()
        d = 128
        self.embed, self.values = nn.Embedding(V, d), nn.Embedding(V, d) if values else None
        self.blocks = nn.ModuleList(Block(d, gate, unit, post) for _ in range(6))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, V, bias=False)
        self.unit = unit
        for name, p in self.named_parameters():
            if p.dim() == 2:
                p.data.normal_(0, 1 if unit else 0.02 / (12**0.5 if name.endswith(RESIDUAL) else 1))
        if self.values is not None:
            self.values.weight.data.normal_(0, 1)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        values = self.values(input_ids) if self.values is not None else None
        for block in self.blocks:
            x = block(x, values)
        logits: torch.Tensor = self.head(self.norm(x)) * (1 / 128 if self.unit else 1)
        return logits


def mup() -> Any:
    model = llama()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            std = 1.0 if "embed" in name else 1 / 128 if "lm_head" in name else p.shape[1] ** -0.5
            p.data.normal_(0, std)
    return model


def deepnorm() -> Any:
    model = bug_models.bert()
    for name, p in model.named_parameters():
        if p.dim() > 1 and layer_of(name) is not None:
            scaled = name.endswith(("value.weight", "dense.weight"))
            nn.init.xavier_normal_(p.data, (8 * 4) ** -0.25 if scaled else 1.0)
    return model


def t_fixup() -> Any:
    model = plain()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            if layer_of(name) is None:
                p.data.normal_(0, 128**-0.5 * (9 * 6 if "embed" in name else 1) ** -0.25)
            else:
                nn.init.xavier_normal_(p.data)
                if not name.endswith("qkv.weight"):
                    p.data.mul_(0.67 * 6**-0.25)
        elif not is_norm(name):
            p.data.zero_()
    return model


def fixup() -> Any:
    model = plain()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data.normal_(0, p.shape[1] ** -0.5 * (6**-0.5 if layer_of(name) is not None else 1))
            if name.endswith((*RESIDUAL, "head.weight")):
                p.data.zero_()
        elif p.dim() == 1 and not is_norm(name):
            p.data.zero_()
    return model


def orthogonal() -> Any:
    model = llama()
    for _, w in in_layers(model):
        nn.init.orthogonal_(w)
    return model


def router_small() -> Any:
    model = healthy(bug_models.mixtral)
    for _, w in matrices(model, "mlp.gate.weight"):
        w.normal_(0, 0.006)
    return model


def router_zero() -> Any:
    model = healthy(bug_models.mixtral)
    for _, w in matrices(model, "mlp.gate.weight"):
        w.zero_()
    return model


def tied_scaled() -> Any:
    model = bug_models.gemma()
    model.model.embed_tokens.weight.data.normal_(0, 64**-0.5)
    return model


def gemma2(gain: float = 0.0) -> Any:
    config = tf.Gemma2Config(
        vocab_size=V, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=64, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    model = tf.Gemma2ForCausalLM(config)
    for name, p in model.named_parameters():
        if gain and "post_" in name:
            p.data.fill_(gain)
    return model


def peri_scaled() -> Any:
    """Gains behind sub-layers at 1/sqrt(2 N)."""
    return gemma2(8**-0.5 - 1)


def wang() -> Any:
    model = llama()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data.normal_(0, 2 / (6 * math.sqrt(128)) if name.endswith(RESIDUAL) else math.sqrt(2 / (5 * 128)))
    return model


def positions_smaller() -> Any:
    """OpenAI's GPT-2: positions at 0.01."""
    model = healthy(gpt2)
    model.transformer.wpe.weight.data.normal_(0, 0.01)
    return model


def unit_rows() -> Any:
    """nGPT: every row has length 1."""
    model = llama()
    for _, p in model.named_parameters():
        if p.dim() > 1:
            p.data.normal_()
            p.data.div_(p.data.norm(dim=1, keepdim=True))
    return model


def olmo2() -> Any:
    config = tf.Olmo2Config(
        vocab_size=V, hidden_size=128, intermediate_size=344, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return tf.Olmo2ForCausalLM(config)


def gated_bias() -> Any:
    """Gates that begin closed: a bias of -2."""
    model = healthy(plain)
    for block in model.blocks:
        block.up.bias.data.fill_(-2)
    return model


CONTROLS = [
    Control("mup-llama", mup),
    Control("deepnorm-bert", deepnorm),
    Control("t-fixup-plain", t_fixup),
    Control("fixup-plain", fixup),
    Control("rezero", lambda: Decoder(gate=torch.zeros(1))),
    Control("layer-scale", lambda: Decoder(gate=torch.full((128,), 1e-4))),
    Control("normformer", lambda: Decoder(post=True)),
    Control("value-embeddings", lambda: Decoder(values=True)),
    Control("unit-weights-with-multipliers", lambda: Decoder(unit=True)),
    Control("mamba-rescaled", lambda: bug_models.mamba(rescale=True)),
    Control("orthogonal-llama", orthogonal),
    Control("router-small-mixtral", router_small),
    Control("router-zero-mixtral", router_zero),
    Control("tied-scaled-gemma", tied_scaled),
    Control("sandwich-gemma2", gemma2),
    Control("peri-scaled-gemma2", peri_scaled),
    Control("wang-llama", wang),
    Control("gpt2-positions", positions_smaller),
    Control("unit-rows-llama", unit_rows),
    Control("default-olmo2", olmo2),
    Control("gates-closed-plain", gated_bias),
]
