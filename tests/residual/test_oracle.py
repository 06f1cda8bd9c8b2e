"""The map against real gradients, with no graph in between: what autograd reaches is what the map says, exactly.

With every residual projection (and its bias) zero and all else drawn non-zero, the parameters with gradient are the
ones on the stream and the projections; with a sub-layer's projections given back, its own weights join them, and no
others do. A gradient behind a zero factor is exactly zero, so there is no tolerance.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import spikepatch
from spikepatch.errors import SpikepatchError
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.trace import full_example
from tests.residual import configs
from tests.residual.configs import model_class, tiny_config_for
from tests.residual.maps import TYPES
from tests.residual.test_golden import golden

#: Structurally different types, in the default suite; the others are slow.
DEFAULT = (*TYPES, "bert", "glm4_moe", "jamba", "mamba2", "nemotron_h")

#: Weights that only choose what a sub-layer attends to or which expert it asks: without gradient, by design.
NO_GRADIENT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        "axk2 deepseek_v32 dots3_note dots3_note_text glm_moe_dsa minimax_m3_vl_text".split(), ("*.indexer.*",)
    ),
    "phimoe": ("*.mlp.router.weight",),
    "switch_transformers": ("decoder.block.1.layer.2.mlp.experts.expert_1.*",),  # no token of the example asks it
}

#: Weights that several sub-layers compute with; the map names the first.
SHARED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("gemma4", "gemma4_text"),
        (
            "*.per_layer_model_projection.weight",
            "*.embed_tokens_per_layer.weight",
            "*.per_layer_projection_norm.weight",
        ),
    ),
    **dict.fromkeys(
        ("longt5", "mt5", "switch_transformers", "t5"),
        ("*.block.0.layer.0.*SelfAttention.relative_attention_bias.weight",),
    ),
    "cpmant": ("cpmant.position_bias.relative_attention_bias",),
    "pegasus_x": ("model.encoder.embed_global.weight",),  # global tokens, which every attention reads
    "mpnet": ("mpnet.encoder.relative_attention_bias.weight",),
    "neomme": ("model.value_embeddings.weight",),
    "zamba": ("*.shared_transf.*",),
    "zamba2": ("*.shared_transformer.*",),
    # A router's state goes on to the next layer's.
    "zaya": ("model.layers.0.mlp.gate.down_proj.*", "model.layers.0.post_attention_layernorm.weight"),
}

#: Types whose masks hold single precision's lowest value, which is none of double precision.
SINGLE = ("fsmt", "led", "longformer", "xglm")

#: Types that have a backward pass in training only.
TRAINED = ("reformer",)

#: Types that run the same blocks several times: the map counts every pass, and names a weight for its first.
REPEATED = ("albert", "dory", "hrm_text")

#: Types whose additions are not counted: their layers add a share of the difference between their output and the
#: stream; or work on blocks of tokens, padded, and on global tokens beside them.
UNCOUNTED = ("dory", "pegasus_x")

#: Type -> the mapping that it is built for; a type of several mappings once.
CASES: dict[str, configs.Mapping] = {
    t: mapping for mapping, t in reversed(list(configs.entries())) if mapping != "tower"
}


def oracle_parameters() -> list[Any]:
    return [
        pytest.param(model_type, marks=() if model_type in DEFAULT else pytest.mark.slow)
        for model_type in sorted(CASES)
    ]


@pytest.mark.parametrize("model_type", oracle_parameters())
def test_numeric_oracle(model_type: str) -> None:
    try:
        model = tiny_model(model_type, CASES[model_type])
        residual = spikepatch.inspect(model)
    except (SpikepatchError, ValueError) as refused:
        if model_type in DEFAULT:
            raise
        pytest.skip(f"no map: {refused}")
    if not residual.proven:
        assert model_type not in DEFAULT, residual.leaks
        pytest.skip("not proven: nothing is claimed")
    draw_all(model, torch.float32 if model_type in SINGLE else torch.float64)
    problems = disagreements(model, residual, model_type)
    assert not problems, "\n".join(problems)


def test_covers_enough() -> None:
    """The types whose maps are proven at full width are the ones that the oracle does not skip."""
    proven = {key.partition("/")[2] for key, value in golden().items() if value.get("proven")}
    assert len(proven & CASES.keys()) >= 120


def tiny_model(model_type: str, mapping: configs.Mapping) -> PreTrainedModel:
    """Eager attention and eager experts: every operation has a derivative in float64."""
    model: PreTrainedModel = model_class(model_type, mapping)._from_config(tiny_config_for(model_type, mapping))
    for setter in ("set_attn_implementation", "set_experts_implementation"):
        with contextlib.suppress(ValueError):
            getattr(model, setter)("eager")
    return model.train(model_type in TRAINED)


def draw_all(model: PreTrainedModel, dtype: torch.dtype = torch.float64) -> None:
    """To ``dtype``, with every parameter drawn away from zero: gains and gates too."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.to(dtype).parameters():
        size = 0.1 + 0.2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        sign = 1.0 - 2.0 * torch.randint(0, 2, parameter.shape, generator=generator)
        parameter.data.copy_(size * sign)


