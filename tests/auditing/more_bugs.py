"""More of each kind of bug: the same mechanisms on other tensors, other models, other numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.auditing import bug_models, healthy_designs
from tests.auditing.bug_models import RESIDUAL, gpt2, healthy, is_norm, layer_of, llama, matrices, mixtral, neox, plain
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
        CASES.append(Case(breaks.__name__, start, breaks, severity, must, "", words, "", may))
        return breaks

    return register


@case(lambda: healthy(llama), "unstable", ("model.layers.1.input_layernorm.weight",), ("finite",))
def infinite_gain(model: Any) -> None:
    model.model.layers[1].input_layernorm.weight[3] = math.inf


@case(lambda: healthy(llama), "at-risk", ("model.layers.4.mlp.up_proj.weight",), ("garbage", "nobody wrote"))
def huge_garbage(model: Any) -> None:
    model.model.layers[4].mlp.up_proj.weight[5:9] = 3e20


@case(lambda: healthy(neox), "at-risk", ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight",), ("size", "nobody wrote"))
def denormal_garbage(model: Any) -> None:
    model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.fill_(1e-40).mul_(torch.rand(512, 128))


@case(lambda: healthy(llama), "at-risk", ("*.up_proj.weight",), ("one value", "constant"))
def constant_matrices(model: Any) -> None:
    for _, w in matrices(model, "up_proj.weight"):
        w.fill_(0.02)


@case(lambda: healthy(plain), "at-risk", ("blocks.2.qkv.weight",), ("part",))
def values_zero_in_the_fused_matrix(model: Any) -> None:
    model.blocks[2].qkv.weight[256:] = 0


@case(lambda: healthy(plain), "at-risk", ("blocks.2.down.weight",), ("part",))
def half_of_the_columns_tiny(model: Any) -> None:
    model.blocks[2].down.weight[:, :256] *= 1e-4


@case(lambda: healthy(mixtral), "at-risk", ("*.experts.gate_up_proj", "*.experts.down_proj"), ("identical", "copies"))
def experts_are_copies(model: Any) -> None:
    for _, w in matrices(model, "experts.gate_up_proj", "experts.down_proj"):
        w[1:] = w[:1]


@case(lambda: healthy(mixtral), "at-risk", ("model.layers.1.mlp.experts.down_proj",), ("identical", "copies"))
def two_experts_are_copies(model: Any) -> None:
    model.model.layers[1].mlp.experts.down_proj[3] = model.model.layers[1].mlp.experts.down_proj[1]


@case(lambda: healthy(llama), "at-risk", ("*.q_proj.weight", "*.o_proj.weight"), ("seed", "identical"), ("*",))
def one_seed_for_all_tensors(model: Any) -> None:
    for name, p in model.named_parameters():
        if p.dim() > 1:
            torch.manual_seed(7)
            p.normal_(0, 0.02 * (12**-0.5 if name.endswith(RESIDUAL) else 1))


@case(lambda: healthy(llama), "at-risk", ("model.layers.4.*",), ("identical", "copied"), ("model.layers.2.*",))
def one_layer_is_a_copy(model: Any) -> None:
    model.model.layers[4].load_state_dict(model.model.layers[2].state_dict())


@case(lambda: healthy(gpt2), "at-risk", ("*.c_fc.weight",), ("identical",))
def four_ranks_one_seed(model: Any) -> None:
    for _, w in matrices(model, "c_fc.weight"):  # (in, out)
        w.copy_(w[:, :128].repeat(1, 4))


@case(lambda: healthy(gpt2), "at-risk", ("transformer.wpe.weight",), ("position",))
def positions_drown_tokens(model: Any) -> None:
    model.transformer.wpe.weight.normal_(0, 1)


@case(lambda: healthy(llama), "at-risk", ("*.down_proj.weight",), ("depth", "scal"))
def depth_scaling_of_attention_only(model: Any) -> None:
    for _, w in matrices(model, "down_proj.weight"):
        w.mul_(12**0.5)


@case(lambda: healthy(neox), "at-risk", ("*.attention.dense.weight",), ("depth", "scal"))
def depth_scaling_of_mlp_only(model: Any) -> None:
    for _, w in matrices(model, "attention.dense.weight"):
        w.mul_(12**0.5)


@case(lambda: healthy(llama), "note", ("*.o_proj.weight", "*.down_proj.weight"), ("number of sub-layers",))
def depth_scaling_of_another_depth(model: Any) -> None:
    for _, w in matrices(model, "o_proj.weight", "down_proj.weight"):
        w.mul_((12 / 64) ** 0.5)


@case(
    healthy_designs.torchtitan_like,
    "at-risk",
    ("*.3.*.o_proj.weight", "*.4.*.down_proj.weight"),
    ("layers 3, 4, 5",),
    ("*.3.*", "*.4.*", "*.5.*"),
)
def index_restarts_on_the_second_stage(model: Any) -> None:
    for name, w in [*matrices(model, "o_proj.weight", "down_proj.weight", "up_proj.weight")]:
        if layer_of(name) >= 3:
            w.mul_(math.sqrt((layer_of(name) + 1) / (layer_of(name) - 2)))


@case(lambda: healthy(llama), "at-risk", ("model.layers.0.self_attn.v_proj.weight",), ("layer 0",))
def one_matrix_of_one_layer_is_larger(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)


@case(bug_models.gemma, "at-risk", ("*norm.weight",), ("gain",))
def offset_gain_silent(model: Any) -> None:
    for name, p in model.named_parameters():
        if is_norm(name):
            p.fill_(-1)


@case(lambda: healthy(gpt2), "at-risk", ("*ln_*.weight",), ("gain",), ("*ln_*.bias",))
def gain_and_bias_swapped(model: Any) -> None:
    for name, p in model.named_parameters():
        if is_norm(name):
            p.fill_(float(name.endswith("bias")))


@case(lambda: healthy(gpt2), "at-risk", ("*.c_fc.bias",), ("bias",))
def biases_drawn_at_unit_std(model: Any) -> None:
    for name, p in model.named_parameters():
        if name.endswith("c_fc.bias"):
            p.normal_(0, 1)


@case(bug_models.mamba, "at-risk", ("*.A_log",), ("decay",))
def decays_drawn_as_weights(model: Any) -> None:
    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            p.normal_(0, 0.02)


@case(
    lambda: healthy(llama),
    "at-risk",
    ("model.rotary_emb.inv_freq",),
    ("buffer",),
    ("model.rotary_emb.original_inv_freq",),
)
def rotary_frequencies_erased(model: Any) -> None:
    model.model.rotary_emb.inv_freq.zero_()


@case(lambda: healthy(llama), "unstable", ("model.rotary_emb.inv_freq",), ("buffer",))
def rotary_frequencies_never_filled(model: Any) -> None:
    model.model.rotary_emb.inv_freq.fill_(math.nan)


@case(lambda: bug_models.mamba(rescale=True), "note", ("*.out_proj.weight",), ("twice", "depth"))
def mamba_rescaled_twice(model: Any) -> None:
    for _, w in matrices(model, "out_proj.weight"):
        w.div_(6**0.5)


@case(lambda: healthy(llama), "at-risk", ("model.embed_tokens.weight",), ("zero",))
def token_table_zero(model: Any) -> None:
    model.model.embed_tokens.weight.zero_()


@case(lambda: healthy(gpt2), "at-risk", ("transformer.wte.weight",), ("head", "logit"))
def gpt2_table_at_unit_std(model: Any) -> None:
    model.transformer.wte.weight.normal_(0, 1)


@case(lambda: healthy(mixtral), "at-risk", ("*.mlp.gate.weight",), ("large", "std"))
def router_at_unit_std(model: Any) -> None:
    for _, w in matrices(model, "mlp.gate.weight"):
        w.normal_(0, 1)


@case(lambda: healthy(gpt2), "at-risk", ("lm_head.weight",), ("tie",), ("transformer.wte.weight",))
def gpt2_tie_broken(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.02)


@case(lambda: bug_models.t5(tie=True), "at-risk", ("*.q.weight",), ("attention", "logit"))
def query_factor_missing(model: Any) -> None:
    for _, w in matrices(model, ".q.weight"):
        w.mul_(16**0.5)


@case(lambda: healthy(llama), "note", ("*.up_proj.weight",), ("std",))
def one_group_is_larger(model: Any) -> None:
    for _, w in matrices(model, "up_proj.weight"):
        w.mul_(1.6)


@case(lambda: healthy(mixtral), "at-risk", ("*.experts.down_proj",), ("fan", "small"))
def default_rule_of_the_stack(model: Any) -> None:
    for _, w in matrices(model, "experts.down_proj"):
        nn.init.kaiming_uniform_(w, a=math.sqrt(5))


@case(lambda: healthy(llama), "at-risk", ("model.layers.2.mlp.gate_proj.weight",), ("huge", "part"))
def a_quarter_huge(model: Any) -> None:
    model.model.layers[2].mlp.gate_proj.weight[80:160] *= 100


@case(lambda: healthy(llama), "at-risk", ("*.q_proj.weight", "*.up_proj.weight"), ("root",), ("*",))
def root_for_std(model: Any) -> None:
    bug_models.gpt2_scheme(model, std=math.sqrt(0.02))


@case(
    lambda: healthy(llama), "at-risk", ("*.down_proj.weight",), ("wrong matrix",), ("*.o_proj.weight", "lm_head.weight")
)
def depth_scaling_on_the_head(model: Any) -> None:
    model.lm_head.weight.mul_(12**-0.5)
    for _, w in matrices(model, "o_proj.weight", "down_proj.weight"):
        w.mul_(12**0.5)


@case(lambda: bug_models.t5(tie=True), "at-risk", ("encoder.embed_tokens.weight",), ("tie",), ("shared.weight",))
def encoder_has_a_table_of_its_own(model: Any) -> None:
    model.encoder.embed_tokens.weight = nn.Parameter(torch.randn_like(model.shared.weight))


@case(lambda: healthy(plain), "unstable", ("frequencies",), ("buffer",))
def buffer_of_a_plain_module(model: Any) -> None:
    model.register_buffer("frequencies", torch.full((4,), math.nan))
    model.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))


@case(
    lambda: healthy(llama),
    "at-risk",
    ("model.layers.0.*.o_proj.weight", "model.layers.3.*.down_proj.weight"),
    ("layers 0, 1, 2, 3",),
    ("model.layers.[0-3].*",),
)
def depth_scaling_of_the_last_layers_only(model: Any) -> None:
    for _, w in matrices(model, "o_proj.weight", "down_proj.weight", layers={0, 1, 2, 3}):
        w.mul_(12**0.5)


@case(lambda: healthy(llama), "at-risk", ("model.embed_tokens.weight",), ("small",))
def table_below_eps(model: Any) -> None:
    model.model.embed_tokens.weight.normal_(0, 1e-4)


@case(lambda: healthy_designs.by_recipe(mixtral, "xavier"), "note", ("*.experts.gate_up_proj",), ("fused",))
def fused_gate_and_up(model: Any) -> None:
    for _, w in matrices(model, "experts.gate_up_proj"):
        w.normal_(0, math.sqrt(2 / (64 + 320)))


@case(
    lambda: healthy(llama),
    "at-risk",
    ("*.q_proj.weight", "*.up_proj.weight", "*.down_proj.weight"),
    ("variance",),
    ("*",),
)
def variance_of_fan_in(model: Any) -> None:
    """The square of 1/sqrt(in), which for square matrices is that of Xavier too."""
    for name, p in model.named_parameters():
        if p.dim() > 1 and layer_of(name) is not None:
            p.normal_(0, 1 / p.shape[1])


@case(bug_models.bert, "at-risk", ("bert.embeddings.position_embeddings.weight",), ("position",))
def positions_drown_tokens_before_a_norm(model: Any) -> None:
    model.bert.embeddings.position_embeddings.weight.normal_(0, 1)


@case(lambda: healthy(bug_models.gemma), "at-risk", ("model.embed_tokens.weight",), ("sqrt",))
def embedding_scale_baked_in(model: Any) -> None:
    """The stream has a std of 1.3: no size that saturates, but the constant of all matrices times sqrt(d)."""
    model.model.embed_tokens.weight.mul_(64**0.5)


@case(bug_models.mamba, "at-risk", ("*.A_log",), ("forgets",))
def decays_without_a_logarithm(model: Any) -> None:
    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            p.copy_(p.exp())


@case(bug_models.mamba, "note", ("*.D",), ("zero",))
def skips_zero(model: Any) -> None:
    for name, p in model.named_parameters():
        if name.endswith("mixer.D"):
            p.zero_()


@case(lambda: healthy(llama), "note", ("*.q_proj.weight", "*.down_proj.weight"), ("every matrix",))
def depth_scaling_on_every_matrix(model: Any) -> None:
    """facebookresearch/lingua#39."""
    for _, w in matrices(
        model, "q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight"
    ):
        w.mul_(12**-0.5)


