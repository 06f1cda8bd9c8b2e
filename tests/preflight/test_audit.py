"""``spikepatch audit`` and ``spikepatch.audit``: sources, what a team expects, what a CI server reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import spikepatch
from spikepatch.cli import main
from tests.architectures import tiny_config, tiny_model


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["audit", *words])


def broken(model_type: str) -> PreTrainedModel:
    model: Any = tiny_model(model_type)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.zero_()
        model.model.layers[2].input_layernorm.weight.fill_(0.0)
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_folder_is_audited_as_the_loaded_model(model_type: str, tmp_path: Path) -> None:
    """Experts are stored apart, and fused in memory."""
    broken(model_type).save_pretrained(tmp_path / "source")
    stored = spikepatch.audit(str(tmp_path / "source"))
    loaded = spikepatch.audit(AutoModelForCausalLM.from_pretrained(tmp_path / "source"))
    assert {f.name for f in stored.at_least("at-risk")} == {"zero", "gain"}
    assert [(f.name, f.severity, f.parameters) for f in stored.findings] == [
        (f.name, f.severity, f.parameters) for f in loaded.findings
    ]


def test_without_weights_its_own_initialiser_is_audited(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    audit = spikepatch.audit(str(tmp_path))
    assert audit.at_least("at-risk") == ()
    assert "initialiser" in audit.weights
    assert audit.scheme == "std 0.02" or audit.scheme.startswith("std 0.0")


def test_erased_buffers_of_a_checkpoint(save_tiny: Callable[..., Path]) -> None:
    """Persistent ones are read from the file."""
    folder = save_tiny("gpt2", n_embd=64, n_layer=3, n_head=4, vocab_size=500, bos_token_id=0, eos_token_id=0)
    assert spikepatch.audit(str(folder)).at_least("at-risk") == ()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["scaled-embed", "xavier", "embed-ln"])
def test_what_follows_a_recipe_is_as_expected(recipe: str) -> None:
    model = spikepatch.patch(tiny_model("gpt2"), recipe, reinit="all", seed=3)
    base = tiny_model("gpt2")
    plan = spikepatch.plan(base, recipe, reinit="all")
    assert plan.written
    wrong = spikepatch.audit(base, expect=recipe).findings
    assert {f.name for f in wrong} >= {"not-as-planned"}
    values = {name: p for name, p in model.named_parameters() if name in dict(base.named_parameters())}
    with torch.no_grad():
        for name, p in base.named_parameters():
            p.copy_(values.get(name, p))
    left = [f for f in spikepatch.audit(base, expect=recipe).findings if f.name == "not-as-planned"]
    assert all("embedding" in f.expected for f in left)  # its values are right; the factor or norm is in the forward
    assert len(left) == (recipe != "xavier")


def test_one_layer_that_is_not_as_expected() -> None:
    model: Any = tiny_model("llama")
    spikepatch.patch(model, "vanilla", reinit="all")
    assert [f for f in spikepatch.audit(model, expect="vanilla").findings if f.severity != "note"] == []
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.3)
    (fault,) = [f for f in spikepatch.audit(model, expect="vanilla").findings if f.name == "not-as-planned"]
    assert fault.parameters == ("model.layers.1.mlp.up_proj.weight",)
    assert "1.3" in fault.measured


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("broken")
    broken("llama").save_pretrained(folder)
    return str(folder)


def test_what_is_printed(source: str) -> None:
    done = run(source)
    assert done.exit_code == 0, done.output
    assert f"{source}: at-risk" in done.stdout
    for words in ("model.layers.1.self_attn.q_proj.weight", "the gain of the norm is zero", "remedy: ", "expected "):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80
    assert run(source, "-q").stdout == f"{source}: at-risk\n"


def test_json_has_every_finding(source: str) -> None:
    data = json.loads(run(source, "--json").stdout)
    fields = {f.name for f in dataclasses.fields(spikepatch.Audit)}
    assert data.keys() == fields
    assert {"severity", "parameters", "what", "expected", "measured", "remedy"} <= data["findings"][0].keys()
    both = json.loads(run(source, source, "--json").stdout)
    assert [each["findings"] for each in both] == [data["findings"]] * 2


def test_formats_of_ci(source: str) -> None:
    lines = run(source, "--format", "github").stdout.splitlines()
    assert lines
    assert all(line.startswith(("::warning title=", "::notice title=")) for line in lines)
    root = ElementTree.fromstring(run(source, "--format", "junit").stdout.encode())
    (suite,) = root
    assert int(suite.attrib["failures"]) == len(root.findall(".//failure")) == 2
    assert int(suite.attrib["tests"]) == len(suite)


@pytest.mark.parametrize(
    ("words", "code"),
    [([], 0), (["--fail-on", "at-risk"], 1), (["--fail-on", "unstable"], 0), (["--expect", "nothing"], 2)],
)
def test_exit_codes(source: str, words: list[str], code: int) -> None:
    assert run(source, *words).exit_code == code


@pytest.mark.slow
def test_it_is_the_first_part_of_a_check(source: str) -> None:
    done = CliRunner().invoke(main, ["check", source, "--tokens", "12", "--json"])
    data = json.loads(done.stdout)
    assert data["verdict"] != "stable"
    assert data["audit"]["findings"] == json.loads(run(source, "--json").stdout)["findings"]
    several = CliRunner().invoke(main, ["check", source, source, "--tokens", "12", "--json"])
    assert [each["verdict"] for each in json.loads(several.stdout)] == [data["verdict"]] * 2


@pytest.mark.parametrize(("share", "which"), [(0.9, "fourth"), (0.1, "second")])
def test_of_a_large_model_without_weights_the_first_layers_are_drawn(
    share: float, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config("llama", num_hidden_layers=5))
    total = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr("spikepatch.preflight.audit._WHOLE", int(share * total))
    found = spikepatch.audit(model)
    assert which in found.not_said[0]
    assert found.at_least("at-risk") == ()
    assert found.scheme


@pytest.mark.slow
def test_trained_weights_are_left_alone(smollm2: Path, minilm: Path) -> None:
    for folder in (smollm2, minilm):
        found = spikepatch.audit(str(folder))
        assert found.learned
        assert found.findings == ()
