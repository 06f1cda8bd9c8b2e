"""Scaled embedding: x = c E[token], to the last bit; where it applies, and where it does not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import spikepatch
from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, Plan, ScaleEmbedding
from spikepatch_transforms.embed_scale import EmbedScale
from tests.architectures import ids, tiny_model


def token_embedding(model: Any, plan: Plan) -> tuple[torch.nn.Embedding, float]:
    (edit,) = plan.select(ScaleEmbedding)
    return model.get_submodule(edit.module), edit.factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mamba", "opt"])
def test_output_is_the_plain_embedding_times_c(model_type: str, dtype: torch.dtype) -> None:
    """One multiplication: the rounding error is at most eps / 2 of the result."""
    model = tiny_model(model_type).to(dtype)
    plan = spikepatch.plan(model, "scaled-embed", reinit="all")
    spikepatch.patch(model, plan)
    table, factor = token_embedding(model, plan)
    assert factor == 8.0
    tokens = ids(model)
    exact = math.sqrt(64) * torch.nn.functional.embedding(tokens, table.weight.detach().double())
    error = (table(tokens).detach().double() - exact).abs()
    assert bool((error <= torch.finfo(dtype).eps / 2 * exact.abs()).all())


def test_stream_starts_at_the_papers_std() -> None:
    """sqrt(2/5) = 0.632 at every width, within 6 standard errors of 500 x 64 values."""
    model = tiny_model("llama")
    spikepatch.patch(model, "scaled-embed", reinit="all")
    with torch.no_grad():
        start = model(torch.arange(500)[None], output_hidden_states=True).hidden_states[0]
    assert abs(float(start.std()) / math.sqrt(2 / 5) - 1) < 6 / math.sqrt(2 * start.numel())


def test_kept_weights_start_at_std_one() -> None:
    model = tiny_model("llama")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    spikepatch.patch(model, "scaled-embed", reinit="none")
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    with torch.no_grad():
        start = model(torch.arange(500)[None], output_hidden_states=True).hidden_states[0]
    assert float(start.double().std()) == pytest.approx(1, abs=64 * torch.finfo(torch.float32).eps)


def test_gradient_is_scaled_too() -> None:
    """d(c E)/dE = c: the gradient on a row is c times that of the plain embedding, for the same gradient above."""
    model = tiny_model("llama")
    spikepatch.patch(model, "scaled-embed", reinit="all", factor=3.0)
    table: Any = model.get_input_embeddings()
    above = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(1, 13)  # row 0 is for padding, which torch gives no gradient
    (ours,) = torch.autograd.grad(table(tokens), table.weight, above)
    expected = torch.zeros_like(table.weight).index_put_((tokens,), 3.0 * above)
    assert torch.equal(ours, expected)


def test_positions() -> None:
    residual = spikepatch.inspect(tiny_model("gpt2"))
    scaled = [e for e in EmbedScale(positions=True)(residual, Context("all")) if isinstance(e, ScaleEmbedding)]
    assert [edit.module for edit in scaled] == ["transformer.wte", "transformer.wpe"]
    rotary = spikepatch.inspect(tiny_model("llama"))
    assert len(list(EmbedScale(positions=True)(rotary, Context("all")))) == 1


def test_already_multiplied() -> None:
    with pytest.raises(Refused, match=r"already multiplied by 8(.|\n)*embed_tokens(.|\n)*vanilla"):
        spikepatch.plan(tiny_model("gemma2"), "scaled-embed", reinit="all")
    with pytest.raises(Refused, match="already multiplied by 12"):
        spikepatch.plan(tiny_model("granite", embedding_multiplier=12.0), "scaled-embed", reinit="all")


def test_already_normed() -> None:
    with pytest.raises(Refused, match=r"already normalised(.|\n)*cancels any factor"):
        spikepatch.plan(tiny_model("bloom"), "scaled-embed", reinit="all")


@pytest.mark.parametrize(
    ("model_type", "changes", "own"), [("granite", {"embedding_multiplier": 12.0}, 12.0), ("gemma2", {}, 8.0)]
)
def test_replace_makes_the_total_c(model_type: str, changes: dict[str, Any], own: float) -> None:
    """The architecture's factor is divided out: the stream starts with c std(E), and with no factor twice."""
    model = tiny_model(model_type, **changes)
    plan = spikepatch.plan(model, "scaled-embed", reinit="all", factor=3.0, replace=True)
    assert plan.select(ScaleEmbedding) == [ScaleEmbedding(f"{model.base_model_prefix}.embed_tokens", 3.0 / own)]
    spikepatch.patch(model, plan)
    tokens = torch.arange(500)[None]
    with torch.no_grad():
        start = model(tokens, output_hidden_states=True).hidden_states[0].double()
    expected = 3.0 * torch.nn.functional.embedding(tokens, model.get_input_embeddings().weight.detach().double())
    # Two multiplications more than the exact product, and gemma rounds its factor to the weights' dtype.
    assert float((start / expected - 1).abs().max()) < 4 * torch.finfo(torch.float32).eps


