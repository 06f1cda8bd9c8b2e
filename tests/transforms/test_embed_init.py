"""Embedding initialisation: E ~ N(0, s^2) on the token embedding; a tied head is refused, and why is measured."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import spikepatch
from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, Fill, Recipe
from spikepatch_transforms.embed_init import EmbedInit
from spikepatch_transforms.small_init import SmallInit
from tests.architectures import ids, tiny_model


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mamba"])
def test_equation_on_real_tensors(model_type: str) -> None:
    """Mean 0 and std 1 within 6 standard errors, and that is where the stream starts."""
    model = tiny_model(model_type)
    spikepatch.patch(model, "unit-embed", reinit="all")
    table = model.get_input_embeddings().weight.detach().double()
    n = table.numel()
    assert abs(float(table.mean())) < 6 / math.sqrt(n)
    assert abs(float(table.std()) - 1) < 6 / math.sqrt(2 * n)
    with torch.no_grad():
        start = model(torch.arange(60)[None], output_hidden_states=True).hidden_states[0]
    positions = 2 / (5 * 64) if model_type == "gpt2" else 0
    assert abs(float(start.std()) / math.sqrt(1 + positions) - 1) < 6 / math.sqrt(2 * start.numel())


def test_only_the_token_embedding() -> None:
    residual = spikepatch.inspect(tiny_model("gpt2"))
    assert list(EmbedInit(0.7)(residual, Context("all", untied=True))) == [Fill("transformer.wte.weight", 0.7)]


def test_it_does_not_follow_the_width() -> None:
    """s is a constant of the recipe: a generated class draws it whatever the width."""
    plan = spikepatch.plan(tiny_model("gpt2"), "unit-embed", reinit="all")
    (entry,) = [f for f in plan.record("1")["init"]["fills"] if f["parameter"] == "transformer.wte.weight"]
    assert (entry["size"], entry["fan"], entry["depth"]) == (1.0, 0, 0.0)


@pytest.mark.parametrize("std", [1.0, 3.01 / 8])
def test_a_tied_head(std: float) -> None:
    recipe = Recipe("tied", (SmallInit(token_embedding=False), EmbedInit(std)))
    with pytest.raises(Refused, match=rf"do not fit a tied head(.|\n)*about {8 * std:.1f}(.|\n)*untie"):
        spikepatch.plan(tiny_model("gpt2"), recipe, reinit="all")
    assert spikepatch.plan(tiny_model("gpt2"), recipe, reinit="all", untie=True).select(Fill)


def test_what_the_refusal_says_of_a_tied_head() -> None:
    """The logits' std is s sqrt(d), within sampling error: a tied head with s = 2.9 / sqrt(d), just below the limit."""
    model = tiny_model("gpt2")
    recipe = Recipe("tied", (SmallInit(token_embedding=False), EmbedInit(2.9 / 8)))
    spikepatch.patch(model, recipe, reinit="all")
    tokens = ids(model, 60)
    with torch.no_grad():
        logits = model(tokens).logits.double().scatter(-1, tokens[..., None], 0.0)  # without the token's own
    assert abs(float(logits.std()) / 2.9 - 1) < 6 / math.sqrt(2 * 60)  # 60 streams, each of which has a norm of 8


@pytest.mark.parametrize("reinit", ["residual", "none"])
def test_learned_embeddings_are_kept(reinit: str) -> None:
    with pytest.raises(Refused, match=r"draws the token embedding afresh(.|\n)*reinit=" + reinit):
        spikepatch.plan(tiny_model("gpt2"), "unit-embed", reinit=reinit)  # type: ignore[arg-type]


def test_behind_a_norm() -> None:
    with pytest.raises(Refused, match=r"does not matter(.|\n)*a norm stands between"):
        spikepatch.plan(tiny_model("bloom"), "unit-embed", reinit="all")


def test_two_transforms_for_one_table() -> None:
    with pytest.raises(Refused, match=r"two transforms(.|\n)*transformer\.wte\.weight"):
        spikepatch.plan(tiny_model("gpt2"), Recipe("both", (SmallInit(), EmbedInit(0.1))), reinit="all")


def test_twice_is_once() -> None:
    """Values only: the same seed draws the same bits again. The head is untied already, and stays as it is."""
    model = tiny_model("gpt2")
    spikepatch.patch(model, "unit-embed", reinit="all", seed=1)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = spikepatch.plan(model, "unit-embed", reinit="all", seed=1)
    assert [type(edit) for edit in plan.edits] == [Fill] * len(plan.edits)
    spikepatch.patch(model, plan)
    assert all(torch.equal(first[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_a_std_without_sense(std: float) -> None:
    with pytest.raises(Refused, match="std of an embedding must be a positive number"):
        EmbedInit(std)


def test_no_embedding_no_edit() -> None:
    residual = dataclasses.replace(spikepatch.inspect(tiny_model("gpt2")), embeddings=())
    assert list(EmbedInit()(residual, Context("all"))) == []