@dataclass(frozen=True)
class Lab:
    """A model whose residual projections can be silenced. Names are those of ``named_parameters()``."""

    model: PreTrainedModel
    model_type: str
    inputs: Mapping[str, torch.Tensor]
    parameters: Mapping[str, nn.Parameter]
    alias: Mapping[str, str]  # every name of a parameter -> its first
    drawn: Mapping[str, torch.Tensor]
    biases: Mapping[str, tuple[str, ...]]  # projection -> what is added to its product

    def hear(self, silent: Iterable[str]) -> set[str]:
        """Parameters with gradient while the projections ``silent``, and their biases, are zero."""
        parts = {part for name in silent for part in (name, *self.biases[name])}
        for name in parts:
            self.parameters[name].data.zero_()
        found = gradients(self.model, self.inputs)
        for name in parts:
            self.parameters[name].data.copy_(self.drawn[name])
        return found

    def listed(self, table: Mapping[str, tuple[str, ...]]) -> set[str]:
        return _matching(table.get(self.model_type, ()), self.parameters)


def disagreements(model: PreTrainedModel, residual: ResidualMap, model_type: str) -> list[str]:
    """How autograd and ``residual`` differ, in sentences. Changes the model's gradients only."""
    parameters = dict(model.named_parameters())
    alias = {name: own for name, p in model.named_parameters(remove_duplicate=False) for own in _names(parameters, p)}
    everything = [p for stream in (residual, *residual.streams) for p in stream.residual_projections]
    projections = [p.parameter for p in everything]
    reached = {name for stream in (residual, *residual.streams) for name in stream.reaches}
    biases = {
        p.parameter: tuple({alias[b.parameter] for b in p.between if b.kind == "bias" and b.parameter} - reached)
        for p in everything
    }
    drawn = {name: p.detach().clone() for name, p in parameters.items()}
    lab = Lab(model, model_type, example(model), parameters, alias, drawn, biases)

    problems = _additions(lab, residual)
    trained = lab.hear(())
    others: set[str] = set()
    for stream in residual.streams:
        others |= _on_stream(lab, stream)
    more, claimed = _of_one(lab, residual, trained, projections, others)
    problems += more
    for stream in residual.streams:  # heard through the main stream, which all speaks
        silent = [p.parameter for p in stream.residual_projections]
        more, found = _of_one(lab, stream, trained - claimed - _on_stream(lab, residual), silent, set())
        problems += more
        claimed |= found
    problems += [f"{name}: trained by the model, and in no part of the map" for name in trained - claimed - others]
    return sorted(problems)


