"""What the map says beside the stream itself, against transformers' own classes and against numbers."""

from __future__ import annotations

import functools
import json
from collections import Counter
from typing import get_args

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import spikepatch
from spikepatch.residual.map import Matrix, Norm, ResidualMap
from spikepatch.source.meta import build_meta
from tests.architectures import tiny_model as small
from tests.residual import configs
from tests.residual.configs import config_for, model_class
from tests.residual.plain_gpt import GPT
from tests.residual.test_oracle import draw_all, tiny_model

#: Every way in which a weight is stored and used.
AXES = (
    "bloom", "dbrx", "falcon", "gemma2", "gpt2", "gpt_oss", "jamba", "llama", "mamba", "mixtral", "phi", "t5",
)  # fmt: skip


def _mapping(model_type: str) -> configs.Mapping:
    return next(m for m in get_args(configs.Mapping) if model_type in configs.CLASSES[m])


def _tiny(model_type: str) -> PreTrainedModel:
    if model_type == "dinov2":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 14}
        return Dinov2Model(Dinov2Config(**sizes)).eval()
    return tiny_model(model_type, _mapping(model_type))


@functools.cache
def _map(model_type: str) -> ResidualMap:
    return spikepatch.inspect(_tiny(model_type))


def _all(residual: ResidualMap) -> tuple[ResidualMap, ...]:
    return (residual, *residual.streams)


# --- fans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [*AXES, "dinov2"])
def test_inputs_run_along_the_in_axis(model_type: str) -> None:
    """The gradient of a weight is a sum over tokens of (what reaches its output) x (its input).

    Another loss changes the first factor and not the second. So gradients of two losses, side by side, span no more
    directions along the in axis than one loss's alone, and more along the out axis.
    """
    model, residual = _tiny(model_type), _map(model_type)
    draw_all(model)
    losses = [_gradients(model, seed) for seed in (0, 1)]
    checked = 0
    for matrix in [m for part in _all(residual) for m in part.matrices]:
        both = [gradients.get(matrix.parameter) for gradients in losses]
        if both[0] is None or both[1] is None or min(matrix.fan_in, matrix.fan_out) < 8:
            continue
        first, second = (_experts(matrix, gradient) for gradient in both if gradient is not None)
        busiest = int((first.norm(dim=(1, 2)) * second.norm(dim=(1, 2))).argmax())
        first, second = first[busiest], second[busiest]  # (in, out)
        alone = int(torch.linalg.matrix_rank(first))
        inputs = int(torch.linalg.matrix_rank(torch.cat([first, second], dim=1)))
        outputs = int(torch.linalg.matrix_rank(torch.cat([first, second], dim=0)))
        assert inputs == alone < outputs, (matrix, alone, inputs, outputs)
        checked += 1
    assert checked >= 0.5 * sum(len(part.matrices) for part in _all(residual)) > 0


