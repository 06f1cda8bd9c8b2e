"""Untie: the head gets a matrix of its own; a copy where weights are kept, a draw of its own where they are fresh."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import spikepatch
from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, Fill, Recipe, Untie
from spikepatch_transforms.untie import UntieHead
from tests.architectures import encoder_decoder, ids, tiny_model


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


@pytest.mark.parametrize("reinit", ["none", "residual"])
def test_a_fresh_head_beside_kept_weights(reinit: Any) -> None:
    model: Any = tiny_model("gpt2")
    before = model.transformer.wte.weight.detach().clone()
    recipe = Recipe("own-head", (UntieHead(fresh=True),))
    plan = spikepatch.plan(model, recipe, reinit=reinit)
    assert plan.edits == (
        Untie("lm_head.weight", "transformer.wte.weight"),
        Fill("lm_head.weight", math.sqrt(2 / (5 * 64)), fan=64),
    )
    spikepatch.patch(model, plan)
    assert torch.equal(model.transformer.wte.weight, before)
    head = model.lm_head.weight.detach().double()
    assert abs(float(head.std()) / math.sqrt(2 / (5 * 64)) - 1) < 6 / math.sqrt(2 * head.numel())


def test_only_where_it_is_tied() -> None:
    residual = spikepatch.inspect(tiny_model("llama"))
    assert list(UntieHead(if_tied=True)(residual, Context("all"))) == []


def test_only_the_stream_that_feeds_the_output_has_a_head() -> None:
    assert list(UntieHead()(spikepatch.inspect(tiny_model("gpt2")), Context("all", stream=1))) == []


class Multiplies(nn.Module):
    """A model whose head is a product with the table itself: there is no second name for a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        logits: torch.Tensor = x @ self.tokens.weight.T
        return logits


def test_a_head_that_is_the_table_itself() -> None:
    example = {"input_ids": torch.arange(5, 16)[None]}
    with pytest.raises(Refused, match=r"head cannot be untied(.|\n)*multiplies by tokens\.weight itself"):
        spikepatch.plan(Multiplies(), "vanilla", reinit="all", untie=True, example_inputs=example)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("t5", r"it ties lm_head\.weight all the same"),
        ("bart", r"with the head it unties (.|\n)*model\.shared\.weight"),
    ],
)
def test_a_class_that_cannot_untie(model_type: str, message: str) -> None:
    """t5 sets its config back, and bart's switch takes the two embeddings apart too. The model is as it was."""
    model = encoder_decoder(model_type)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    with pytest.raises(Refused, match=f"cannot untie its head alone(.|\n)*{message}"):
        spikepatch.patch(model, "vanilla", reinit="all", untie=True)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys()
    assert all(id(after[n]) == identity and torch.equal(after[n], p) for n, (identity, p) in before.items())
    assert model.config.tie_word_embeddings


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