class ZerosAdded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts additions of nothing: of a value that is zero throughout to one that is not, and as wide as the stream.

    ``sized``: of those that have a vector for each token, wherever their width lies: some models put channels first.
    ``count``: of all that end in the width: others pad the tokens, or pool them.
    """

    def __init__(self, widths: Set[int], tokens: Set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.widths, self.count, self.sized = widths, 0, 0
        self.sizes = {width * count for width in widths for count in tokens}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor}:
            first, second = args[:2]
            alike = isinstance(second, torch.Tensor) and first.numel() == second.numel()
            nothing = alike and first.ndim > 1 and bool(first.any()) != bool(second.any())
            self.count += nothing and first.shape[-1] in self.widths
            self.sized += nothing and first.numel() in self.sizes and not self.widths.isdisjoint(first.shape)
        return func(*args, **(kwargs or {}))


def _additions(lab: Lab, residual: ResidualMap) -> list[str]:
    """S against the additions that the running model makes: with every projection zero, each adds nothing.

    A parallel block may add its sub-layers up first; a bias behind the projections makes something of nothing.
    """
    streams = (residual, *residual.streams)
    projections = [p for stream in streams for p in stream.residual_projections]
    biased = {norm.module for stream in streams for norm in stream.norms if norm.bias is not None}
    parts = {part for name, own in lab.biases.items() for part in (name, *own)}
    added = {lab.alias[b.parameter] for p in projections for b in p.between if b.kind == "bias" and b.parameter}
    if added - parts or biased & {p.branch_norm for p in projections} or lab.model_type in UNCOUNTED:
        return []
    for name in parts:
        lab.parameters[name].data.zero_()
    tokens = {math.prod(value.shape[:2]) for value in lab.inputs.values()}
    counting = ZerosAdded({stream.width for stream in streams}, tokens)
    with torch.no_grad(), counting:
        lab.model(**lab.inputs, use_cache=False)
    for name in parts:
        lab.parameters[name].data.copy_(lab.drawn[name])
    wanted = sum(stream.sublayers for stream in streams)
    several = any(stream.placement in {"parallel", "mixed"} for stream in streams)
    counts = (counting.count, counting.sized)
    right = any(0 < count <= wanted if several else count == wanted for count in counts)
    return [] if right else [f"{wanted} sub-layers by the map, and {counts} additions in the running model"]


def _of_one(
    lab: Lab, residual: ResidualMap, trained: set[str], silent: Iterable[str], others: set[str]
) -> tuple[list[str], set[str]]:
    """What is wrong with one stream's map, and the parameters that it accounts for.

    Args:
        trained: the parameters in question.
        silent: projections that are zero when this stream is to be silent.
        others: what is on the streams that this one's cross-attention reads.
    """
    projections = {p.parameter: p for p in residual.residual_projections}
    named = _on_stream(lab, residual)
    live = lab.hear(silent) & trained
    problems = _unheard(lab, residual)
    problems += [
        f"{name}: has gradient with every residual projection zero, and is not on the stream by the map"
        for name in live - named
    ]
    problems += [f"{name}: on the stream by the map, without gradient" for name in (named & trained) - live]

    ignored = lab.listed(NO_GRADIENT) | lab.listed(SHARED)
    matrices = {lab.alias[m.parameter]: m for m in residual.matrices}
    matrices = {name: m for name, m in matrices.items() if name not in live and name not in ignored}
    problems += [
        f"{name}: of sub-layer {matrix.sublayer} by the map, never trained"
        for name, matrix in matrices.items()
        if name not in trained
    ]
    sublayers = sorted({p.sublayer for p in projections.values()})
    if lab.model_type not in REPEATED and sublayers != list(range(residual.sublayers)):
        problems.append(f"{residual.sublayers} sub-layers by the map, and projections for {sublayers} only")
    claimed = set(live)
    for sublayer in sublayers:
        mine = [name for name, p in projections.items() if p.sublayer == sublayer]
        own = {name for name, m in matrices.items() if m.sublayer == sublayer and name in trained}
        gained = (lab.hear(set(silent) - set(mine)) & trained) - live
        if projections[mine[0]].kind == "cross-attention":
            missed = (others & trained) - live - gained
            problems += [f"{name}: on another stream, silent when {sublayer} reads that" for name in missed]
            gained -= others
        claimed |= gained
        problems += [f"{name}: of sub-layer {sublayer} by the map, silent when it speaks" for name in own - gained]
        blocks = {_block(name) for name in own | set(mine)}
        problems += [
            f"{name}: not of sub-layer {sublayer} by the map, heard when that speaks"
            for name in gained - own - ignored
            if name in matrices or _block(name) not in blocks
        ]
        for name in mine:
            alone = (lab.hear(set(silent) - {name}) & trained) - live
            if own and not alone & own:
                problems.append(f"{name}: given back alone, none of its sub-layer's weights has gradient")
            problems += [f"{name}: given back alone, reaches {other} beyond" for other in alone - gained - others]
    return problems, claimed


def _block(name: str) -> str:
    """Path of the layer that holds the parameter: through the first number in its name."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def _matching(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


