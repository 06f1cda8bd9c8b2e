"""Tiny real models of transformers and of plain torch, and weights written by role: what bugs are put into."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import transformers as tf
from torch import nn

V = 512  # vocabulary


def llama(layers: int = 6, d: int = 128, tie: bool = False, **more: Any) -> Any:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=V,
            hidden_size=d,
            intermediate_size=344,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=tie,
            **more,
        )
    )


def qwen3(layers: int = 6, d: int = 128) -> Any:
    return tf.Qwen3ForCausalLM(
        tf.Qwen3Config(
            vocab_size=V,
            hidden_size=d,
            intermediate_size=344,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=False,
        )
    )


def gpt2(layers: int = 6, d: int = 128) -> Any:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=V, n_embd=d, n_layer=layers, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0)
    )


def neox(layers: int = 6, d: int = 128) -> Any:
    return tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(
            vocab_size=V,
            hidden_size=d,
            intermediate_size=4 * d,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            use_parallel_residual=False,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def mixtral(layers: int = 4, d: int = 64) -> Any:
    return tf.MixtralForCausalLM(
        tf.MixtralConfig(
            vocab_size=V,
            hidden_size=d,
            intermediate_size=160,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=256,
        )
    )


def gemma(layers: int = 4, d: int = 64) -> Any:
    return tf.GemmaForCausalLM(
        tf.GemmaConfig(
            vocab_size=V,
            hidden_size=d,
            intermediate_size=176,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def mamba(layers: int = 6, d: int = 64, rescale: bool = False) -> Any:
    return tf.MambaForCausalLM(
        tf.MambaConfig(
            vocab_size=V,
            hidden_size=d,
            num_hidden_layers=layers,
            state_size=8,
            rescale_prenorm_residual=rescale,
            use_mambapy=False,
        )
    )


def bert() -> Any:
    return tf.BertForMaskedLM(
        tf.BertConfig(
            vocab_size=V,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
        )
    )


def t5(tie: bool = False) -> Any:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=V,
            d_model=64,
            d_kv=16,
            d_ff=160,
            num_layers=4,
            num_heads=4,
            tie_word_embeddings=tie,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    )


class Plain(nn.Module):
    """Pre-norm decoder in plain torch: what many people write themselves."""

    class Block(nn.Module):
        def __init__(self, d: int) -> None:
            super().__init__()
            self.heads = 4
            self.norm_a, self.norm_f = nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, x: Any) -> Any:
            b, t, d = x.shape
            q, k, v = (
                self.qkv(self.norm_a(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            )
            a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
            return x + self.down(nn.functional.gelu(self.up(self.norm_f(x))))

    def __init__(self, layers: int = 6, d: int = 128, deepcopied: bool = False, **_: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, d)
        first = self.Block(d)
        self.blocks = nn.ModuleList(copy.deepcopy(first) if deepcopied else self.Block(d) for _ in range(layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, V, bias=False)

    def forward(self, input_ids: Any) -> Any:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def plain(**options: Any) -> nn.Module:
    return Plain(**options)


RESIDUAL = (
    "o_proj.weight",
    "down_proj.weight",
    "experts.down_proj",
    "c_proj.weight",
    "attention.dense.weight",
    "dense_4h_to_h.weight",
    "out.weight",
    "down.weight",
)


def layer_of(name: str) -> Any:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def is_norm(name: str) -> bool:
    return "norm" in name or ".ln_" in name


def matrices(model: Any, *suffixes: str, layers: Any = None) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of the weights that end with one of the suffixes: all, or only those of some layers."""
    for name, p in model.named_parameters():
        if name.endswith(suffixes) and not is_norm(name) and (layers is None or layer_of(name) in layers):
            yield name, p.data


def in_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """All matrices of the blocks."""
    for name, p in model.named_parameters():
        if p.dim() > 1 and layer_of(name) is not None:
            yield name, p.data


def gpt2_scheme(model: Any, std: float = 0.02, power: float = 0.5, count: Any = None) -> Any:
    """N(0, std); residual projections / count^power; count: 2 N."""
    layers = 1 + max(layer_of(n) or 0 for n, _ in model.named_parameters())
    count = count or 2 * layers
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data.normal_(0, std / count**power if name.endswith(RESIDUAL) else std)
        elif not is_norm(name):
            p.data.zero_()
    return model


def healthy(kind: Any, **options: Any) -> Any:
    """GPT-2's own scheme on any of the models: the healthy start of most cases."""
    return gpt2_scheme(kind(**options))


def torch_default(w: Any) -> None:
    """As ``nn.Linear`` leaves it: U(+-1/sqrt(in))."""
    nn.init.kaiming_uniform_(w, a=math.sqrt(5))
