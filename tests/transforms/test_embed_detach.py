"""Embed Detach: the same output, a tenth of the lookup's gradient, and a tied head's own gradient untouched."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

import spikepatch
from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, DetachEmbedding, Skip
from spikepatch_transforms.embed_detach import EmbedDetach
from tests.architectures import ids, tiny_model

G = 0.1


def pair(model_type: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """A model, and the same one patched."""
    plain = tiny_model(model_type).to(dtype)
    patched = copy.deepcopy(plain)
    spikepatch.patch(patched, "embed-detach", reinit="none", **options)
    return plain, patched


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "bloom", "mamba"])
def test_forward_is_the_same_bits(model_type: str, dtype: torch.dtype) -> None:
    """Also where the model multiplies (gemma2) or normalises (bloom) the embedding afterwards."""
    plain, patched = pair(model_type, dtype)
    table = patched.get_input_embeddings()
    assert table.gradient_share == G
    everything = torch.arange(500)
    assert torch.equal(table(everything), plain.get_input_embeddings()(everything))
    with torch.no_grad():
        assert torch.equal(patched(ids(plain)).logits, plain(ids(plain)).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_the_lookup(dtype: torch.dtype) -> None:
    """g times what the plain lookup gets from the same gradient above, to the last bit: one multiplication each."""
    plain, patched = (model.get_input_embeddings() for model in pair("llama", dtype))
    tokens = torch.arange(1, 13)
    above = torch.randn(12, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad(plain(tokens), plain.weight, above)
    (found,) = torch.autograd.grad(patched(tokens), patched.weight, above)
    assert float(expected.abs().sum()) > 0
    assert torch.equal(found, G * expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tied_heads_own_gradient_stays(dtype: torch.dtype) -> None:
    """Rows that only the head uses get the whole gradient; the others lose 1 - g of what the lookup gave them."""
    plain, patched = pair("gpt2", dtype)
    tokens = ids(plain)
    gradients = []
    for model in (plain, patched):
        model(tokens, labels=tokens).loss.backward()
        gradients.append(model.lm_head.weight.grad.double())
        assert model.lm_head.weight is model.transformer.wte.weight
    absent = torch.ones(500, dtype=torch.bool)
    absent[tokens.flatten()] = False
    assert int(absent.sum()) > 400
    assert torch.equal(gradients[0][absent], gradients[1][absent])

    # The lookup's part alone, from a plain model whose head has the same values in a matrix of its own.
    apart: Any = copy.deepcopy(plain)
    apart.zero_grad()
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.detach().clone())
    apart(tokens, labels=tokens).loss.backward()
    lookup = apart.transformer.wte.weight.grad.double()
    expected = gradients[0] - (1 - G) * lookup
    slack = 64 * torch.finfo(dtype).eps * float(gradients[0].abs().max())
    assert float((gradients[1] - expected).abs().max()) < slack < float(lookup.abs().max()) / 100


def test_share_of_zero_freezes_the_lookup() -> None:
    model = tiny_model("llama")
    plan = spikepatch.plan(model, spikepatch.Recipe("frozen", (EmbedDetach(0.0),)), reinit="none")
    spikepatch.patch(model, plan)
    model(ids(model), labels=ids(model)).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert float(gradient.abs().max()) == 0


def test_plan() -> None:
    residual = spikepatch.inspect(tiny_model("gpt2"))
    assert list(EmbedDetach(0.5)(residual, Context("none"))) == [DetachEmbedding("transformer.wte", 0.5)]


@pytest.mark.parametrize("gradient", [-0.1, 1.0, float("nan")])
def test_a_share_without_sense(gradient: float) -> None:
    with pytest.raises(Refused, match="from 0 to below 1"):
        EmbedDetach(gradient)


def test_no_token_embedding() -> None:
    """Of the stream that feeds the output: refused. Of another one, a spectrogram's or an image's: left as it is."""
    residual = dataclasses.replace(spikepatch.inspect(tiny_model("gpt2")), embeddings=())
    with pytest.raises(Refused, match="no token embedding"):
        list(EmbedDetach()(residual, Context("all")))
    (item,) = EmbedDetach()(residual, Context("all", stream=1))
    assert isinstance(item, Skip)
    assert "no token embedding" in item.reason


@pytest.mark.parametrize("second", ["embed-detach", "scaled-embed"])
def test_twice(second: str) -> None:
    model = tiny_model("gpt2")
    spikepatch.patch(model, "embed-detach", reinit="none")
    with pytest.raises(Refused, match=r"patched already(.|\n)*transformer\.wte"):
        spikepatch.patch(model, second, reinit="all")