def _names(parameters: Mapping[str, nn.Parameter], wanted: nn.Parameter) -> list[str]:
    return [name for name, parameter in parameters.items() if parameter is wanted]


def _on_stream(lab: Lab, residual: ResidualMap) -> set[str]:
    """What the map itself says that is heard with the cut: what it says reaches the output, and what is cut."""
    cut = {p.parameter for p in residual.residual_projections}
    return {lab.alias[name] for name in residual.reaches} | cut | {bias for name in cut for bias in lab.biases[name]}


def _unheard(lab: Lab, residual: ResidualMap) -> list[str]:
    """Parts that the map places on the stream, and does not say to reach the output."""
    modules = {n.module for n in residual.norms if n.role in {"embedding", "post", "final"}}
    named = {name for name in lab.parameters if name.rpartition(".")[0] in modules}
    named |= {lab.alias[e.parameter] for e in residual.embeddings}
    named |= {lab.alias[residual.head.parameter]} if residual.head is not None else set()
    reached = {lab.alias[name] for name in residual.reaches}
    return [f"{name}: on the stream by the map, and not among what reaches the output" for name in named - reached]


def gradients(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> set[str]:
    """Parameters with non-zero gradient of a random projection of the output."""
    model.zero_grad()
    output = model(**inputs, use_cache=False)[0]
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    (output * direction).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(bool(grad.isfinite().all()) for grad in found.values())
    return {name for name, grad in found.items() if bool(grad.ne(0).any())}


def must_have(model: PreTrainedModel) -> set[str]:
    """What the made-up inputs hold where ids alone do not do."""
    ids = torch.arange(5, 9).unsqueeze(0)
    try:
        model(input_ids=ids)
    except Exception:  # whatever a forward pass raises
        return set(full_example(model))
    return set()


def example(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    config = model.config.get_text_config()
    shape = (getattr(config, "num_codebooks", 1), 12)
    ids = torch.randint(5, min(config.vocab_size, 300) - 5, shape, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    whole = full_example(model)  # what the map was made with, in values of our own
    own = [name for name, given in whole.items() if given.is_floating_point() and not name.endswith("states")]
    if any(whole[name].ndim != 3 or name in must_have(model) for name in own):  # patches: the ids have places
        drawn = torch.Generator().manual_seed(2)
        return {
            name: torch.randn(given.shape, generator=drawn).to(model.dtype) if given.is_floating_point() else given
            for name, given in whole.items()
        }
    for name, given in whole.items():
        if given.is_floating_point() and name not in inputs:
            shape = (1, 7, *given.shape[2:])
            inputs[name] = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(model.dtype)
        elif name not in inputs:
            inputs[name] = torch.arange(ids.shape[-1]).lt(3).long().expand(ids.shape)
    return inputs
