"""Embedding LayerNorm: x = LN(E[token]), affine, on the token embedding alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import embedding, layer_norm

import spikepatch
from spikepatch.errors import Refused
from spikepatch.plans import Context, NormEmbedding
from spikepatch_transforms.embed_norm import EmbedNorm
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