@case(lambda: healthy(llama), "at-risk", ("*.o_proj.weight", "*.down_proj.weight"), ("wrong",))
def depth_scaling_on_all_but_projections(model: Any) -> None:
    for name, w in matrices(model, "_proj.weight"):
        w.mul_(12**0.5 if name.endswith(RESIDUAL) else 12**-0.5)


@case(lambda: healthy(llama), "at-risk", ("*.o_proj.weight",), ("twice",))
def depth_scaling_twice_in_attention(model: Any) -> None:
    for _, w in matrices(model, "o_proj.weight"):
        w.mul_(12**-0.5)


@case(lambda: healthy(llama), "at-risk", ("*.q_proj.weight", "*.up_proj.weight"), ("default",), ("*",))
def all_but_projections_left_at_default(model: Any) -> None:
    for name, w in matrices(model, "_proj.weight"):
        if not name.endswith(RESIDUAL):
            bug_models.torch_default(w)


@case(
    lambda: healthy(lambda: llama(layers=8)),
    "at-risk",
    ("*.[4-7].*.q_proj.weight",),
    ("layers 4, 5, 6, 7",),
    ("*.[4-7].*",),
)
def half_of_the_layers_smaller(model: Any) -> None:
    for name, p in model.named_parameters():
        if p.dim() > 1 and (layer_of(name) or 0) >= 4:
            p.mul_(0.5)


