"""Embedding norm: x = LN(E[token]) or RMSNorm(E[token]), with a gain or without, on the token embedding alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import embedding, layer_norm

import spikepatch
from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, NormEmbedding, Recipe
from spikepatch_transforms.embed_norm import EmbedNorm
from spikepatch_transforms.small_init import SmallInit
from tests.architectures import ids, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reinit", ["all", "none"])
def test_output_is_the_layer_norm_of_the_plain_embedding(reinit: Any, dtype: torch.dtype) -> None:
    model = tiny_model("gpt2").to(dtype)
    spikepatch.patch(model, "embed-ln", reinit=reinit)
    table: Any = model.get_submodule("transformer.wte")
    assert torch.equal(table.norm.weight, torch.ones(64, dtype=dtype))
    assert torch.equal(table.norm.bias, torch.zeros(64, dtype=dtype))
    tokens = ids(model)
    assert torch.equal(table(tokens), layer_norm(embedding(tokens, table.weight), (64,), eps=1e-5))
    with torch.no_grad():
        table.norm.weight.mul_(3)
        table.norm.bias.add_(1)
    expected = layer_norm(embedding(tokens, table.weight), (64,), table.norm.weight, table.norm.bias, 1e-5)
    assert torch.equal(table(tokens), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_every_norm_by_its_equation(norm: Any, affine: bool, dtype: torch.dtype) -> None:
    """(x - mean) / sqrt(var + eps), or x / sqrt(mean(x^2) + eps), computed in float64; errors of a few roundings."""
    model = tiny_model("llama").to(dtype)
    recipe = Recipe("norm", (SmallInit(), EmbedNorm(norm=norm, affine=affine)))
    spikepatch.patch(model, recipe, reinit="all")
    table: Any = model.get_input_embeddings()
    names = {"weight", "bias"} if norm == "layernorm" else {"weight"}
    assert {name for name, _ in table.norm.named_parameters()} == (names if affine else set())
    rows = table.weight.detach().double()[torch.arange(200)]
    if norm == "layernorm":
        rows = rows - rows.mean(-1, keepdim=True)
    expected = rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    error = (table(torch.arange(200)).detach().double() - expected).abs()
    # A sum of 64 terms, a root and a division; the mean is taken off values of size 1.
    assert float(error.max()) < 64 * torch.finfo(dtype).eps * float(expected.abs().max())


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("inf")])
def test_an_eps_without_sense(eps: float) -> None:
    with pytest.raises(Refused, match="eps must be a positive number"):
        EmbedNorm(eps)


def test_rows_have_std_one() -> None:
    """Up to eps: a row of variance v leaves with variance v / (v + eps)."""
    model = tiny_model("llama").double()
    spikepatch.patch(model, "embed-ln", reinit="all")
    table: Any = model.get_input_embeddings()
    rows = table(torch.arange(500)).detach()
    plain = table.weight.detach().var(dim=1, correction=0)
    slack = 64 * torch.finfo(torch.float64).eps
    assert torch.allclose(rows.var(dim=1, correction=0), plain / (plain + 1e-5), rtol=slack, atol=0)
    assert float(rows.mean(dim=1).abs().max()) < slack


def test_norm_is_trained() -> None:
    model = tiny_model("gpt2").train()
    spikepatch.patch(model, "embed-ln", reinit="all")
    model(ids(model), labels=ids(model)).loss.backward()
    table: Any = model.get_submodule("transformer.wte")
    assert float(table.norm.weight.grad.abs().sum()) > 0
    assert float(table.norm.bias.grad.abs().sum()) > 0


def test_only_the_token_embedding() -> None:
    residual = spikepatch.inspect(tiny_model("gpt2"))
    assert len(residual.embeddings) == 2
    assert list(EmbedNorm(eps=1e-3)(residual, Context("all"))) == [NormEmbedding("transformer.wte", 1e-3)]


@pytest.mark.parametrize(("model_type", "message"), [("bloom", "already normalised"), ("gemma2", "already multiplied")])
def test_does_not_apply(model_type: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        spikepatch.plan(tiny_model(model_type), "embed-ln", reinit="all")


@pytest.mark.parametrize("second", ["embed-ln", "scaled-embed", "vanilla"])
def test_twice(second: str) -> None:
    model = tiny_model("gpt2")
    spikepatch.patch(model, "embed-ln", reinit="none")
    with pytest.raises(Refused, match="patched already"):
        spikepatch.patch(model, second, reinit="all")
