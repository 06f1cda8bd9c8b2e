"""A plan on a live model: what changes, what stays, and that a refusal leaves every bit where it was."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import spikepatch
from spikepatch.errors import BadTarget, Refused
from spikepatch.plans.plan import Plan, Skip
from spikepatch.runtime.embedding import patched_embeddings
from tests import ROOT
from tests.architectures import ids, tiny_config, tiny_model
from tests.folders import hashes
from tests.residual.test_stream import EXAMPLE, Model


def fingerprint(model: Any) -> dict[str, Any]:
    """Everything that a patch could change: classes, tensors and their identity, attributes, the config."""
    tensors = {
        name: (id(t), t.dtype, t.device, t.requires_grad, None if t.is_meta else t.detach().clone())
        for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    }
    modules = {name: (id(m), type(m), sorted(vars(m)), m.training) for name, m in model.named_modules()}
    config = model.config.to_dict() if hasattr(model, "config") else None
    return {"tensors": tensors, "modules": modules, "config": copy.deepcopy(config), "rng": torch.get_rng_state()}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["tensors"].keys() == after["tensors"].keys()
    assert before["tensors"]
    for name, (*facts, value) in before["tensors"].items():
        *facts_after, value_after = after["tensors"][name]
        assert facts == facts_after, name
        assert value is None or torch.equal(value, value_after), name
    assert before["modules"] == after["modules"]
    assert before["config"] == after["config"]
    assert torch.equal(before["rng"], after["rng"])


def refused(model: Any, plan: Plan | str, match: str, **options: Any) -> None:
    before = fingerprint(model)
    with pytest.raises(Refused, match=match):
        spikepatch.patch(model, plan, **options)
    assert_same(before, fingerprint(model))


@functools.cache
def plan_of(model_type: str = "gpt2", recipe: str = "scaled-embed", **options: Any) -> Plan:
    return spikepatch.plan(tiny_model(model_type), recipe, **{"reinit": "all"} | options)


# What changes and what stays.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["scaled-embed", "embed-ln", "vanilla"])
def test_identity_and_flags_stay(recipe: str, dtype: torch.dtype) -> None:
    model: Any = tiny_model("gpt2").to(dtype).train()
    model.transformer.h[1].requires_grad_(False)
    before = fingerprint(model)
    returned: Any = spikepatch.patch(model, recipe, reinit="all")
    assert returned is model
    after = fingerprint(model)
    for name, (identity, kind, device, grad, _) in before["tensors"].items():
        assert after["tensors"][name][:4] == (identity, kind, device, grad), name
    assert {name for name in after["tensors"] if name not in before["tensors"]} == (
        {"transformer.wte.norm.weight", "transformer.wte.norm.bias"} if recipe == "embed-ln" else set()
    )
    assert model.training
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(before["rng"], after["rng"])
    assert all(p.dtype == dtype for p in model.parameters())
    with torch.no_grad():
        assert bool(model.eval()(ids(model)).logits.isfinite().all())


def test_bfloat16_is_the_rounded_float32() -> None:
    wide, narrow = tiny_model("mixtral"), tiny_model("mixtral").bfloat16()
    for model in (wide, narrow):
        spikepatch.patch(model, "scaled-embed", reinit="all", seed=4)
    checked = 0
    for name, value in wide.named_parameters():
        assert torch.equal(value.bfloat16(), narrow.get_parameter(name)), name
        checked += 1
    assert checked


def test_a_plan_from_json() -> None:
    first, second = tiny_model("gpt2"), tiny_model("gpt2")
    plan = plan_of(seed=3, untie=True)
    spikepatch.patch(first, plan)
    spikepatch.patch(second, Plan.from_dict(json.loads(plan.to_json())))
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    assert first.config.to_dict() == second.config.to_dict()


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_a_plan_from_a_source_gives_the_same_bits(model_type: str, tmp_path: Path) -> None:
    tiny_config(model_type).save_pretrained(tmp_path)
    first, second = tiny_model(model_type), tiny_model(model_type)
    spikepatch.patch(first, spikepatch.plan(str(tmp_path), "embed-ln", reinit="all", seed=3))
    spikepatch.patch(second, "embed-ln", reinit="all", seed=3)
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())


def test_old_values_do_not_matter_with_reinit_all() -> None:
    first, second = tiny_model("gpt_neox"), tiny_model("gpt_neox")
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.fill_(float("nan"))
    for model in (first, second):
        spikepatch.patch(model, "vanilla", reinit="all")
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())


def test_kept_weights_stay_to_the_bit() -> None:
    model = tiny_model("gpt2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    spikepatch.patch(model, "scaled-embed", reinit="residual")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "c_proj.weight" in name}


@pytest.mark.parametrize("recipe", ["scaled-embed", "vanilla"])
def test_the_config_records_the_plan(recipe: str, tmp_path: Path) -> None:
    """So that a folder tells what was done, whoever saved it; the same record as the applier on disk leaves."""
    model, plan = tiny_model("gpt2"), plan_of(recipe=recipe)
    spikepatch.patch(model, plan)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["spikepatch"]
    assert bool(record.pop("original")) is plan.structural  # what a generated class replaces in the config
    assert plan.record(spikepatch.__version__).items() <= record.items()


# Refusals.


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize(("recipe", "untie"), [("scaled-embed", True), ("scaled-embed", False), ("vanilla", False)])
def test_the_config_that_a_model_was_built_from_stays(recipe: str, untie: bool, model_type: str) -> None:
    untie = untie and model_type == "gpt2"
    config = tiny_config(model_type)
    auto = AutoModelForSeq2SeqLM if model_type == "t5" else AutoModelForCausalLM
    model = auto.from_config(config)
    before = config.to_dict()
    spikepatch.patch(model, recipe, reinit="all", untie=untie)

    assert config.to_dict() == before
    assert type(config) is type(tiny_config(model_type))
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    assert id(config) not in configs
    baseline = auto.from_config(config)
    assert type(baseline) is type(auto.from_config(tiny_config(model_type)))
    assert not patched_embeddings(baseline)
    assert type(copy.deepcopy(model)) is type(model)


def test_reinit_has_no_default() -> None:
    refused(tiny_model("gpt2"), "scaled-embed", r"needs reinit=(.|\n)*not guessed")


@pytest.mark.parametrize("options", [{}, {"untie": True}])
def test_another_architecture(options: dict[str, Any]) -> None:
    refused(tiny_model("llama"), plan_of(**options), "the plan is for GPT2LMHeadModel, the model is a LlamaForCausalLM")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_layer": 4, "num_hidden_layers": 4}, r"does not mention transformer\.h\.3"),
        ({"n_layer": 2, "num_hidden_layers": 2}, r"it has no transformer\.h\.2"),
        ({"n_embd": 128, "hidden_size": 128}, "for a stream of width 64"),
        ({"tie_word_embeddings": False}, r"does not mention lm_head\.weight"),
    ],
)
def test_another_size(changes: dict[str, Any], match: str) -> None:
    refused(tiny_model("gpt2", **changes), plan_of(), match)


def test_untying_what_is_not_tied() -> None:
    """With kept weights the head would be overwritten by a copy of the embedding."""
    plan = plan_of(recipe="vanilla", reinit="none", untie=True)
    skips = (*plan.skips, Skip("lm_head.weight", "learned, kept"))
    refused(tiny_model("gpt2", tie_word_embeddings=False), dataclasses.replace(plan, skips=skips), "is not tied to")


@pytest.mark.parametrize("reinit", ["residual", "none"])
def test_nothing_learned_to_keep(reinit: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
    refused(model, plan_of(reinit=reinit), "nothing learned to keep")
    refused(model, "scaled-embed", "nothing learned to keep", reinit=reinit)


def test_a_part_on_the_meta_device() -> None:
    model: Any = tiny_model("gpt2")
    model.transformer.h[2].to("meta")
    refused(model, plan_of(), "some of its parameters are on the meta device, and others are not")


def test_integer_weights() -> None:
    model: Any = tiny_model("gpt2")
    weight = model.transformer.h[0].mlp.c_fc.weight
    model.transformer.h[0].mlp.c_fc.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    refused(model, plan_of(), "quantised")


def test_weights_that_are_no_plain_tensors() -> None:
    class Packed(torch.Tensor):
        pass

    model: Any = tiny_model("gpt2")
    layer = model.transformer.h[0].mlp.c_fc
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    refused(model, plan_of(), "Packed, not plain tensors")


def test_not_contiguous() -> None:
    model: Any = tiny_model("gpt2")
    layer = model.transformer.h[0].mlp.c_fc
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    refused(model, plan_of(), "not contiguous")


def test_a_forward_that_was_replaced() -> None:
    model: Any = tiny_model("gpt2")
    model.transformer.wte.forward = model.transformer.wte.forward
    refused(model, plan_of(), "replaced on the instance")


@pytest.mark.parametrize("untie", [False, True])
def test_a_tensor_that_no_code_explains(untie: bool, caplog: pytest.LogCaptureFixture) -> None:
    """In memory it is kept, and listed; of structure alone it is refused before anything has changed."""

    def with_another() -> Any:
        model: Any = tiny_model("gpt2")
        model.transformer.h[2].forgotten = nn.Parameter(torch.linspace(0, 1, 64))
        return model

    model = with_another()
    spikepatch.patch(model, "scaled-embed", reinit="all", untie=untie)
    assert torch.equal(model.transformer.h[2].forgotten, torch.linspace(0, 1, 64))
    assert re.findall(r"how they began: (.*)", caplog.text) == ["transformer.h.2.forgotten"]
    empty = with_another().to("meta")
    empty.tie_weights()
    plan = spikepatch.plan(empty, "scaled-embed", reinit="all", untie=untie)
    refused(empty, plan, r"transformer\.h\.2\.forgotten.*nothing tells")


def test_a_class_that_is_not_transformers_own() -> None:
    """A generated class could not import it; found out before the head is untied."""
    model: Any = tiny_model("gpt2")
    model.__class__ = type("Custom", (type(model),), {"__module__": __name__})
    plan = spikepatch.plan(model, "scaled-embed", reinit="all", untie=True)
    refused(model, plan, "not part of transformers")


@pytest.mark.parametrize("first", ["scaled-embed", "embed-ln"])
@pytest.mark.parametrize("second", ["scaled-embed", "embed-ln", "vanilla"])
def test_twice(first: str, second: str) -> None:
    model = tiny_model("gpt2")
    spikepatch.patch(model, first, reinit="none")
    refused(model, second, r"patched already(.|\n)*transformer\.wte", reinit="all")
    refused(model, plan_of(recipe=second), "patched already")


def test_twice_after_loading(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    spikepatch.patch(model, "scaled-embed", reinit="all")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    refused(loaded, "scaled-embed", "patched already", reinit="all")


def test_a_plain_module_twice() -> None:
    model = Model()
    spikepatch.patch(model, "scaled-embed", reinit="residual", example_inputs=EXAMPLE)
    refused(model, "scaled-embed", r"patched already(.|\n)*tokens", reinit="residual", example_inputs=EXAMPLE)


def test_after_new_weights_alone_a_patch_is_fine() -> None:
    """Nothing of the first one is in the forward pass."""
    model: Any = tiny_model("gpt2")
    spikepatch.patch(model, "vanilla", reinit="all")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    spikepatch.patch(model, "scaled-embed", reinit="none")
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert model.config.spikepatch["recipe"] == "scaled-embed"


# Saving.


@pytest.mark.parametrize(("recipe", "storage"), [("scaled-embed", "code"), ("vanilla", "plain")])
def test_save(recipe: str, storage: str, tmp_path: Path) -> None:
    model, plan = tiny_model("gpt2"), plan_of(recipe=recipe)
    spikepatch.patch(model, plan)
    out = spikepatch.save(model, tmp_path / "out")
    manifest = json.loads((out / "spikepatch.json").read_text())
    assert Plan.from_dict(manifest["plan"]) == plan
    assert manifest["storage"] == storage
    assert manifest["files"] == {name: digest for name, digest in hashes(out).items() if name != "spikepatch.json"}
    assert manifest["files"]
    assert "AutoModelForCausalLM.from_pretrained" in (out / "README.md").read_text()
    stored = load_file(out / "model.safetensors")
    assert all(torch.equal(model.get_parameter(name), value) for name, value in stored.items())
    assert {p.stat().st_mode for p in out.iterdir()} == {(out / "config.json").stat().st_mode}
    with pytest.raises(BadTarget, match="not empty"):
        spikepatch.save(model, out)


def test_the_card_names_the_class_that_loads(tmp_path: Path) -> None:
    from transformers import AutoModel

    for auto, name in ((AutoModel, "AutoModel"), (AutoModelForCausalLM, "AutoModelForCausalLM")):
        for recipe in ("vanilla", "scaled-embed"):
            model = auto.from_config(tiny_config("gpt2"))
            spikepatch.patch(model, recipe, reinit="all")
            card = (spikepatch.save(model, tmp_path / name / recipe) / "README.md").read_text()
            assert f"from transformers import {name}\n" in card


@pytest.mark.parametrize("build", [lambda: tiny_model("gpt2"), Model])
def test_save_refuses_what_was_not_patched(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no plan to record"):
        spikepatch.save(build(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_a_plain_module(tmp_path: Path) -> None:
    model = Model()
    spikepatch.patch(model, "vanilla", reinit="residual", example_inputs=EXAMPLE)
    with pytest.raises(Refused, match="no save_pretrained"):
        spikepatch.save(model, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1000, 100_000], ids=["config", "weights"])
def test_save_on_a_full_disk(limit: int, tmp_path: Path) -> None:
    """A limit of the size of files stands for it, in a process of its own."""
    script = f"""
import resource, signal, sys
from pathlib import Path
import spikepatch
from tests.architectures import tiny_model
model = tiny_model("gpt2")
spikepatch.patch(model, "scaled-embed", reinit="all")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    spikepatch.save(model, sys.argv[1])
except spikepatch.BadTarget as error:
    print(error)
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the output cannot be written" in done.stdout
    assert "free space" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_loading_keeps_what_was_drawn(tmp_path: Path) -> None:
    """transformers divides mamba's output projections by sqrt(N) whenever it loads them, unless a flag is off."""
    model = tiny_model("mamba", rescale_prenorm_residual=True)
    spikepatch.patch(model, "vanilla", reinit="all")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    checked = 0
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
        checked += 1
    assert checked > 10
