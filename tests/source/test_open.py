"""A source, wherever it comes from: what is found, what is fetched, and what is refused before anything is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spikepatch.errors import BadSource, Refused, SpikepatchError
from spikepatch.source.open import Source, build_meta, open_source

if TYPE_CHECKING:
    from tests.conftest import LocalHub

TINY = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}

#: Opens each source of argv[1], and prints what came of it as one JSON list.
OPEN_ALL = """
import json, sys
from spikepatch.errors import SpikepatchError
from spikepatch.source.open import open_source
results = []
for spec, options in json.loads(sys.argv[1]):
    fetched = options.pop("fetched", False)
    try:
        source = open_source(spec, **options)
        if fetched:
            source.fetch_weights()
    except SpikepatchError as error:
        results.append({"error": type(error).__name__, "what": error.what, "why": error.why, "remedy": error.remedy})
        continue
    results.append({
        "class": source.model_class.__name__, "module": source.model_class.__module__, "auto": source.auto_class,
        "hidden_size": source.config.hidden_size, "commit": source.commit, "has_weights": source.has_weights,
        "tensors": source.checkpoint and len(source.checkpoint.tensors), "kind": source.kind,
        "copied": [path.name for path in source.copied_files],
        "present": sorted(path.name for path in source.folder.iterdir()),
    })
