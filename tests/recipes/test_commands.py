"""Recipes on their way through the commands, and into generated classes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

import spikepatch
from spikepatch.cli import main
from spikepatch.plans.plan import Fill
from spikepatch.recipes.built_in import RECIPES
from spikepatch.recipes.files import read_recipe
from tests.architectures import tiny_config, tiny_model
from tests.recipes.test_built_in import TEXT, write

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_generated_class_draws_what_the_recipe_would(name: str, model_type: str, tmp_path: Path) -> None:
    """For a config of twice the width and depth: compared with a plan that is made for such a model."""
    tiny_config(model_type).save_pretrained(tmp_path / "source")
    spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", recipe=name, storage="code")
    larger = {"hidden_size": 128, "num_hidden_layers": 6, "intermediate_size": 192, "head_dim": 32}
    changes = {key: value for key, value in larger.items() if hasattr(tiny_config(model_type), key)}
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    plan = spikepatch.plan(tiny_model(model_type, **changes), name, reinit="all")
    fills = plan.select(Fill)
    assert len(fills) >= 6 * 4
    for fill in fills:
        weight = fresh.get_parameter(fill.parameter).detach().double()
        assert abs(float(weight.std()) / fill.std - 1) < 6 / math.sqrt(2 * weight.numel()), fill.parameter
        assert fill.distribution == "normal" or float(weight.abs().max()) <= fill.cut * fill.size * (1 + EPS)


def test_a_file_by_the_command(tmp_path: Path) -> None:
    """From the file to the manifest: the name travels, and the same plan comes from the object."""
    tiny_config("gpt2").save_pretrained(tmp_path / "source")
    recipe = write(tmp_path, TEXT)
    out = tmp_path / "out"
    arguments = ["convert", str(tmp_path / "source"), str(out), "--recipe", str(recipe), "--seed", "3"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    manifest = json.loads((out / "spikepatch.json").read_text())
    assert manifest["plan"]["recipe"] == "scaled-002"
    assert f"--recipe {recipe.name}" in manifest["command"]
    record = json.loads((out / "config.json").read_text())["spikepatch"]
    assert record["recipe"] == "scaled-002"
    assert record["no_decay"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    plan = spikepatch.plan(str(tmp_path / "source"), read_recipe(recipe), reinit="all", seed=3)
    assert manifest["plan"] == json.loads(plan.to_json()) | {"source": "source"}


def test_an_own_recipe_by_the_command(own_module: str) -> None:
    result = CliRunner().invoke(main, ["convert", "arch:gpt2", "out", "--recipe", f"{own_module}:RECIPE", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "std 0.24: 1 parameters, such as transformer.h.11.mlp.c_proj.weight" in result.output
    assert not Path("out").exists()
