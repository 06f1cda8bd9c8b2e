"""Weights by name, bit for bit those of a loaded, patched or initialised model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import spikepatch
from spikepatch.plans.plan import Reinit
from spikepatch.preflight.subject import Subject, of_model, of_source, to_plan_on, with_recipe
from spikepatch.recipes.request import Request, parse_request
from spikepatch.source.meta import build_meta
from spikepatch.source.open import open_source
from tests.architectures import tiny_config, tiny_model


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_of_a_checkpoint(model_type: str, save_tiny: Callable[..., Path]) -> None:
    """Mixtral's experts are one tensor in memory and one each on disk."""
    config = tiny_config(model_type).to_diff_dict()
    config.pop("model_type")
    folder = save_tiny(model_type, **config)
    subject = of_source(open_source(str(folder), weights=True), seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert subject.about == f"stored in {folder}"
    names = [name for name, _ in model.named_parameters()]
    assert len(names) > 10
    for name in names:
        assert torch.equal(subject.weights(name), model.get_parameter(name)), name


def planned_for(model: PreTrainedModel, request: Request) -> Subject:
    base = of_model(model, request.seed)
    return with_recipe(base, to_plan_on(base, None, None, reinit=request.reinit, example=None), request)


@pytest.mark.parametrize("reinit", ["all", "residual", "none"])
@pytest.mark.parametrize(("model_type", "recipe"), [("gpt2", "scaled-embed"), ("llama", "embed-ln")])
def test_of_a_recipe(model_type: str, recipe: str, reinit: Reinit) -> None:
    """What is measured is what ``patch`` makes."""
    model = tiny_model(model_type)
    patched = spikepatch.patch(copy.deepcopy(model), recipe, reinit=reinit, seed=3)
    subject = planned_for(model, parse_request(recipe, reinit=reinit, seed=3))
    names = [name for name, _ in patched.named_parameters()]
    assert names == [name for name, _ in subject.structure.named_parameters()]
    for name in names:
        assert torch.equal(subject.weights(name), patched.get_parameter(name)), name


def test_of_an_untied_head() -> None:
    model = tiny_model("gpt2")
    subject = planned_for(model, parse_request("scaled-embed", reinit="none", untie=True))
    table = model.get_parameter("transformer.wte.weight")
    assert torch.equal(subject.weights("lm_head.weight"), table)
    assert dict(model.named_parameters(remove_duplicate=False))["lm_head.weight"] is table  # the model is as it was


def test_of_an_architecture() -> None:
    """The architecture's own initialiser; newer versions of transformers scale GPT-2's residual projections by it."""
    config = tiny_config("gpt2")
    model = build_meta(type(tiny_model("gpt2")), config, where="gpt2")
    subject = of_model(model, seed=0)
    again = of_model(build_meta(type(model), config, where="gpt2"), seed=0)
    names = [name for name, _ in model.named_parameters()]
    assert all(torch.equal(subject.weights(name), again.weights(name)) for name in reversed(names))
    name, elements = "transformer.h.1.mlp.c_proj.weight", 4 * 64 * 64
    theirs = float(tiny_model("gpt2").state_dict()[name].std())
    # Five standard errors of each.
    assert float(subject.weights(name).std()) == pytest.approx(theirs, rel=2**0.5 * 5 / (2 * elements) ** 0.5)