print(json.dumps(results))
"""


def open_in_fresh_process(environment: dict[str, str], *requests: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "error", "-c", OPEN_ALL, json.dumps(requests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nothing of the libraries' chatter reaches the user
    return list(json.loads(done.stdout))


def refusal(spec: str | Path, kind: type[SpikepatchError] = BadSource, **options: Any) -> SpikepatchError:
    with pytest.raises(kind) as caught:
        open_source(str(spec), **{"weights": False, **options})
    assert caught.value.where == str(spec)
    return caught.value


def write_config(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("model_type", "model_class", "auto_class"),
    [
        ("gpt2", "GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("t5", "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("albert", "AlbertForMaskedLM", "AutoModelForMaskedLM"),
        ("clip_text_model", "CLIPTextModel", "AutoModel"),
        ("llama4", "Llama4ForCausalLM", "AutoModelForCausalLM"),
    ],
)
def test_a_default_architecture(model_type: str, model_class: str, auto_class: str) -> None:
    source = open_source(f"arch:{model_type}", weights=True)

    assert (source.model_class.__name__, source.auto_class) == (model_class, auto_class)
    assert isinstance(source.config, source.model_class.config_class)
    assert source == Source(f"arch:{model_type}", "arch", None, source.config, source.model_class, auto_class)


def test_an_unknown_type_names_near_misses() -> None:
    error = refusal("arch:gtp2")

    assert error.what == "the model type 'gtp2' is unknown"
    assert error.remedy.startswith("did you mean gpt2")


@pytest.mark.parametrize("broken", ["configuration_gpt2.GPT2Config", "modeling_gpt2.GPT2LMHeadModel"])
def test_a_default_config_that_cannot_be_built(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing_value(*_: object, **__: object) -> None:
        raise TypeError("vocab_size is None")

    monkeypatch.setattr(f"transformers.models.gpt2.{broken}.__init__", missing_value)
    with pytest.raises(Refused, match="the default config cannot be built") as caught:
        build_meta(open_source("arch:gpt2", weights=False))

    assert caught.value.why == "TypeError: vocab_size is None"
    assert "give a real model" in caught.value.remedy


def test_a_part_of_a_model_is_no_source() -> None:
    assert "no model for the type" in refusal("arch:sam_mask_decoder", Refused).what


@pytest.mark.parametrize(
    ("model_type", "auto_class", "name"),
    [
        ("gpt2", "CausalLM", "GPT2LMHeadModel"),
        ("bart", "Seq2SeqLM", "BartForConditionalGeneration"),  # not its decoder alone, which CausalLM has
        ("whisper", "SpeechSeq2Seq", "WhisperForConditionalGeneration"),
        ("llava", "ImageTextToText", "LlavaForConditionalGeneration"),  # not the model without a head
        ("depth_anything", "DepthEstimation", "DepthAnythingForDepthEstimation"),
    ],
)
def test_the_class_that_is_meant(model_type: str, auto_class: str, name: str) -> None:
    source = open_source(f"arch:{model_type}", weights=False)
    assert (source.auto_class, source.model_class.__name__) == (f"AutoModelFor{auto_class}", name)


def test_a_folder_with_weights(smollm2: Path) -> None:
    source = open_source(str(smollm2), weights=True)

    assert (source.kind, source.folder, source.commit) == ("folder", smollm2, None)
    assert (source.model_class.__name__, source.auto_class) == ("LlamaForCausalLM", "AutoModelForCausalLM")
    assert source.has_weights
    assert source.checkpoint is not None
    assert len(source.checkpoint.tensors) == 272
    assert {entry.dtype for entry in source.checkpoint.tensors.values()} == {"BF16"}
    assert [path.name for path in source.copied_files] == [
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.slow
def test_the_weights_of_the_fixture_are_real(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    completion = model.generate(**prompt, max_new_tokens=1, do_sample=False)

    assert tokenizer.decode(completion[0]) == "The capital of France is Paris"


def test_the_gpt2_vocabulary_of_the_fixture_is_real(gpt2_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gpt2_tokenizer)

    assert tokenizer("Hello world<|endoftext|>")["input_ids"] == [15496, 995, 50256]
    assert tokenizer.decode([15496, 995]) == "Hello world"


def test_a_real_bert_without_reading_its_weights(minilm: Path) -> None:
    source = open_source(str(minilm), weights=False)

    assert source.model_class.__name__ == "BertModel"
    assert source.auto_class == "AutoModel"
    assert (source.has_weights, source.checkpoint) == (True, None)
    assert [p.name for p in source.copied_files] == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]


def test_a_folder_without_weights(tmp_path: Path) -> None:
    source = open_source(str(write_config(tmp_path, {"model_type": "llama", **TINY})), weights=True)

    assert (source.has_weights, source.checkpoint) == (False, None)
    assert source.model_class.__name__ == "LlamaForCausalLM"


def test_a_class_without_a_language_model_head_is_honoured(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2DoubleHeadsModel"]}
    source = open_source(str(write_config(tmp_path, config)), weights=False)

    assert source.model_class.__name__ == "GPT2DoubleHeadsModel"
    assert source.auto_class == "GPT2DoubleHeadsModel"


def test_a_type_that_transformers_reads_as_another(tmp_path: Path) -> None:
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 32}
    source = open_source(str(write_config(tmp_path, config)), weights=False)

    assert isinstance(source.config, source.model_class.config_class)


def test_copied_files_are_an_allow_list(tmp_path: Path) -> None:
    write_config(tmp_path, {"model_type": "gpt2"})
    copied = ["LICENSE", "merges.txt", "spiece.model", "tekken.json", "tokenizer.json", "vocab.json"]
    left = ["modeling_x.py", "training_args.bin", "chat_template.py", "README.md", "optimizer.pt"]
    for name in copied + left:
        (tmp_path / name).write_text("x")
    (tmp_path / "pickled.model").write_bytes(pickle.dumps([1]))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/rag.jinja").write_text("x")
    source = open_source(str(tmp_path), weights=False)

    names = [path.relative_to(tmp_path).as_posix() for path in source.copied_files]
    assert names == sorted([*copied, "additional_chat_templates/rag.jinja"])
    assert not source.has_weights


def test_copied_files_that_are_links(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b/snapshots/0123"
    blobs = tmp_path / "models--a--b/blobs"
    (folder / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    write_config(folder, {"model_type": "gpt2"})
    (blobs / "abc").write_text("x")
    (folder / "tokenizer.json").symlink_to("../../blobs/abc")
    (folder / "additional_chat_templates/rag.jinja").symlink_to("../../../blobs/abc")
    copied = [path.name for path in open_source(str(folder), weights=False).copied_files]
    assert copied == ["rag.jinja", "tokenizer.json"]

    secret = tmp_path / "secret"
    secret.write_text("x")
    (folder / "merges.txt").symlink_to(secret)
    (folder / "LICENSE").symlink_to("../../../secret")
    with pytest.raises(BadSource, match="has files that lie elsewhere") as refused:
        open_source(str(folder), weights=False)
    assert f"LICENSE is a link that leads out of the folder, to {secret}" in refused.value.why
    assert f"merges.txt is a link that leads out of the folder, to {secret}" in refused.value.why


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "generation_config.json"])
def test_copied_files_that_are_none(name: str, tmp_path: Path) -> None:
    """They would be missing in the output, without a word."""
    write_config(tmp_path, {"model_type": "gpt2"})
    os.mkfifo(tmp_path / name)
    with pytest.raises(BadSource, match="has files that lie elsewhere or are none") as refused:
        open_source(str(tmp_path), weights=False)
    assert f"{name} is not a file" in refused.value.why
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("absent")
    with pytest.raises(BadSource, match="has files that lie elsewhere or are none"):
        open_source(str(tmp_path), weights=False)


def test_a_folder_of_copied_files_that_is_a_link(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    write_config(folder, {"model_type": "gpt2"})
    (elsewhere / "rag.jinja").write_text("x")
    (folder / "additional_chat_templates").symlink_to(elsewhere)
    with pytest.raises(BadSource, match="lie elsewhere") as refused:
        open_source(str(folder), weights=False)
    assert f"rag.jinja is a link that leads out of the folder, to {elsewhere / 'rag.jinja'}" in refused.value.why


def test_a_tokenizer_that_is_a_git_lfs_pointer(tmp_path: Path) -> None:
    write_config(tmp_path, {"model_type": "gpt2"})
    for name in ("tokenizer.json", "merges.txt"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    error = refusal(tmp_path)

    assert error.what == "holds git-lfs pointers in place of files: merges.txt, tokenizer.json"
    assert "git lfs pull" in error.remedy


@pytest.mark.parametrize("spec", ["./nowhere", "/nowhere/at/all", "../nowhere", "nowhere/", "~/nowhere/at/all"])
def test_a_missing_folder(spec: str) -> None:
    error = refusal(spec)

    assert error.what == "does not exist"
    assert "hub id" in error.remedy
    assert "arch:TYPE" in error.remedy


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()

    assert refusal(tmp_path / "model.gguf").what == "is a file, not a folder"


def test_a_revision_of_a_folder(tmp_path: Path) -> None:
    assert "--revision" in refusal(tmp_path, revision="v1").remedy
    assert "--revision" in refusal("arch:gpt2", revision="v1").remedy


CONFIGS: dict[str, tuple[Any, str, str, str]] = {
    "layers": (
        {"model_type": "gpt2", "n_layer": 2**53},
        "config.json asks for 9,007,199,254,740,992 layers",
        "n_layer",
        "",
    ),
    "layers within": (
        {"model_type": "llava", "text_config": {"num_hidden_layers": 10**7}},
        "asks for 10,000,000 layers",
        "text_config",
        "",
    ),
    "not JSON": ("{", "config.json is not JSON", "", "download the file again"),
    "duplicate": ('{"model_type": "gpt2", "model_type": "bert"}', "config.json is not JSON", "twice", "download"),
    "git-lfs": ("version https://git-lfs.github.com/spec/v1\n", "is not JSON", "a git-lfs pointer", "git lfs pull"),
    "HTML": ("<!DOCTYPE html>", "is not JSON", "an HTML or XML page", "download the file again"),
    "list": ([1], "config.json is not a JSON object", "it is a list", "download"),
    "no type": ({}, "config.json has no model_type", "transformers", "correct config.json"),
    "type": ({"model_type": "gpt3"}, "the model type 'gpt3' is unknown", "has no such type", "gpt2"),
    "type a list": ({"model_type": ["gpt2"]}, "the model type ['gpt2'] is unknown", "", "correct config.json"),
    "value": ({"model_type": "llama", "hidden_size": "big"}, "does not describe a model", "hidden_size", "correct"),
    "class": ({"model_type": "gpt2", "architectures": ["Nope"]}, "no model of transformers", "", "architectures"),
    "not a model": ({"model_type": "gpt2", "architectures": ["AutoConfig"]}, "no model of", "", "architectures"),
    "not a class": (
        {"model_type": "gpt2", "architectures": ["__name__"]},
        "no model of transformers",
        "",
        "architectures",
    ),
    "other class": (
        {"model_type": "gpt2", "architectures": ["BertModel"]},
        "contradicts itself: model_type 'gpt2', architecture 'BertModel'",
        "BertConfig, not from a GPT2Config",
        "architectures",
    ),
}


@pytest.mark.parametrize(("config", "what", "why", "remedy"), CONFIGS.values(), ids=CONFIGS)
def test_a_bad_config_is_refused(tmp_path: Path, config: Any, what: str, why: str, remedy: str) -> None:
    error = refusal(write_config(tmp_path, config))

    assert what in error.what
    assert why in error.why
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("file", "what", "remedy"),
    [
        (None, "has no config.json", "save_pretrained"),
        ("model_index.json", "has no config.json", "save_pretrained"),
        ("adapter_config.json", "is an adapter, not a model", "merge_and_unload"),
    ],
)
def test_no_config(tmp_path: Path, file: str | None, what: str, remedy: str) -> None:
    if file:
        (tmp_path / file).write_text("{}")
    error = refusal(tmp_path)

    assert error.what == what
    assert remedy in error.remedy


def test_a_config_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    error = refusal(tmp_path)

    assert error.what == "config.json cannot be read"
    assert error.why == "it is a folder"


@pytest.mark.slow
@pytest.mark.parametrize("unreadable", [".", "tokenizer.json"])
def test_what_this_user_may_not_read(tmp_path: Path, unreadable: str) -> None:
    """In a process that has no privileges: root may read anything."""
    drop = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
    if drop and not shutil.which(drop[0]):
        pytest.skip("root may read anything, and setpriv is not there")
    folder = write_config(tmp_path / "model", {"model_type": "llama", **TINY})
    (folder / "tokenizer.json").write_text("{}")
    (folder / unreadable).chmod(0)
    words = [sys.executable, "-m", "spikepatch", "convert", str(folder), str(tmp_path / "out"), "-q"]
    try:
        done = subprocess.run([*drop, *words], capture_output=True, text=True, check=False)
    finally:
        (folder / unreadable).chmod(0o755)

    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {folder / unreadable}: cannot be read\n  why: Permission denied\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", [True, False])
def test_a_quantised_model(tmp_path: Path, weights: bool) -> None:
    config = {"model_type": "gpt2", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    error = refusal(write_config(tmp_path, config), Refused, weights=weights)

    assert error.what == "is quantised"
    assert "unquantised original" in error.remedy


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    write_config(tmp_path, {"model_type": "gpt2"})
    (tmp_path / "pytorch_model.bin").mkdir()  # opening it would raise
    error = refusal(tmp_path, weights=True)

    assert error.what.startswith("no weights in model.safetensors")
    assert "pytorch_model.bin (PyTorch pickles)" in error.why
    assert "save_pretrained" in error.remedy
    without = open_source(str(tmp_path), weights=False)
    assert (without.has_weights, without.checkpoint) == (True, None)


def test_bad_weights_matter_only_when_they_are_asked_for(tmp_path: Path) -> None:
    write_config(tmp_path, {"model_type": "gpt2"})
    (tmp_path / "model.safetensors").write_bytes(b"x")

    assert "is truncated" in refusal(tmp_path, weights=True).why
    assert open_source(str(tmp_path), weights=False).has_weights


MODELLING = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
OWN = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "own", "auto_map": OWN}, "needs code that comes with the model"),
        ({"model_type": "llama", "auto_map": OWN}, "needs code that comes with the model"),
        ({"model_type": "llama", "auto_map": {"AutoModel": "org/repo--x.Y"}}, "needs code"),
        ({"model_type": "llama", "auto_map": "modeling_own.OwnModel"}, "needs code"),
        ({"model_type": "clip", "text_config": {"auto_map": OWN}}, "needs code"),
        ({"model_type": "llama", "attn_implementation": "org/kernel"}, "needs code"),
        ({"model_type": "spikepatch_llama", "auto_map": OWN, "spikepatch": {}}, "needs code that comes with the model"),
    ],
)
def test_code_is_refused_before_it_runs(tmp_path: Path, config: dict[str, Any], what: str) -> None:
    marker = tmp_path / "ran"
    write_config(tmp_path, config)
    (tmp_path / "modeling_own.py").write_text(MODELLING.format(marker=str(marker)))
    error = refusal(tmp_path, Refused)

    assert what in error.what
    assert "--trust-remote-code" in error.remedy
    assert not marker.exists()


def test_code_for_the_tokenizer_only_is_not_needed(tmp_path: Path) -> None:
    config = {"model_type": "llama", "auto_map": {"AutoTokenizer": ["x.Y", None]}, **TINY}

    assert open_source(str(write_config(tmp_path, config)), weights=False).auto_class == "AutoModelForCausalLM"


@pytest.mark.slow
def test_trusted_code_gives_its_own_class(tmp_path: Path, hub: LocalHub) -> None:
    marker = tmp_path / "ran"
    folder = write_config(tmp_path / "own", {"model_type": "own", "auto_map": OWN, **TINY})
    by_name = {auto: f"org/own--{reference}" for auto, reference in OWN.items()}
    elsewhere = write_config(tmp_path / "elsewhere", {"model_type": "own", "auto_map": by_name, **TINY})
    broken = write_config(tmp_path / "broken", {"model_type": "llama", "auto_map": {"AutoModel": "gone.Y"}, **TINY})
    (folder / "modeling_own.py").write_text(MODELLING.format(marker=str(marker)))
    hub.add("org/own", folder)
    trust = {"weights": False, "trust_remote_code": True}
    refused, local, fetched, referred, failed = open_in_fresh_process(
        hub.environment(tmp_path / "home"),
        ("org/own", {"weights": False}),
        (str(folder), trust),
        ("org/own", trust),
        (str(elsewhere), trust),
        (str(broken), trust),
    )

    assert refused["what"] == "needs code that comes with the model"
    for source in (local, fetched, referred):
        assert (source["class"], source["auto"]) == ("OwnModel", "AutoModelForCausalLM")
        assert source["module"].startswith("transformers_modules.")
    assert failed["what"] == "its own code for AutoModel cannot be loaded"
    assert marker.exists()


@pytest.mark.slow
def test_the_hub(tmp_path: Path, hub: LocalHub, save_tiny: Callable[..., Path], gpt2_tokenizer: Path) -> None:
    sharded, small = save_tiny("llama", max_shard_size="2KB", **TINY), save_tiny("llama", **{**TINY, "hidden_size": 4})
    shutil.copytree(gpt2_tokenizer, sharded, dirs_exist_ok=True)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "modeling_x.py"):
        (sharded / name).write_text("not to be fetched")
    pickled = write_config(tmp_path / "pickled", {"model_type": "gpt2"})
    (pickled / "pytorch_model.bin").touch()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    main, tag = hub.add("org/model", sharded), hub.add("org/model", small, "v1.0")
    hub.add("gated", sharded)
    hub.gated.add("gated")
    hub.add("pickled", pickled)
    hub.add("adapter", adapter)

    fresh, old, exact = open_in_fresh_process(
        hub.environment(tmp_path / "fresh"),
        ("org/model", {"weights": False}),
        ("org/model", {"weights": False, "revision": "v1.0"}),
        ("org/model", {"weights": False, "revision": tag}),
    )
    assert "HEAD /org/model/resolve/main/config.json" in hub.requests
    assert any(request.endswith("/tokenizer.json") for request in hub.requests)
    for suffix in (".safetensors", ".safetensors.index.json", ".bin", ".py"):
        assert not [request for request in hub.requests if request.endswith(suffix)]
    assert (fresh["kind"], fresh["commit"], fresh["hidden_size"]) == ("hub", main, 8)
    assert (fresh["has_weights"], fresh["tensors"]) == (True, None)
    assert fresh["copied"] == [
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    assert [(s["commit"], s["hidden_size"]) for s in (old, exact)] == [(tag, 4), (tag, 4)]

    hub.requests.clear()
    weights, single, no_repo, no_revision, gated, pickles, no_model, broken = open_in_fresh_process(
        hub.environment(tmp_path / "home"),
        ("org/model", {"weights": True}),
        ("org/model", {"weights": True, "revision": "v1.0"}),
        ("org/nothing", {"weights": False}),
        ("org/model", {"weights": False, "revision": "v9"}),
        ("gated", {"weights": False}),
        ("pickled", {"weights": True}),
        ("adapter", {"weights": False}),
        ("not a model/id", {"weights": False}),
    )
    assert weights["tensors"] == single["tensors"] == 21
    assert not [request for request in hub.requests if "consolidated" in request or ".bin" in request]
    assert no_repo["what"] == "is not a model on the Hub, or is private"
    assert "check the spelling" in no_repo["remedy"]
    assert "hf auth login" in no_repo["remedy"]
    assert no_revision["what"] == "has no revision 'v9'"
    assert "--revision" in no_revision["remedy"]
    assert gated["what"] == "is gated, and access was refused"
    assert "hf auth login" in gated["remedy"]
    assert "HF_TOKEN" in gated["remedy"]
    assert "pytorch_model.bin (PyTorch pickles)" in pickles["why"]
    assert no_model["what"] == "is an adapter, not a model"
    assert broken["what"] == "is neither a folder nor a model id"
    assert "arch:TYPE" in broken["remedy"]


@pytest.mark.slow
def test_without_the_hub_the_cache_serves(tmp_path: Path, hub: LocalHub, save_tiny: Callable[..., Path]) -> None:
    commit = hub.add("org/model", save_tiny("llama", **TINY))
    hub.add("org/config", save_tiny("llama", **TINY))
    home = tmp_path / "home"
    for spec, options in (("org/model", {"weights": True, "fetched": True}), ("org/config", {"weights": False})):
        open_in_fresh_process(hub.environment(home), (spec, options))
    hub.requests.clear()
    whole, partial, config_only, absent, other = open_in_fresh_process(
        hub.environment(home, HF_HUB_OFFLINE="1"),
        ("org/model", {"weights": True}),
        ("org/config", {"weights": False}),
        ("org/config", {"weights": True}),
        ("org/absent", {"weights": False}),
        ("org/model", {"weights": False, "revision": "v2"}),
    )

    assert hub.requests == []
    assert (whole["commit"], whole["tensors"]) == (commit, 21)
    assert partial["has_weights"]
    assert config_only["what"] == "its weights cannot be fetched, and are not in the local cache"
    for error in (absent, other):
        assert error["what"] == "is no folder here, cannot be fetched, and is not in the local cache"
    for error in (config_only, absent, other):
        assert f"HF_ENDPOINT is {hub.url}, HF_HUB_OFFLINE is 1" in error["why"]
        assert "arch:TYPE" in error["remedy"]
        assert "local folder" in error["remedy"]


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the folder that was meant is named; hf_hub_download itself would ask six times."""
    import huggingface_hub

    asked = []

    def refuse(url: str, **_: object) -> None:
        asked.append(url)
        raise ConnectionError("no route to it")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints/run-1").mkdir(parents=True)
    with pytest.raises(BadSource, match="no route to it") as refusal:
        open_source("checkpoints/run-1x", weights=False)
    assert refusal.value.remedy.startswith("did you mean checkpoints/run-1? Otherwise: check the connection")
    assert len(asked) == 1
    with pytest.raises(BadSource, match="does not exist"):
        open_source("runs/checkpoints/run-1", weights=False)
    assert len(asked) == 1  # it has a slash too many for an id