def test_replace_of_the_same_factor() -> None:
    """gemma2 multiplies by sqrt(d) as the recipe does: nothing to replace, and the recipe applies to the rest."""
    plan = spikepatch.plan(tiny_model("gemma2"), "scaled-embed", reinit="all", replace=True)
    assert not plan.select(ScaleEmbedding)
    assert not plan.structural
    reasons = {skip.target: skip.reason for skip in plan.skips}
    assert reasons["model.embed_tokens * 8"] == "the architecture multiplies by that already"


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_replace_without_a_factor_to_replace(model_type: str) -> None:
    with pytest.raises(Refused, match="no factor to replace") as refused:
        spikepatch.plan(tiny_model(model_type), "scaled-embed", reinit="all", replace=True)
    assert "leave --replace (replace) out" in refused.value.remedy


def test_a_table_narrower_than_the_stream() -> None:
    """A projection of unknown size stands between: a factor is not worked out, but it can be given."""
    model = tiny_model("opt", word_embed_proj_dim=32)
    with pytest.raises(Refused, match=r"token embedding is 32 wide, the stream 64(.|\n)*--factor"):
        spikepatch.plan(model, "scaled-embed", reinit="all")
    plan = spikepatch.plan(model, "scaled-embed", reinit="none", factor=2.0)
    assert plan.edits == (ScaleEmbedding("model.decoder.embed_tokens", 2.0),)
    tokens = ids(model)
    with torch.no_grad():
        rows = model.get_input_embeddings()(tokens)
        spikepatch.patch(model, plan)
        assert torch.equal(model.get_input_embeddings()(tokens), 2 * rows)


def test_post_norm() -> None:
    with pytest.raises(Refused, match="post-norm"):
        spikepatch.plan(tiny_model("opt", do_layer_norm_before=False), "scaled-embed", reinit="all")


@pytest.mark.parametrize("factor", [0.0, -2.0, math.nan, math.inf])
def test_a_factor_without_sense(factor: float) -> None:
    with pytest.raises(Refused, match="factor must be a positive number"):
        EmbedScale(factor)


@pytest.mark.parametrize("std", [0.0, math.nan, math.inf])
def test_learned_embedding_without_scale(std: float) -> None:
    residual = spikepatch.inspect(tiny_model("gpt2"))
    with pytest.raises(Refused, match="no usable scale"):
        list(EmbedScale()(residual, Context("none", std)))
    assert list(EmbedScale(2.0)(residual, Context("none", std))) == [ScaleEmbedding("transformer.wte", 2.0)]


def test_twice() -> None:
    model = tiny_model("gpt2")
    spikepatch.patch(model, "scaled-embed", reinit="none", factor=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(Refused, match=r"patched already(.|\n)*transformer\.wte"):
        spikepatch.patch(model, "scaled-embed", reinit="all")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_not_a_language_model() -> None:
    residual = dataclasses.replace(spikepatch.inspect(tiny_model("gpt2")), embeddings=())
    with pytest.raises(Refused, match="no token embedding"):
        list(EmbedScale()(residual, Context("all")))
