"""Nothing is read but what was checked: keys and files that send transformers elsewhere are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import spikepatch
from tests.architectures import tiny_model

KERNEL = "somebody/kernel:attention"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def edit(folder: Path, name: str = "config.json", **entries: Any) -> None:
    data = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(data | entries))


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(spikepatch.Refused) as caught:
        spikepatch.convert(str(source), source.parent / "out", **options)
    assert not (source.parent / "out").exists()
    return str(caught.value)


REDIRECTS: dict[str, tuple[dict[str, Any], str]] = {
    "another config": ({"configuration_files": ["config.5.0.0.json"]}, "reads another file as the config"),
    "other weights": ({"transformers_weights": "other.safetensors"}, "reads other weights"),
    "other weights of a part": ({"text_config": {"transformers_weights": "x.safetensors"}}, "reads other weights"),
    "fusions": ({"fusion_config": {"qkv": True}}, "replaces layers of the model"),
    "a backbone from elsewhere": ({"backbone": "somebody/backbone"}, "from another repository"),
    "a part from the hub": ({"vision_config": {"architecture": "hf-hub:somebody/vit"}}, "from another repository"),
    "packed weights of a part": ({"text_config": {"quantization_config": {"bits": 4}}}, "is quantised"),
    "a kernel": ({"_attn_implementation": KERNEL}, "needs code"),
    "a kernel for a part": ({"attn_implementation": {"text_config": KERNEL}}, "needs code"),
    "a kernel of one layer": ({"per_layer_config": {"0": {"experts_implementation": KERNEL}}}, "needs code"),
    "a kernel in a list": ({"parts": [{"_attn_implementation": KERNEL}]}, "needs code"),
}


@pytest.mark.parametrize("case", REDIRECTS)
@pytest.mark.parametrize("reinit", ["all", "none"])
def test_keys_of_the_config(case: str, reinit: str, source: Path) -> None:
    entries, words = REDIRECTS[case]
    edit(source, **entries)
    said = refusal(source, reinit=reinit)

    assert words in said
    assert next(iter(entries)) in said or "quantization_config" in said


def test_a_second_config_is_not_read(source: Path) -> None:
    """It would reach the loader of kernels, and its quantisation would not be seen."""
    (source / "config.5.0.0.json").write_text((source / "config.json").read_text())
    edit(source, "config.5.0.0.json", _attn_implementation=KERNEL, quantization_config={"bits": 4})
    edit(source, configuration_files=["config.5.0.0.json"])
    assert "configuration_files" in refusal(source)


def test_the_usual_weights_by_name_are_those_that_are_read(source: Path, tmp_path: Path) -> None:
    edit(source, transformers_weights="model.safetensors")
    result = spikepatch.convert(str(source), tmp_path / "out", reinit="none", factor=2.0)
    assert "transformers_weights" not in (result.out / "config.json").read_text()


def test_what_a_record_hides_is_seen(source: Path, tmp_path: Path) -> None:
    """config.json is read as what it was before a patch, and loaded as it is."""
    patched = spikepatch.convert(str(source), tmp_path / "patched", reinit="none", factor=2.0).out
    record = json.loads((patched / "config.json").read_text())["spikepatch"]
    record["original"]["_attn_implementation"] = None
    edit(patched, spikepatch=record, _attn_implementation=KERNEL)
    assert "needs code" in refusal(patched, reinit="none", factor=3.0)
    record["original"] = {**record["original"], "_attn_implementation": KERNEL}
    edit(patched, spikepatch=record, _attn_implementation=None)
    assert "needs code" in refusal(patched, reinit="none", factor=3.0)


@pytest.mark.parametrize("name", ["adapter_config.json", "shard-00000-model-00001-of-00001.safetensors"])
def test_files_that_are_loaded_in_place_of_the_weights(name: str, source: Path) -> None:
    (source / name).write_text("{}")
    assert name in refusal(source)


@pytest.mark.parametrize(
    "entries",
    [{"fast_tokenizer_files": ["tokenizer.5.0.0.json"]}, {"gguf_file": "x.gguf"}, {"init_inputs": ["/etc/passwd"]}],
)
def test_keys_of_the_tokenizer(entries: dict[str, Any], source: Path) -> None:
    edit(source, "tokenizer_config.json", **entries)
    assert next(iter(entries)) in refusal(source)


def test_what_says_nothing_is_read(source: Path, tmp_path: Path) -> None:
    edit(source, fusion_config=None, quantization_config=None, backbone="resnet50")
    edit(source, "tokenizer_config.json", init_inputs=[], special_tokens_map_file="/home/somebody/map.json")
    assert spikepatch.convert(str(source), tmp_path / "out").out.is_dir()


# A patch that is claimed


def plain_copy(patched: Path, folder: Path) -> Path:
    """What a plain class makes of a patched folder, if it is brought to load it: ``spikepatch`` stays in the config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    data = json.loads((patched / "config.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in data.items() if k not in ("model_type", "auto_map")}))
    model.save_pretrained(folder)
    save_file(load_file(patched / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_folder_that_claims_a_patch_is_refused(source: Path, tmp_path: Path) -> None:
    patched = spikepatch.convert(str(source), tmp_path / "patched", reinit="none", factor=2.0).out
    folder = plain_copy(patched, tmp_path / "plain")
    assert "spikepatch" in json.loads((folder / "config.json").read_text())
    for act in (spikepatch.fold, spikepatch.convert):
        with pytest.raises(spikepatch.Refused, match="claims a patch that it does not have"):
            act(str(folder), tmp_path / "out")
    with pytest.raises(spikepatch.Refused, match="claims a patch"):
        spikepatch.plan(str(folder), "vanilla", reinit="none")
    data = json.loads((folder / "config.json").read_text())
    del data["spikepatch"]  # as the remedy says
    (folder / "config.json").write_text(json.dumps(data))
    assert spikepatch.convert(str(folder), tmp_path / "out", reinit="none", factor=2.0).out.is_dir()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification"])
def test_a_plain_class_does_not_load_a_patched_folder(name: str, source: Path, tmp_path: Path) -> None:
    import transformers

    patched = spikepatch.convert(str(source), tmp_path / "patched", reinit="none", factor=2.0).out
    for folder in (patched, tmp_path / "saved"):
        with pytest.raises(
            AttributeError, match=r"Load it with AutoModelForCausalLM.from_pretrained\(folder, trust_rem"
        ):
            getattr(transformers, name).from_pretrained(folder)
        if folder == patched:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(patched, trust_remote_code=True)
            loaded.save_pretrained(tmp_path / "saved")
    assert torch.isfinite(loaded(torch.arange(5)[None]).logits).all()
