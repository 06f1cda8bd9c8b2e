"""Untie: the head gets a matrix of its own; a copy where weights are kept, a draw of its own where they are fresh."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import spikepatch
from spikepatch.errors import Refused
from spikepatch.plans import Context, Untie
from spikepatch_transforms.untie import UntieHead
from tests.architectures import ids, tiny_model


def test_kept_weights_start_as_a_copy() -> None:
    """The head alone changes nothing: logits are the same bits, and then it learns apart from the embedding."""
    model: Any = tiny_model("gpt2")
    with torch.no_grad():
        before = model(ids(model)).logits
    spikepatch.patch(model, "vanilla", reinit="none", untie=True)
    head, table = model.lm_head.weight, model.transformer.wte.weight
    assert head is not table
    assert head.data_ptr() != table.data_ptr()
    assert torch.equal(head, table)
    with torch.no_grad():
        assert torch.equal(model(ids(model)).logits, before)
        head.zero_()
    assert float(table.detach().abs().sum()) > 0
    model.tie_weights()
    assert model.lm_head.weight is head
    assert model.config.tie_word_embeddings is False


def test_fresh_weights_are_independent() -> None:
    model: Any = tiny_model("gpt2")
    spikepatch.patch(model, "scaled-embed", reinit="all", untie=True)
    head, table = model.lm_head.weight.detach().double(), model.transformer.wte.weight.detach().double()
    n, std = head.numel(), math.sqrt(2 / (5 * 64))
    for weight in (head, table):
        assert abs(float(weight.std()) / std - 1) < 6 / math.sqrt(2 * n)
    assert abs(float((head * table).mean())) / std**2 < 6 / math.sqrt(n)


def test_a_tied_head_predicts_the_current_token() -> None:
    """What it is for. Tied, the token's own logit is about sqrt(2/5) 8 / 0.632 = 8 s.d. above the others."""
    own = {}
    for untie in (False, True):
        model = tiny_model("gpt2")
        spikepatch.patch(model, "scaled-embed", reinit="all", untie=untie)
        tokens = torch.randint(5, 500, (8, 60), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            own[untie] = float((model(tokens).logits.argmax(-1) == tokens).float().mean())
    assert own[False] > 0.95
    assert own[True] < 0.05


def test_plan() -> None:
    residual = spikepatch.inspect(tiny_model("gpt2"))
    assert list(UntieHead()(residual, Context("all"))) == [Untie("lm_head.weight", "transformer.wte.weight")]


def test_a_head_of_its_own() -> None:
    with pytest.raises(Refused, match=r"no tied head(.|\n)*own matrix already(.|\n)*leave --untie out"):
        spikepatch.plan(tiny_model("llama"), "vanilla", reinit="all", untie=True)


def test_no_head() -> None:
    from transformers import AutoModel

    model = AutoModel.from_config(tiny_model("gpt2").config)
    with pytest.raises(Refused, match=r"no tied head(.|\n)*no head"):
        spikepatch.plan(model, "vanilla", reinit="all", untie=True)


def test_twice() -> None:
    model = tiny_model("gpt2")
    spikepatch.patch(model, "vanilla", reinit="none", untie=True)
    with pytest.raises(Refused, match="no tied head"):
        spikepatch.patch(model, "vanilla", reinit="none", untie=True)
