"""The residual stream of real architectures: what is found, what is proven, and that the proof can fail."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

import spikepatch
from spikepatch.errors import Refused
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.stream import find
from spikepatch.residual.trace import trace
from tests.architectures import tiny_model
from tests.residual.maps import TYPES


@pytest.fixture(scope="module", params=TYPES)
def mapped(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, ResidualMap]:
    model = tiny_model(request.param)
    return model, spikepatch.inspect(model)


def test_proven_and_counted(mapped: tuple[PreTrainedModel, ResidualMap]) -> None:
    model, residual = mapped
    assert residual.proven, residual.leaks
    assert (residual.width, residual.layers) == (64, 3)
    per_layer = 1 if model.config.model_type == "mamba" else 2
    assert residual.sublayers == 3 * per_layer
    assert len(residual.residual_projections) == 3 * per_layer
    assert [p.sublayer for p in residual.residual_projections] == list(range(3 * per_layer))
    assert {p.layer for p in residual.residual_projections} == {0, 1, 2}


def test_json_round_trip(mapped: tuple[PreTrainedModel, ResidualMap]) -> None:
    _, residual = mapped
    assert ResidualMap.from_dict(json.loads(residual.to_json())) == residual


def test_agrees_with_tensor_parallel_plans() -> None:
    """transformers' own tensor-parallel plans name row-wise layers: where there is one, they are our projections."""
    checked = 0
    for model_type in TYPES:
        model = tiny_model(model_type)
        rowwise = {name for name, kind in (model.tp_plan or {}).items() if kind.startswith("rowwise")}
        if not rowwise:
            continue
        found = {
            ".".join("*" if part.isdigit() else part for part in projection.parameter.split("."))
            for projection in spikepatch.inspect(model).residual_projections
        }
        modules = {name.removesuffix(".weight") for name in found if name.endswith(".weight")}
        assert {name for name in rowwise if "experts" not in name} == modules, model_type
        checked += 1
    assert checked >= 9


def test_norms_and_placement() -> None:
    expected = {
        "gpt2": ("pre-norm", "layernorm", {"pre", "final"}),
        "llama": ("pre-norm", "rmsnorm", {"pre", "final"}),
        "qwen3": ("pre-norm", "rmsnorm", {"pre", "qk", "final"}),
        "gemma2": ("branch-norm", "rmsnorm", {"pre", "branch", "final"}),
        "olmo2": ("branch-norm", "rmsnorm", {"qk", "branch", "final"}),
        "gpt_neox": ("parallel", "layernorm", {"pre", "final"}),
        "bloom": ("pre-norm", "layernorm", {"embedding", "pre", "final"}),
    }
    for model_type, (placement, kind, roles) in expected.items():
        residual = spikepatch.inspect(tiny_model(model_type))
        assert (residual.placement, {n.kind for n in residual.norms}) == (placement, {kind}), model_type
        assert {n.role for n in residual.norms} == roles, model_type
        assert all(n.eps > 0 for n in residual.norms)
        assert [n.layer for n in residual.norms if n.role == "final"] == [None]


def test_embeddings_are_measured() -> None:
    gemma = spikepatch.inspect(tiny_model("gemma2"))
    assert [(e.kind, e.scale, e.normed) for e in gemma.embeddings] == [("token", 8.0, False)]  # sqrt(64)
    granite = spikepatch.inspect(tiny_model("granite", embedding_multiplier=12.0))
    assert [e.scale for e in granite.embeddings] == [12.0]
    bloom = spikepatch.inspect(tiny_model("bloom"))
    assert [e.normed for e in bloom.embeddings] == [True]
    gpt2 = spikepatch.inspect(tiny_model("gpt2"))
    assert [(e.module, e.kind, e.scale) for e in gpt2.embeddings] == [
        ("transformer.wte", "token", 1.0),
        ("transformer.wpe", "position", 1.0),
    ]


def test_multiplier_on_the_branch() -> None:
    residual = spikepatch.inspect(tiny_model("granite", residual_multiplier=0.25))
    assert {p.multiplier for p in residual.residual_projections} == {0.25}


def test_experts_and_mixers() -> None:
    mixtral = spikepatch.inspect(tiny_model("mixtral"))
    assert [p.kind for p in mixtral.residual_projections] == ["attention", "moe"] * 3
    routers = [m for m in mixtral.matrices if m.parameter.endswith("gate.weight")]
    assert [(m.kind, m.reads_stream) for m in routers] == [("moe", True)] * 3
    mamba = spikepatch.inspect(tiny_model("mamba"))
    assert {p.kind for p in mamba.residual_projections} == {"mixer"}
    assert {m.parameter.split(".")[-2] for m in mamba.matrices if m.reads_stream} == {"in_proj"}


