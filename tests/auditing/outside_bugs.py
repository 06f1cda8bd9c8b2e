"""Bugs as others reported or wrote them, with where; written down before the rules were looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.auditing import bug_models
from tests.auditing.bug_models import RESIDUAL, gpt2, healthy, in_layers, llama, matrices, plain
from tests.auditing.diagnosis import Case

CASES: list[Case] = []


def case(
    start: Callable[[], nn.Module],
    severity: str,
    must: tuple[str, ...],
    words: tuple[str, ...],
    may: tuple[str, ...] = (),
) -> Callable[[Callable[[nn.Module], None]], Callable[[nn.Module], None]]:
    def register(breaks: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        CASES.append(Case(breaks.__name__, start, breaks, severity, must, "", words, breaks.__doc__ or "", may))
        return breaks

    return register


@case(lambda: healthy(llama), "note", ("*.up_proj.weight", "*.down_proj.weight"), ("fan", "out"), ("*_proj.weight",))
def fan_out_for_fan_in(model: Any) -> None:
    """mnielsen/neural-networks-and-deep-learning #30: 1/sqrt(n_out) where 1/sqrt(n_in) was meant."""
    for _, w in in_layers(model):
        w.normal_(0, w.shape[0] ** -0.5)


@case(lambda: healthy(gpt2), "note", ("*.c_fc.weight",), ("fan", "out"), ("*.weight",))
def fan_of_a_transposed_matrix(model: Any) -> None:
    """nn.init reads (out, in); GPT-2's Conv1D stores (in, out)."""
    for _, w in in_layers(model):
        nn.init.kaiming_normal_(w, nonlinearity="linear")


@case(lambda: healthy(llama), "at-risk", ("*.o_proj.weight",), ("large",))
def std_forgotten(model: Any) -> None:
    """trunc_normal_ without std= is N(0, 1)."""
    for _, w in matrices(model, "o_proj.weight"):
        nn.init.trunc_normal_(w)


@case(lambda: healthy(llama), "at-risk", ("*.o_proj.weight", "*.down_proj.weight"), ("depth", "scal"))
def depth_factor_multiplied(model: Any) -> None:
    """std * sqrt(2 N) for std / sqrt(2 N)."""
    for _, w in matrices(model, "o_proj.weight", "down_proj.weight"):
        w.mul_(12)


@case(lambda: healthy(plain), "at-risk", ("*.qkv.weight", "*.up.weight"), ("identical", "copies", "seed"), ("*",))
def shards_of_one_state(model: Any) -> None:
    """pytorch/torchtitan #3106: the CPU generator is set back after every draw, on every rank."""
    for name, w in in_layers(model):
        torch.manual_seed(0)
        half = torch.randn(w.shape[0] // 2, w.shape[1]) * (0.02 / 12**0.5 if name.endswith(RESIDUAL) else 0.02)
        w.copy_(torch.cat([half, half]))


@case(lambda: healthy(llama), "at-risk", ("model.embed_tokens.weight",), ("part", "rows"))
def added_tokens_are_large(model: Any) -> None:
    """Rows for new tokens at nn.Embedding's N(0, 1) beside rows at 0.02."""
    model.model.embed_tokens.weight[-40:].normal_(0, 1)


@case(lambda: healthy(gpt2), "note", ("*.c_attn.weight",), ("third", "part"))
def values_of_another_std(model: Any) -> None:
    """A fused matrix of which one third is drawn by another rule."""
    for _, w in matrices(model, "c_attn.weight"):
        w[:, 256:] *= 5


@case(lambda: healthy(llama), "note", ("*.gate_proj.weight", "*.up_proj.weight"), ("std",), ("*",))
def cut_at_one_std(model: Any) -> None:
    """trunc_normal_(std=s, a=-s, b=s) has a std of 0.54 s."""
    for _, w in matrices(model, "gate_proj.weight", "up_proj.weight"):
        nn.init.trunc_normal_(w, std=0.02, a=-0.02, b=0.02)


@case(lambda: healthy(llama), "at-risk", ("*.q_proj.weight", "*.up_proj.weight"), ("variance", "small"), ("*",))
def small_init_without_the_root(model: Any) -> None:
    """2 / (5 d) for sqrt(2 / (5 d))."""
    for name, w in in_layers(model):
        w.normal_(0, 2 / (5 * 128) / (12**0.5 if name.endswith(RESIDUAL) else 1))


@case(lambda: healthy(bug_models.mixtral), "at-risk", ("model.layers.2.mlp.experts.gate_up_proj",), ("zero", "nobody"))
def an_expert_that_nobody_wrote(model: Any) -> None:
    """jingyaogong/minimind and others: experts added after the initialiser ran."""
    model.model.layers[2].mlp.experts.gate_up_proj[3].zero_()


@case(
    lambda: healthy(llama),
    "at-risk",
    ("model.layers.4.self_attn.o_proj.weight", "*.5.*.down_proj.weight"),
    ("zero",),
    ("*.[345].*",),
)
def upper_half_begins_at_zero(model: Any) -> None:
    """Zero projections in the layers that were added."""
    for _, w in matrices(model, "o_proj.weight", "down_proj.weight", layers=(3, 4, 5)):
        w.zero_()


@case(bug_models.mamba, "at-risk", ("*.in_proj.weight",), ("large",))
def input_projection_at_unit_std(model: Any) -> None:
    for _, w in matrices(model, "in_proj.weight"):
        w.normal_(0, 1)


@case(lambda: healthy(gpt2), "at-risk", ("transformer.wpe.weight",), ("garbage", "nobody", "denormal", "tiny"))
def positions_never_written(model: Any) -> None:
    """huggingface/transformers #22837: missing keys of a model on the meta device."""
    model.transformer.wpe.weight.fill_(1e-42).mul_(torch.rand(256, 128))


@case(bug_models.qwen3, "at-risk", ("*.q_norm.weight",), ("gain",))
def query_norm_silent(model: Any) -> None:
    for name, p in model.named_parameters():
        if name.endswith("q_norm.weight"):
            p.zero_()


@case(
    lambda: bug_models.t5(tie=True), "at-risk", ("*.relative_attention_bias.weight",), ("attention", "position", "bias")
)
def relative_positions_saturate(model: Any) -> None:
    for _, w in matrices(model, "relative_attention_bias.weight"):
        w.normal_(0, 10)


@case(lambda: healthy(bug_models.qwen3), "at-risk", ("*.k_proj.weight",), ("identical", "copies", "copied"))
def key_heads_are_copies(model: Any) -> None:
    """Key heads repeated for tensor parallelism, and stored so."""
    for _, w in matrices(model, "k_proj.weight"):
        w[32:] = w[:32]


@case(lambda: healthy(llama), "at-risk", ("model.norm.weight",), ("gain",), ("lm_head.weight",))
def final_gain_of_sqrt_d(model: Any) -> None:
    model.model.norm.weight.fill_(128**0.5)
