"""What is rendered for an architecture: whole files of known imports, whatever its classes and type are called."""

from __future__ import annotations

import ast
import dataclasses
import importlib.resources
import sys

import pytest
import transformers
from transformers import (
    BartForCausalLM,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    MistralForCausalLM,
    OPTForCausalLM,
    T5ForConditionalGeneration,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from spikepatch.apply.generated.render import config_entries, module_name, render
from spikepatch.errors import Refused
from spikepatch.source.classes import Original, original_of

STAND_INS = ("GPT2", "gpt2", "PatchedModel", "PatchedConfig", "PatchedForCausalLM", "type: ignore")


@pytest.mark.parametrize(
    ("model_class", "auto_class", "base"),
    [
        (GPT2LMHeadModel, "AutoModelForCausalLM", "GPT2Model"),
        (BertForMaskedLM, "AutoModelForMaskedLM", "BertModel"),
        (T5ForConditionalGeneration, "AutoModelForSeq2SeqLM", "T5Model"),
        (BartForCausalLM, "AutoModelForCausalLM", "BartModel"),
        (BertModel, "AutoModel", None),
        (BertForSequenceClassification, "AutoModelForSequenceClassification", "BertModel"),
    ],
)
def test_architectures_are_found_through_the_auto_classes(model_class: type, auto_class: str, base: str | None) -> None:
    original = original_of(model_class)
    assert original.auto_class == auto_class
    assert (original.base.__name__ if original.base else None) == base


@pytest.mark.parametrize("model_class", [OPTForCausalLM, BertModel, T5ForConditionalGeneration, BartForCausalLM])
def test_nothing_of_the_template_is_left(model_class: type) -> None:
    original = original_of(model_class)
    text = render(original)[f"{module_name(original)}.py"]
    assert not [word for word in STAND_INS if word in text]
    classes = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    originals = [original.config, original.base, original.model]
    assert classes == [f"Spikepatch{original.__name__}" for original in originals if original is not None]
    assert f"{original.auto_class}.from_pretrained" in text


def test_the_generated_files_are_flat_and_import_torch_and_transformers_only() -> None:
    files = render(original_of(OPTForCausalLM))
    assert set(files) == {
        "modeling_spikepatch_opt.py",
        "spikepatch_embedding.py",
        "spikepatch_fresh.py",
        "spikepatch_model.py",
    }
    imported = set()
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                imported.add("." * node.level + (node.module or "").split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
    assert imported - sys.stdlib_module_names == {
        "torch", "transformers", ".spikepatch_embedding", ".spikepatch_fresh", ".spikepatch_model"
    }  # fmt: skip


def test_the_runtime_is_copied_but_for_the_names_of_its_files() -> None:
    files = render(original_of(OPTForCausalLM))
    for name in ("embedding", "fresh", "model"):
        runtime = (importlib.resources.files("spikepatch.runtime") / f"{name}.py").read_text()
        assert files[f"spikepatch_{name}.py"].replace("from .spikepatch_", "from .") == runtime


def test_the_gpt2_file_is_the_template() -> None:
    template = (importlib.resources.files("spikepatch.runtime") / "template.py").read_text()
    tree = ast.parse(template)
    generated = ast.parse(render(original_of(GPT2LMHeadModel))["modeling_spikepatch_gpt2.py"])
    assert len(template.splitlines()) <= 80
    assert [type(node) for node in ast.walk(tree)] == [type(node) for node in ast.walk(generated)]


@pytest.mark.parametrize("model_type", ["qwen2-vl", "gpt-sw3", 'a"b', "a'\nimport os\n'", "été", "../up", "class"])
def test_any_model_type_stays_data(model_type: str) -> None:
    original = original_of(GPT2LMHeadModel)
    config = type("OddConfig", (original.config,), {"model_type": model_type, "__module__": "transformers.odd"})
    original = dataclasses.replace(original, config=config)
    module = module_name(original)
    assert module.isidentifier()
    tree = ast.parse(render(original)[f"{module}.py"])
    assigned = [
        n.value.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)
    ]
    assert assigned == [f"spikepatch_{model_type}"] == [config_entries(original)["model_type"]]


@pytest.mark.parametrize("name", ["A:\n    import os\nclass B", "A(B)", "class", "1A", "", 'A"""'])
@pytest.mark.parametrize("field", ["model", "base", "config"])
def test_a_name_that_is_no_identifier_never_becomes_code(name: str, field: str) -> None:
    original = original_of(GPT2LMHeadModel)
    hostile = type(name, (object,), {"model_type": "gpt2", "__module__": "transformers.models.gpt2.modeling_gpt2"})
    with pytest.raises(Refused, match="cannot be imported by its name"):
        render(dataclasses.replace(original, **{field: hostile}))  # type: ignore[arg-type]


def test_a_module_path_that_is_no_identifier_never_becomes_code() -> None:
    hostile = type("A", (object,), {"__module__": "transformers; import os"})
    with pytest.raises(Refused, match="cannot be imported by its name"):
        render(dataclasses.replace(original_of(GPT2LMHeadModel), model=hostile))


@pytest.mark.parametrize("stem", ["modeling-own", "modeling own", "import os\nx", "class"])
def test_a_file_whose_name_is_no_identifier_never_becomes_code(stem: str) -> None:
    own = type("Own", (object,), {"__module__": f"transformers_modules.folder.{stem}"})
    with pytest.raises(Refused, match="cannot be imported by its name"):
        render(dataclasses.replace(original_of(GPT2LMHeadModel), model=own))


def test_code_from_outside_transformers_is_refused() -> None:
    class Remote(GPT2LMHeadModel):  # type: ignore[misc]
        pass

    with pytest.raises(Refused, match="not part of transformers"):
        original_of(Remote)


def test_a_class_that_no_auto_class_loads_is_refused() -> None:
    with pytest.raises(Refused, match="no auto class"):
        original_of(GPT2Attention, transformers.GPT2Config)


def test_config_entries() -> None:
    assert config_entries(original_of(GPT2LMHeadModel)) == {
        "model_type": "spikepatch_gpt2",
        "architectures": ["SpikepatchGPT2LMHeadModel"],
        "auto_map": {
            "AutoConfig": "modeling_spikepatch_gpt2.SpikepatchGPT2Config",
            "AutoModel": "modeling_spikepatch_gpt2.SpikepatchGPT2Model",
            "AutoModelForCausalLM": "modeling_spikepatch_gpt2.SpikepatchGPT2LMHeadModel",
        },
        "tokenizer_class": "GPT2Tokenizer",
    }
    assert config_entries(original_of(BertModel))["auto_map"].keys() == {"AutoConfig", "AutoModel"}
    assert config_entries(original_of(MistralForCausalLM))["tokenizer_class"] == "TokenizersBackend"


def test_architectures_are_data() -> None:
    assert original_of(GPT2LMHeadModel) == original_of(GPT2LMHeadModel)
    assert isinstance(hash(original_of(GPT2LMHeadModel)), int)
    assert dataclasses.is_dataclass(Original)