def test_post_norm_encoder_without_head() -> None:
    config = AutoConfig.for_model(
        "bert", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    residual = spikepatch.inspect(AutoModel.from_config(config))
    assert residual.proven
    assert (residual.placement, residual.sublayers, residual.head) == ("post-norm", 4, None)
    assert {e.kind for e in residual.embeddings} == {"token", "position", "type"}
    assert all(e.normed for e in residual.embeddings)


def test_tied_and_untied_heads() -> None:
    tied = spikepatch.inspect(tiny_model("llama", tie_word_embeddings=True)).head
    assert tied is not None
    assert (tied.parameter, tied.tied) == ("lm_head.weight", True)
    untied = spikepatch.inspect(tiny_model("llama", tie_word_embeddings=False)).head
    assert untied is not None
    assert (untied.parameter, untied.tied) == ("lm_head.weight", False)


# --- plain modules: any forward pass, and proofs that must fail ------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, *, gated_skip: bool = False, nonlinear_branch: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        if gated_skip:
            self.gate = nn.Linear(width, width)
        self.gated_skip, self.nonlinear_branch = gated_skip, nonlinear_branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        if self.nonlinear_branch:
            branch = torch.sigmoid(branch)  # not zero at zero: cutting the projection does not silence it
        if self.gated_skip:
            x = x * torch.sigmoid(self.gate(x))  # a data-dependent skip: not a sum of sub-layer outputs
        return x + branch


class Model(nn.Module):
    def __init__(self, **block: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Block(16, **block) for _ in range(2))
        self.head = nn.Linear(16, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


EXAMPLE = {"ids": torch.arange(6)[None]}


def test_plain_module() -> None:
    model = Model()
    residual = spikepatch.inspect(model, example_inputs=EXAMPLE)
    assert residual.proven
    assert [p.parameter for p in residual.residual_projections] == ["blocks.0.down.weight", "blocks.1.down.weight"]
    assert residual.head is not None
    assert residual.head.parameter == "head.weight"
    assert not any(p.is_meta for p in model.parameters())


def test_nonlinear_branch_is_not_proven() -> None:
    residual = spikepatch.inspect(Model(nonlinear_branch=True), example_inputs=EXAMPLE)
    assert not residual.proven
    assert any("blocks.0.down.weight" in leak for leak in residual.leaks)


def test_gated_skip_is_refused() -> None:
    """A data-dependent factor on the skip breaks the sum: nothing that is an embedding's reaches the last addition."""
    with pytest.raises(Refused, match="no residual stream"):
        spikepatch.inspect(Model(gated_skip=True), example_inputs=EXAMPLE)


class Deaf(Model):
    """Its stream starts from learned positions, the tokens only steer a sub-layer; the head is tied to their table."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(6, 16)
        self.head.weight = self.tokens.weight
        self.mix, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.positions(torch.arange(6, device=ids.device)[None])
        x = x + self.out(torch.relu(self.mix(x) * self.tokens(ids)))
        logits: torch.Tensor = self.head(x)
        return logits


def test_the_tokens_must_reach_the_output() -> None:
    residual = spikepatch.inspect(Deaf(), example_inputs=EXAMPLE)
    assert not residual.proven
    assert any("token embedding does not reach" in leak for leak in residual.leaks)


class Writer(nn.Module):
    """A sub-layer whose output is written in place, position by position, into a tensor of zeros."""

    def __init__(self, *, projected: bool) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
        self.value, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.projected = projected

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        y = torch.zeros_like(x)
        for i in range(ids.shape[1]):
            y[:, i] = torch.sigmoid(self.value(x[:, i]))
        logits: torch.Tensor = self.head(x + (self.out(y) if self.projected else y))
        return logits


def test_writes_in_place_are_seen() -> None:
    residual = spikepatch.inspect(Writer(projected=True), example_inputs=EXAMPLE)
    assert residual.proven
    assert [p.parameter for p in residual.residual_projections] == ["out.weight"]
    leaking = spikepatch.inspect(Writer(projected=False), example_inputs=EXAMPLE)
    assert not leaking.proven
    assert any("value.weight" in leak for leak in leaking.leaks)


def test_unproven_map_is_not_planned() -> None:
    model = Model(nonlinear_branch=True)
    with pytest.raises(Refused, match="not proven"):
        spikepatch.patch(model, "vanilla", reinit="none", example_inputs=EXAMPLE)


def test_needs_example_inputs() -> None:
    with pytest.raises(Refused, match="example_inputs"):
        spikepatch.inspect(Model())


def test_model_is_not_changed() -> None:
    model = tiny_model("gpt2").train()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    use_cache = model.config.use_cache
    spikepatch.inspect(model)
    assert model.training
    assert model.config.use_cache is use_cache
    after = dict(model.named_parameters())
    assert all(id(after[n]) == i and torch.equal(after[n], v) for n, (i, v) in before.items())


def test_facts_are_not_changed_by_another_beginning() -> None:
    found = find(trace(tiny_model("gpt2")))
    assert not isinstance(found, str)
    (stream,) = found
    before = dict(stream.facts.carries)
    product, _ = stream.terms[0].projections[0]
    other = stream.facts.rooted(product)
    assert stream.facts.carries == before
    assert product in other.carries.keys() - before.keys()