@pytest.mark.slow
def test_a_hub_that_is_down(tmp_path: Path, hub: LocalHub) -> None:
    hub.broken.add("org/model")
    closed = "http://127.0.0.1:1"
    environments = [hub.environment(tmp_path / "a"), hub.environment(tmp_path / "b", HF_ENDPOINT=closed)]
    with ThreadPoolExecutor() as pool:  # each waits for long between its tries
        found = pool.map(lambda of: open_in_fresh_process(of, ("org/model", {"weights": False})), environments)
        (broken,), (unreachable,) = found

    assert hub.requests
    assert "503" in broken["why"]
    assert f"HF_ENDPOINT is {closed}, HF_HUB_OFFLINE is not set" in unreachable["why"]
    for error in (broken, unreachable):
        assert error["what"] == "is no folder here, cannot be fetched, and is not in the local cache"
        assert "arch:gpt2" in error["remedy"]


def test_parameters_are_on_meta_and_tied_and_buffers_are_real(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = open_source(
        str(write_config(tmp_path, {"model_type": "gemma2", "dtype": "bfloat16", **TINY})), weights=False
    )
    before = source.config.to_dict()
    model, real = build_meta(source), AutoModelForCausalLM.from_config(source.config)

    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not model.training
    assert source.config.to_dict() == before
    expected = dict(real.named_buffers())
    assert expected
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected.pop(name))
    assert not expected


