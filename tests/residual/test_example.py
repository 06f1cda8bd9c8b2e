"""What a forward pass is run on: a dict of tensors, or ``module:NAME`` of one or of a function that makes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig

import spikepatch
from spikepatch.cli import main
from tests.architectures import tiny_model

MODULE = """
import torch

ids = torch.arange(5, 16)[None]
plain = {"input_ids": ids}
odd = {"input_ids": [1, 2]}


def entities(model):
    assert model.config.model_type == "luke"
    two = torch.ones(1, 2, dtype=torch.long)
    where = torch.tensor([[[1, 2, -1], [3, 4, 5]]])
    return {"input_ids": ids, "entity_ids": two, "entity_attention_mask": two, "entity_position_ids": where,
            "entity_token_type_ids": 0 * two}


def broken(model):
    raise ValueError("no such size")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"inputs_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.fixture
def luke(tmp_path: Path) -> str:
    """Some of its matrices read entities only, which tokens alone do not bring."""
    config = AutoConfig.for_model(
        "luke", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=60,
        entity_vocab_size=20, entity_emb_size=16, max_position_embeddings=32, architectures=["LukeModel"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "luke")
    return str(tmp_path / "luke")


def test_the_remedy_of_a_map_for_such_inputs_only(luke: str, module: str) -> None:
    """Refused; as its remedy says, planned, converted and checked; the manifest's command says with which inputs."""
    run = CliRunner().invoke(main, ["convert", luke, "out", "--recipe", "vanilla"])
    assert run.exit_code == 2
    assert "--example-inputs module:NAME" in run.output
    assert "entity" not in run.output or "query" in run.output
    given = ["--example-inputs", f"{module}:entities"]
    run = CliRunner().invoke(main, ["inspect", luke, "--json", *given])
    assert json.loads(run.stdout)["conditions"] == []
    run = CliRunner().invoke(main, ["convert", luke, "out", "--recipe", "vanilla", *given])
    assert run.exit_code == 0, run.output
    command = json.loads(Path("out/spikepatch.json").read_text())["command"]
    assert command.endswith(f"--example-inputs {module}:entities")
    planned = spikepatch.plan(luke, "vanilla", reinit="all", example_inputs=f"{module}:entities")
    assert {"encoder.layer.0.attention.self.e2e_query.weight"} < {edit.parameter for edit in planned.edits}  # type: ignore[union-attr]
    run = CliRunner().invoke(main, ["check", luke, "--json", *given])
    assert run.exit_code == 0, run.output


def test_a_dict_and_a_function_and_its_name_are_the_same(module: str) -> None:
    model = tiny_model("gpt2")
    expected = spikepatch.inspect(model)
    assert spikepatch.inspect(model, example_inputs=f"{module}:plain") == expected
    assert spikepatch.inspect(model, example_inputs={"input_ids": torch.arange(5, 16)[None]}) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "cannot be imported"), ("broken", "ValueError: no such size"), ("odd", "it holds one of type list"),
        ("ids", "it is of type Tensor"),
    ],
)  # fmt: skip
def test_what_is_no_example(module: str, name: str, words: str) -> None:
    with pytest.raises(spikepatch.Refused, match=words) as refused:
        spikepatch.inspect(tiny_model("gpt2"), example_inputs=f"{module}:{name}")
    assert f"{module}:{name}" in str(refused.value)