@case(lambda: healthy(gpt2), "at-risk", ("transformer.wte.weight",), ("huge",))
def rows_of_the_table_huge(model: Any) -> None:
    model.transformer.wte.weight[400:500] *= 60


@case(lambda: healthy(gpt2), "at-risk", ("*.ln_1.bias", "*.ln_2.bias"), ("bias",), ("transformer.ln_f.bias",))
def biases_of_norms_one(model: Any) -> None:
    for name, p in model.named_parameters():
        if is_norm(name) and name.endswith("bias"):
            p.fill_(1)


@case(lambda: healthy(gpt2), "at-risk", ("*.c_fc.weight",), ("mean",))
def rand_for_randn(model: Any) -> None:
    for _, w in matrices(model, "c_fc.weight"):
        w.uniform_(0, 0.04)


@case(lambda: healthy(llama), "at-risk", ("model.embed_tokens.weight",), ("identical",))
def all_tokens_alike(model: Any) -> None:
    w = model.model.embed_tokens.weight
    w.copy_(w[:1].repeat(len(w), 1))


@case(lambda: healthy(llama), "note", ("lm_head.weight",), ("logits",))
def head_times_sqrt_d(model: Any) -> None:
    model.lm_head.weight.mul_(128**0.5)


@case(lambda: healthy(llama), "note", ("model.rotary_emb.inv_freq",), ("other values",))
def rotary_base_of_another_config(model: Any) -> None:
    value = model.model.rotary_emb.inv_freq
    value.copy_(100.0 ** -(torch.arange(len(value)) / len(value)))