def _experts(matrix: Matrix, gradient: torch.Tensor) -> torch.Tensor:
    """(experts, fan_in, fan_out); experts have an axis of their own, or lie one behind the other along in or out."""
    parts = gradient.movedim((matrix.in_axis, matrix.out_axis), (-2, -1))
    *_, rows, columns = parts.shape
    shape = (-1, rows // matrix.fan_in, matrix.fan_in, columns // matrix.fan_out, matrix.fan_out)
    return parts.reshape(shape).movedim(2, 3).flatten(0, 2)


def _gradients(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """Non-zero gradients of a random projection of the output, for two tokens."""
    ids = torch.tensor([[7, 11]])
    inputs = {model.main_input_name: ids}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(1, 3, 14, 14, dtype=torch.float64, generator=_generator(5))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    model.zero_grad()
    output = model(**inputs)[0]
    (output * torch.randn(output.shape, generator=_generator(seed), dtype=output.dtype)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: gradient for name, gradient in found.items() if bool(gradient.ne(0).any())}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_fans_of_modules_at_full_width() -> None:
    """Linear keeps (out, in), Conv1D (in, out); transformers' 3-D experts say themselves which of the two they are."""
    seen: Counter[str] = Counter()
    for model_type in AXES:
        mapping = _mapping(model_type)
        model = build_meta(model_class(model_type, mapping), config_for(model_type, mapping), where=model_type)
        for part in _all(spikepatch.inspect(model)):
            for matrix in part.matrices:
                owner = model.get_submodule(matrix.parameter.rpartition(".")[0])
                sizes = tuple(model.get_parameter(matrix.parameter).shape)
                found = (matrix.in_axis, matrix.out_axis)
                assert (matrix.fan_in, matrix.fan_out) == (sizes[found[0]], sizes[found[1]]) or model_type == "dbrx"
                if isinstance(owner, nn.Linear):
                    assert (*found, matrix.fan_in, matrix.fan_out) == (1, 0, owner.in_features, owner.out_features)
                elif isinstance(owner, Conv1D):
                    assert (*found, matrix.fan_in, matrix.fan_out) == (0, 1, owner.nx, owner.nf)
                elif hasattr(owner, "is_transposed"):
                    assert found == ((1, 2) if owner.is_transposed else (2, 1)), matrix
                else:
                    continue
                seen[type(owner).__name__] += 1
    assert {"Linear", "Conv1D", "FalconLinear", "MixtralExperts", "GptOssExperts"} <= seen.keys()


def test_fans_of_fused_matrices() -> None:
    fans = {m.parameter: (m.fan_in, m.fan_out) for m in spikepatch.inspect(small("gpt2")).matrices}
    assert fans["transformer.h.0.attn.c_attn.weight"] == (64, 3 * 64)
    fans = {m.parameter: (m.fan_in, m.fan_out) for m in spikepatch.inspect(small("mixtral")).matrices}
    assert fans["model.layers.0.mlp.experts.gate_up_proj"] == (64, 2 * 96)
    assert fans["model.layers.0.mlp.experts.down_proj"] == (96, 64)


# --- norms -----------------------------------------------------------------------------------------------------------


def test_gain_conventions() -> None:
    expected = {
        "bloom": ("w", True), "gemma2": ("1+w", False), "gpt2": ("w", True), "gpt_oss": ("w", False),
        "llama": ("w", False), "mamba": ("w", False), "nemotron": ("1+w", True), "olmo": ("none", False),
        "olmo2": ("w", False), "phi": ("w", True), "qwen3_next": ("1+w", False), "t5": ("w", False),
    }  # fmt: skip
    for model_type, (gain, biased) in expected.items():
        norms = [n for n in _map(model_type).norms if n.role in {"pre", "branch", "final"}]
        assert norms
        assert {(n.gain, n.bias is not None) for n in norms} == {(gain, biased)}, model_type


@pytest.mark.parametrize("model_type", ["bloom", "gemma2", "gpt2", "llama", "nemotron", "olmo2", "qwen3_next", "t5"])
def test_gain_in_numbers(model_type: str) -> None:
    """Without bias, and the gain 1 by its convention, a norm's result has a mean square of 1; the gain 2 doubles it."""
    model = _tiny(model_type).double()
    modules = dict(model.named_modules())
    checked = 0
    for norm in [n for part in _all(_map(model_type)) for n in part.norms]:
        if norm.role in {"qk", "inner"}:
            continue
        assert norm.parameter is not None
        assert norm.parameter.rpartition(".")[0] == norm.module
        once, twice = (_normed(model, norm, modules[norm.module], by) for by in (1.0, 2.0))
        torch.testing.assert_close(twice, 2 * once, rtol=1e-6, atol=0)  # T5's norm multiplies in float32
        # x / sqrt(s + eps) has the mean square s / (s + eps), at s near 1e4
        assert float(once.square().mean()) == pytest.approx(1.0, abs=1e-6)
        checked += 1
    assert checked >= 5


def _normed(model: PreTrainedModel, norm: Norm, module: nn.Module, by: float) -> torch.Tensor:
    assert norm.parameter is not None
    with torch.no_grad():
        model.get_parameter(norm.parameter).fill_(by - 1 if norm.gain == "1+w" else by)
        if norm.bias is not None:
            model.get_parameter(norm.bias).zero_()
        width = model.get_parameter(norm.parameter).shape[0]
        result: torch.Tensor = module(100 * torch.randn(1, 3, width, generator=_generator(0), dtype=torch.float64))
    return result


# --- ties ------------------------------------------------------------------------------------------------------------


def test_tied_parameters() -> None:
    assert spikepatch.inspect(small("gpt2")).tied == (("transformer.wte.weight", "lm_head.weight"),)
    assert spikepatch.inspect(small("llama", tie_word_embeddings=False)).tied == ()
    bert = _map("bert")
    assert bert.tied == (
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    )
    t5 = _map("t5")
    assert t5.tied == (
        ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    )


# --- between projection and addition ---------------------------------------------------------------------------------


def _between(residual: ResidualMap, kind: str) -> set[tuple[str, ...]]:
    found = [p for p in residual.residual_projections if p.kind == kind]
    assert found, kind
    return {tuple(step.kind for step in p.between) for p in found}


def test_what_stands_between_projection_and_addition() -> None:
    expected: dict[str, dict[str, tuple[str, ...]]] = {
        "dinov2": {"attention": ("bias", "gain"), "mlp": ("bias", "gain")},
        "gemma2": {"attention": ("norm",), "mlp": ("norm",)},
        "gpt2": {"attention": ("bias",), "mlp": ("bias",)},
        "gpt_oss": {"attention": ("bias",), "moe": ("bias", "gate")},
        "llama": {"attention": (), "mlp": ()},
        "mixtral": {"attention": (), "moe": ("gate",)},
        "zaya": {"attention": ("bias", "gain")},
    }
    for model_type, kinds in expected.items():
        residual = _map(model_type)
        for kind, steps in kinds.items():
            assert _between(residual, kind) == {steps}, model_type
    granite = spikepatch.inspect(small("granite", residual_multiplier=0.25))
    assert _between(granite, "mlp") == {("multiplier",)}
    inkling = _map("inkling_text")
    assert {steps[-1] for steps in _between(inkling, "attention")} == {"convolution"}
    assert inkling.sublayers == 4  # the convolution adds its own input: no sub-layer


def test_gains_and_biases_are_named() -> None:
    """A layer scale of zero silences its own projection, and no other."""
    model, residual = _tiny("dinov2"), _map("dinov2")
    draw_all(model)
    projections = {p.parameter: p for p in residual.residual_projections}
    assert projections.keys() <= _gradients(model, 0).keys()
    for name, projection in projections.items():
        bias, gain = (step.parameter for step in projection.between)
        assert bias is not None
        assert gain is not None
        assert bias == name.removesuffix("weight") + "bias"
        before = model.get_parameter(gain).detach().clone()
        model.get_parameter(gain).data.zero_()
        silent = projections.keys() - _gradients(model, 0).keys()
        model.get_parameter(gain).data.copy_(before)
        assert silent == {name}


# --- kinds and placements --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kinds() -> None:
    """Each by its modelling code: routing by argmax or max, attention by chunks or with masks behind the softmax."""
    expected: dict[tuple[configs.Mapping, str], tuple[str, dict[str, int]]] = {
        ("causal", "cpmant"): ("pre-norm", {"attention": 2, "mlp": 2}),
        ("causal", "hrm_text"): ("pre-norm", {"attention": 4, "mlp": 4}),
        ("causal", "longcat_flash"): ("mixed", {"attention": 4, "mlp": 4, "moe": 2}),
        ("causal", "phimoe"): ("pre-norm", {"attention": 2, "moe": 2}),
        ("causal", "xmod"): ("post-norm", {"attention": 2, "mlp": 4}),  # every MLP is followed by an adapter
        ("masked", "longformer"): ("post-norm", {"attention": 2, "mlp": 2}),
        ("masked", "yoso"): ("post-norm", {"mixer": 2, "mlp": 2}),  # powers of angles in place of a softmax
        ("seq2seq", "nllb-moe"): ("pre-norm", {"attention": 2, "cross-attention": 2, "mlp": 1, "moe": 1}),
        ("seq2seq", "switch_transformers"): ("pre-norm", {"attention": 2, "cross-attention": 2, "mlp": 1, "moe": 1}),
    }
    for (mapping, model_type), (placement, kinds) in expected.items():
        model = build_meta(model_class(model_type, mapping), config_for(model_type, mapping), where=model_type)
        residual = spikepatch.inspect(model)
        found = Counter({p.sublayer: p.kind for p in residual.residual_projections}.values())
        assert (residual.placement, dict(found)) == (placement, kinds), model_type


def test_keys_of_cross_attention_read_the_other_stream() -> None:
    residual = _map("t5")
    reads = {m.parameter.split(".")[-2]: m.reads_stream for m in residual.matrices if m.kind == "cross-attention"}
    assert reads == {"q": True, "k": False, "v": False, "o": False}


def test_json_round_trip_with_two_streams() -> None:
    residual = _map("t5")
    assert len(residual.streams) == 1
    assert ResidualMap.from_dict(json.loads(residual.to_json())) == residual


# --- any module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [False, True])
def test_plain_gpt(targets: bool) -> None:
    model = GPT()
    ids = torch.arange(12)[None]
    residual = spikepatch.inspect(model, example_inputs={"idx": ids, **({"targets": ids} if targets else {})})

    assert residual.proven, residual.leaks
    assert (residual.architecture, residual.model_type) == ("GPT", "")
    assert (residual.placement, residual.width, residual.layers, residual.sublayers) == ("pre-norm", 32, 3, 6)
    assert [(e.parameter, e.kind, e.scale) for e in residual.embeddings] == [
        ("transformer.wte.weight", "token", 1.0),
        ("transformer.wpe.weight", "position", 1.0),
    ]
    assert [(p.parameter, p.layer, p.kind) for p in residual.residual_projections] == [
        (f"transformer.h.{layer}.{name}.c_proj.weight", layer, kind)
        for layer in range(3)
        for name, kind in (("attn", "attention"), ("mlp", "mlp"))
    ]
    first = [(m.parameter, m.sublayer, m.fan_in, m.fan_out, m.reads_stream) for m in residual.matrices[:4]]
    assert first == [
        ("transformer.h.0.attn.c_attn.weight", 0, 32, 96, True),
        ("transformer.h.0.attn.c_proj.weight", 0, 32, 32, False),
        ("transformer.h.0.mlp.c_fc.weight", 1, 32, 128, True),
        ("transformer.h.0.mlp.c_proj.weight", 1, 128, 32, False),
    ]
    assert Counter(n.role for n in residual.norms) == {"pre": 6, "final": 1}
    assert residual.tied == (("transformer.wte.weight", "lm_head.weight"),)
    assert residual.head is not None
    assert (residual.head.parameter, residual.head.tied) == ("lm_head.weight", True)
