"""Parameter groups: every parameter in exactly one, by rank and by the recipe, never by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import spikepatch
from spikepatch.errors import Refused
from tests.architectures import ids, tiny_model
from tests.residual.maps import TYPES


def names(model: nn.Module, group: dict[str, Any]) -> set[str]:
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_identity[id(parameter)] for parameter in group["params"]}


@pytest.mark.parametrize("model_type", TYPES)
def test_every_parameter_once(model_type: str) -> None:
    model = tiny_model(model_type)
    decayed, others = spikepatch.param_groups(model)
    both = [*decayed["params"], *others["params"]]
    assert len(both) == len({id(p) for p in both}) == len(list(model.parameters()))
    assert {id(p) for p in both} == {id(p) for p in model.parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"])
    residual = spikepatch.inspect(model)
    matrices = {matrix.parameter for matrix in residual.matrices} | {e.parameter for e in residual.embeddings}
    assert len(matrices) > 6
    assert matrices <= names(model, decayed)
    norms = {norm.parameter for norm in residual.norms} - {None}
    assert norms <= names(model, others)


@pytest.mark.parametrize(
    ("model_type", "names_of_layer"),
    [
        ("mamba", ["backbone.layers.{}.mixer.A_log"]),
        ("gpt_oss", ["model.layers.{}.mlp.experts.down_proj_bias", "model.layers.{}.mlp.experts.gate_up_proj_bias"]),
    ],
)
def test_what_has_two_dimensions_and_is_no_matrix(model_type: str, names_of_layer: list[str]) -> None:
    """By the map: nothing is multiplied with it. Everything else with two dimensions decays."""
    model = tiny_model(model_type)
    spikepatch.patch(model, "vanilla", reinit="all")
    _, others = spikepatch.param_groups(model)
    expected = {name.format(layer) for name in names_of_layer for layer in range(3)}
    assert {name for name in names(model, others) if model.get_parameter(name).ndim > 1} == expected


def test_the_mark_of_state_space_libraries() -> None:
    model = nn.Linear(3, 3)
    model.weight._no_weight_decay = True  # type: ignore[attr-defined]
    (group,) = spikepatch.param_groups(model)
    assert len(group["params"]) == 2
    assert group["weight_decay"] == 0.0


@pytest.mark.parametrize(("recipe", "decay"), [("unit-embed", False), ("olmo2-init", False), ("scaled-embed", True)])
def test_embeddings_as_the_recipe_says(recipe: str, decay: bool) -> None:
    model = tiny_model("gpt2")
    spikepatch.patch(model, recipe, reinit="all")
    decayed, others = spikepatch.param_groups(model, weight_decay=0.3)
    assert decayed["weight_decay"] == 0.3
    tables = {"transformer.wte.weight", "transformer.wpe.weight"}
    assert (tables <= names(model, decayed)) is decay
    assert (tables <= names(model, others)) is not decay
    assert ("lm_head.weight" in names(model, decayed)) is (recipe == "unit-embed")


def test_a_plan_of_ones_own_choice() -> None:
    model = tiny_model("gpt2")
    plan = spikepatch.plan(model, "olmo2-init", reinit="all")
    assert "transformer.wte.weight" in names(model, spikepatch.param_groups(model)[0])
    assert "transformer.wte.weight" in names(model, spikepatch.param_groups(model, plan=plan)[1])


@pytest.mark.parametrize("storage", ["plain", "code"])
def test_a_model_loaded_from_a_patched_folder(storage: Any, tmp_path: Path) -> None:
    """The record in the config says it, with and without the head."""
    tiny_model("gpt2").save_pretrained(tmp_path / "source")
    spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", recipe="olmo2-init", storage=storage)
    for auto, prefix in ((AutoModelForCausalLM, "transformer."), (AutoModel, "")):
        model = auto.from_pretrained(tmp_path / "out", trust_remote_code=True)
        decayed, others = spikepatch.param_groups(model)
        assert {f"{prefix}wte.weight", f"{prefix}wpe.weight"} <= names(model, others)
        assert f"{prefix}h.0.mlp.c_fc.weight" in names(model, decayed)


def test_a_plain_module_trains_with_them() -> None:
    """AdamW takes the groups; with gradients of zero one step multiplies what decays by 1 - lr * 0.1, and only that."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(spikepatch.param_groups(model), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if name in {"0.weight", "2.weight"} else 1.0
        assert torch.equal(parameter.detach(), before[name] * factor), name


def test_a_patched_model_trains_with_them() -> None:
    model: Any = tiny_model("gpt2").train()
    spikepatch.patch(model, "unit-embed", reinit="all")
    optimiser = torch.optim.AdamW(spikepatch.param_groups(model), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(ids(model), labels=ids(model)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_groups_are_not_empty() -> None:
    assert len(spikepatch.param_groups(nn.LayerNorm(4))) == 1
    assert spikepatch.param_groups(nn.ReLU()) == []


def test_a_wrapper_hides_the_names() -> None:
    model = tiny_model("gpt2")
    spikepatch.patch(model, "olmo2-init", reinit="all")
    wrapper = nn.Sequential(model)
    wrapper.config = model.config
    with pytest.raises(Refused, match=r"not in this model(.|\n)*transformer\.wte\.weight(.|\n)*not a wrapper"):
        spikepatch.param_groups(wrapper)