@pytest.mark.slow
def test_any_size_fits() -> None:
    script = """
import resource
from spikepatch.source.open import build_meta, open_source
source = open_source("arch:deepseek_v3", weights=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = build_meta(source)
print(sum(parameter.numel() for parameter in model.parameters()))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    parameters, kibibytes = map(int, done.stdout.split())

    assert parameters > 6e11
    assert kibibytes < 500 * 1024


def test_a_large_buffer_is_real_too() -> None:
    from transformers import AutoConfig

    source = open_source("arch:gpt_neo", weights=False)
    config = AutoConfig.for_model(
        "gpt_neo",
        max_position_embeddings=4500,
        hidden_size=8,
        num_heads=2,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
    )
    model = build_meta(Source(source.name, "arch", None, config, source.model_class, source.auto_class))
    masks = [buffer for buffer in model.buffers() if buffer.numel() > 1 << 24]

    assert masks
    assert not any(mask.is_meta for mask in masks)


def test_a_tie_made_by_the_constructor_is_kept() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from spikepatch.source.meta import build_meta

    class Tied(LlamaForCausalLM):  # type: ignore[misc]
        """Its config does not say that the head is the embedding."""

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.lm_head.weight = self.model.embed_tokens.weight

    model: Any = build_meta(Tied, LlamaConfig(**TINY), where="here")
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.is_meta
