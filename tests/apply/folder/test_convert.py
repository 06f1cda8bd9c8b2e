"""The main job on real input: what ``convert`` writes, and what it is to a process without spikepatch."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import spikepatch
from spikepatch.apply.folder.conversion import Conversion
from spikepatch.apply.folder.drift import drift_written
from spikepatch.data.tokenizing import of_source, shared
from spikepatch.plans.plan import Fill, Plan, ScaleEmbedding
from spikepatch.recipes.built_in import RECIPES
from spikepatch.residual.inspect import inspect
from spikepatch.source.open import build_meta, open_source
from spikepatch.source.tokenizer import PROBE, SAMPLE
from spikepatch_transforms.embed_scale import EmbedScale
from spikepatch_transforms.small_init import SmallInit
from tests.architectures import tiny_config, tiny_model
from tests.elsewhere import run_elsewhere
from tests.folders import hashes

if TYPE_CHECKING:
    from tests.conftest import LocalHub

#: What a converted gpt2 folder with a tokenizer holds.
COPIED = {"generation_config.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"}
CODE = {"modeling_spikepatch_gpt2.py", "spikepatch_embedding.py", "spikepatch_fresh.py", "spikepatch_model.py"}


def load_elsewhere(folder: Path) -> dict[str, Any]:
    """The report of ``load_converted.py``, run where spikepatch cannot be imported."""
    return dict(json.loads(run_elsewhere(Path(__file__).parent / "load_converted.py", str(folder))))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all shards."""
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def loads(folder: Path) -> bool:
    """transformers finds every tensor of the model in the folder, and nothing else."""
    _, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    return not any(info.values())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def save_source(folder: Path, model_type: str = "gpt2", **changes: Any) -> Path:
    tiny_model(model_type, **changes).save_pretrained(folder)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replace the tensors of a single-file checkpoint."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


# GPT-2 at full size


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return spikepatch.convert("arch:gpt2", tmp_path_factory.mktemp("gpt2") / "out")


def test_gpt2_has_the_stds_of_the_paper(gpt2: Conversion) -> None:
    written = tensors(gpt2.out)
    std = math.sqrt(2 / (5 * 768))
    projections = [name for name in written if name.endswith("c_proj.weight")]

    assert float(written["transformer.wte.weight"].std()) == pytest.approx(std, rel=0.01)
    assert len(projections) == 24
    for name in projections:
        assert float(written[name].std()) == pytest.approx(std / math.sqrt(24), rel=0.01)


@pytest.mark.slow
def test_gpt2_reloads_with_a_large_shortcut(gpt2: Conversion) -> None:
    found = load_elsewhere(gpt2.out)

    assert found["class"] == "SpikepatchGPT2LMHeadModel"
    assert found["problems"] == {}
    assert found["tied"]
    assert found["stream"][0] == pytest.approx(math.sqrt(2 / 5), rel=0.03)
    assert found["stream"][1] == pytest.approx(math.sqrt(2 / 5), rel=0.03)
    assert gpt2.expected_loss is not None
    assert found["loss"] == pytest.approx(gpt2.expected_loss, rel=0.05)


def test_gpt2_says_what_it_wrote(gpt2: Conversion) -> None:
    first, second, third = gpt2.notes

    assert first == "fresh weights: a model to pre-train"
    assert "trust_remote_code=True" in second
    assert "against log V = 10.8" in third
    assert "--untie" in third
    assert (gpt2.storage, gpt2.dtype, gpt2.auto_class) == ("code", "float32", "AutoModelForCausalLM")
    assert gpt2.parameters == 124_439_808
    assert gpt2.bytes == 4 * gpt2.parameters


# SmolLM2, with its learned weights


@pytest.fixture(scope="module", params=["all", "residual", "none"])
def converted(request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    before = hashes(smollm2)
    result = spikepatch.convert(str(smollm2), tmp_path_factory.mktemp(request.param) / "out", reinit=request.param)
    assert hashes(smollm2) == before
    return result


@pytest.mark.slow
def test_smollm2(converted: Conversion, smollm2: Path) -> None:
    plan, found = converted.plan, load_elsewhere(converted.out)
    source, written = tensors(smollm2), tensors(converted.out)
    (factor,) = (edit.factor for edit in plan.select(ScaleEmbedding))
    drawn = {fill.parameter for fill in plan.select(Fill)}
    std = float(np.std(source["model.embed_tokens.weight"].double().numpy(), ddof=1))

    assert found["class"] == "SpikepatchLlamaForCausalLM"
    assert found["problems"] == {}
    assert found["tied"]
    assert len(found["completion"]) == 2
    assert (smollm2 / "model.safetensors").stat().st_size == (converted.out / "model.safetensors").stat().st_size
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        assert (converted.out / name).read_bytes() == (smollm2 / name).read_bytes()
    assert written.keys() == source.keys()
    kept = {name for name in source if same_bits(source[name], written[name])}
    uniform = converted.log_vocab
    assert uniform is not None
    assert uniform == pytest.approx(math.log(49152))
    if plan.reinit == "all":
        assert (
            converted.notes[0]
            == f"fresh weights: the learned weights of {smollm2} are NOT used; --reinit none keeps them"
        )
        assert not kept & drawn
        assert factor == 24
        assert found["stream"][0] == pytest.approx(math.sqrt(2 / 5), rel=0.03)
        assert converted.expected_loss is not None
        assert found["loss"] == pytest.approx(converted.expected_loss, rel=0.1)
        assert converted.drift == ()
        return
    before, after = converted.drift
    assert (before.model, after.model) == ("source", "written")
    assert converted.notes[0].startswith(f"learned weights of {smollm2}")
    assert factor == pytest.approx(1 / std, rel=1e-12)
    assert factor == pytest.approx(7.38, abs=0.01)
    assert before.loss < 2.5
    assert before.kl == 0
    assert after.kl > 1
    assert after.stream[0] == pytest.approx(factor * before.stream[0], rel=1e-5)
    assert after.stream[0] == pytest.approx(1, rel=0.25)  # the text's own tokens, not the whole vocabulary
    if plan.reinit == "none":
        assert kept == source.keys()
        assert before.loss + 1 < after.loss < uniform
    else:
        assert kept == source.keys() - drawn
        assert len(drawn) == 60
        assert after.loss > 1.1 * uniform
        assert "the head is tied" in converted.notes[-1]


@pytest.mark.slow
def test_the_drift_is_what_transformers_says(smollm2: Path) -> None:
    source = open_source(str(smollm2), weights=True)
    residual = inspect(build_meta(source))
    drift = drift_written(source, residual, smollm2, source.model_class)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(smollm2)(SAMPLE, return_tensors="pt").input_ids
    with torch.no_grad():
        output = model(ids, labels=ids, output_hidden_states=True)

    assert not isinstance(drift, str)
    first, second = drift
    assert first.loss == second.loss == pytest.approx(float(output.loss), rel=1e-5)
    assert second.kl == 0
    # hidden_states[i] is what enters block i, and its RMSNorm; the last one is behind the final norm.
    sizes = [float(h.square().mean(-1).sqrt().mean()) for h in output.hidden_states[:-1]]
    assert first.stream == second.stream == pytest.approx(sizes, rel=1e-5)
    assert len(first.stream) == 30


#: A text of 512 tokens that is not ours: loss and stream std at layers 1, 2, 3, 30 for factors 1, 2, 4, 1/std.
ELSEWHERE = {
    1.0: (2.094, (0.11, 1.84, 2.73, 31.4)),
    2.0: (2.180, (0.23, 2.32, 3.19, 31.8)),
    4.0: (3.171, (0.46, 2.60, 3.79, 34.5)),
    7.38: (4.049, (0.84, 2.84, 4.59, 34.6)),
}


@pytest.mark.slow
def test_the_drift_over_factors_is_what_was_measured_elsewhere(smollm2: Path, tmp_path: Path) -> None:
    result = spikepatch.convert(str(smollm2), tmp_path / "out", reinit="none", dry_run=True)
    rows = {1.0 if row.model == "source" else float(row.model.split()[1]): row for row in result.drift}
    found = {wanted: rows[min(rows, key=lambda factor: abs(factor - wanted))] for wanted in ELSEWHERE}

    assert sorted(rows) == pytest.approx([1, 1.5, 2, 4, 7.38], abs=0.01)
    # Another text, though also of the King James Bible. The stream is set by the factor first, and by the text at the
    # end; what a factor adds to the loss is of the same size.
    for factor, (loss, stream) in ELSEWHERE.items():
        row = found[factor]
        assert [row.stream[i] for i in (0, 1, 2)] == pytest.approx(stream[:3], rel=0.1), factor
        assert row.stream[29] == pytest.approx(stream[3], rel=0.5), factor
        if factor > 1:
            assert 0.5 < (row.loss - rows[1.0].loss) / (loss - ELSEWHERE[1.0][0]) < 2, factor
    assert not (tmp_path / "out").exists()


# What the folder says of itself


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: Path) -> Path:
    """A GPT-2 with learned weights and the real vocabulary."""
    folder = save_source(tmp_path_factory.mktemp("tiny"), vocab_size=50257)
    shutil.copytree(gpt2_tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("reinit", ["all", "none"])
def test_the_same_command_writes_the_same_bytes(reinit: str, tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spikepatch", "convert", str(tiny), "--reinit", reinit, "--seed", "5"]
    subprocess.run([*command, str(tmp_path / "elsewhere")], check=True, capture_output=True)
    options: dict[str, Any] = {"reinit": reinit, "seed": 5}
    first, second = (spikepatch.convert(str(tiny), tmp_path / name, **options).out for name in ("one", "two"))

    assert hashes(first) == hashes(second) == hashes(tmp_path / "elsewhere")
    assert {"model.safetensors", "config.json", "spikepatch.json", "README.md"} | COPIED | CODE == set(hashes(first))


def test_the_manifest(tiny: Path, tmp_path: Path) -> None:
    result = spikepatch.convert(str(tiny), tmp_path / "out", seed=5, positions=True)
    manifest = json.loads((result.out / "spikepatch.json").read_text())
    config = json.loads((result.out / "config.json").read_text())
    present = hashes(result.out)

    assert manifest["files"] == {name: digest for name, digest in present.items() if name != "spikepatch.json"}
    assert Plan.from_dict(manifest["plan"]) == dataclasses.replace(result.plan, source=tiny.name)
    assert len(manifest["probe"]) == 64
    assert manifest["source"]["name"] == tiny.name
    assert manifest["command"].split()[:4] == ["spikepatch", "convert", tiny.name, "OUT"]
    assert not [name for name in present if str(tiny.parent).encode() in (result.out / name).read_bytes()]
    assert "--positions" in manifest["command"]
    assert "--seed 5" in manifest["command"]
    assert (config["spikepatch"]["recipe"], config["spikepatch"]["seed"]) == ("scaled-embed", 5)
    assert config["spikepatch"]["embeddings"] == {
        "transformer.wte": {"factor": "sqrt(width)"},
        "transformer.wpe": {"factor": "sqrt(width)"},
    }


@pytest.mark.slow
def test_the_command_in_the_manifest_writes_the_folder_again(tiny: Path, tmp_path: Path) -> None:
    """Where the source lies: the folders that lead to it are not recorded."""
    result = spikepatch.convert(
        str(tiny), tmp_path / "out", reinit="residual", factor=2.5, untie=True, dtype="float16", max_shard_size="2MB"
    )
    command = json.loads((result.out / "spikepatch.json").read_text())["command"].split()
    again = [str(tmp_path / "again") if word == "OUT" else word for word in command[1:]]
    subprocess.run([sys.executable, "-m", "spikepatch", *again], check=True, capture_output=True, cwd=tiny.parent)

    assert hashes(tmp_path / "again") == hashes(result.out)


def test_a_recipe_that_was_passed_as_an_object(tiny: Path, tmp_path: Path) -> None:
    """What is recorded runs in a shell and writes the folder again; of what cannot be written down it says so."""
    mine = spikepatch.Recipe("mine", (SmallInit(base="normal", std=0.01), EmbedScale()))
    result = spikepatch.convert(str(tiny), tmp_path / "out", recipe=mine, seed=3)
    command = shlex.split(json.loads((result.out / "spikepatch.json").read_text())["command"])
    assert command[:2] == ["python", "-c"]
    code = command[2].replace("'OUT'", repr(str(tmp_path / "again")))
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tiny.parent)
    assert hashes(tmp_path / "again") == hashes(result.out)

    known = spikepatch.convert(str(tiny), tmp_path / "known", recipe=RECIPES["vanilla"])
    assert "--recipe vanilla" in json.loads((known.out / "spikepatch.json").read_text())["command"]

    own = spikepatch.Recipe("own", (lambda residual, context: iter([*SmallInit()(residual, context)]),))
    result = spikepatch.convert(str(tiny), tmp_path / "closure", recipe=own)
    command = json.loads((result.out / "spikepatch.json").read_text())["command"]
    assert command.startswith("spikepatch.convert(")
    assert "recipe=RECIPE" in command


def test_the_model_card(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "a source"
    shutil.copytree(tiny, source)
    front = "license: other\nlicense_name: own\nlicense_link: LICENSE\nbase_model: org/base\nlanguage: en\ntags: [a]"
    (source / "README.md").write_text(f"---\n{front}\n---\n# Source\n")
    result = spikepatch.convert(str(source), tmp_path / "out")
    card = ModelCard.load(result.out / "README.md")

    assert card.data.to_dict() == {
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
        "language": "en",  # but no base model: the weights are drawn
        "library_name": "transformers",
        "tags": ["spikepatch", "scaled-embed"],
    }
    assert "# a source, patched with spikepatch" in card.text
    assert str(tmp_path) not in card.content
    assert 'from_pretrained("PATH", trust_remote_code=True)' in card.text


@pytest.mark.parametrize("card", ["no front matter", "---\n[1\n---\n", "---\nlicense: [a]\nbase_model: /root\n---\n"])
def test_a_card_that_says_nothing(card: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    (source / "README.md").write_text(card)
    result = spikepatch.convert(str(source), tmp_path / "out")

    assert ModelCard.load(result.out / "README.md").data.to_dict().keys() == {"library_name", "tags"}


#: Model type, and the class that the files name.
TOKENIZERS = [
    ("olmo2", "GPT2Tokenizer"), ("mistral", "LlamaTokenizer"), ("gpt2", None),
    *(pytest.param(model_type, named, marks=pytest.mark.slow) for model_type, named in (
        ("qwen2", "LlamaTokenizer"), ("olmo3", "GPT2Tokenizer"), ("stablelm", "GPT2Tokenizer"),
        ("mistral", "GPT2Tokenizer"), ("llama", "PreTrainedTokenizerFast"), ("phi3", "LlamaTokenizer"), ("qwen3", None),
        ("gemma2", "GPT2Tokenizer"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "named"), TOKENIZERS)
def test_the_tokenizer_is_the_sources(model_type: str, named: str | None, gpt2_tokenizer: Path, tmp_path: Path) -> None:
    """AutoTokenizer chooses the class by the model's type, and takes the files' literally for one that it does not
    know.
    """
    source = tmp_path / "source"
    tiny_config(model_type, vocab_size=50304).save_pretrained(source)
    shutil.copytree(gpt2_tokenizer, source, dirs_exist_ok=True)
    declared = json.loads((source / "tokenizer_config.json").read_text()) | {"tokenizer_class": named}
    (source / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in declared.items() if v is not None}))
    result = spikepatch.convert(str(source), tmp_path / "out", replace=model_type == "gemma2", storage="code")
    right = AutoTokenizer.from_pretrained(source)
    for trust in (False, True):
        found = AutoTokenizer.from_pretrained(result.out, trust_remote_code=trust)
        for text in (PROBE, SAMPLE):
            assert found(text).input_ids == right(text).input_ids
    spikepatch.verify(result.out)
    if model_type == "olmo2":
        again = spikepatch.convert(str(result.out), tmp_path / "again", recipe="vanilla")
        folders = (source, result.out, again.out)
        models = [(folder.name, of_source(open_source(str(folder), weights=False), folder.name)) for folder in folders]
        assert shared(models).fingerprint == models[0][1].fingerprint  # `train` runs them side by side


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    """From its config alone transformers makes a tokenizer that knows one token, which fits any vocabulary."""
    tiny_model("gpt2").save_pretrained(tmp_path / "source")
    note = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", reinit="none").notes[-1]
    assert note.endswith("source has no usable tokenizer: AutoTokenizer finds no vocabulary in the folder")


def test_a_tokenizer_that_needs_code_of_its_own(tiny: Path, tmp_path: Path) -> None:
    source, marker = tmp_path / "source", tmp_path / "ran"
    shutil.copytree(tiny, source)
    (source / "tokenization_own.py").write_text(f"open({str(marker)!r}, 'w')")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    result = spikepatch.convert(str(source), tmp_path / "out")

    for trust in (False, True):  # its code was not asked for, and is neither copied nor named
        found = AutoTokenizer.from_pretrained(result.out, trust_remote_code=trust)
        assert found(PROBE).input_ids == AutoTokenizer.from_pretrained(source)(PROBE).input_ids
    assert not marker.exists()
    assert not list(result.out.glob("tokenization*.py"))


# Files, dtypes, options


@pytest.mark.parametrize("reinit", ["residual", "none"])
def test_a_sharded_source_keeps_its_shards(reinit: Any, tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "source", max_shard_size="100KB")
    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", reinit=reinit)
    index = "model.safetensors.index.json"
    before, after = (json.loads((tmp_path / f / index).read_text())["weight_map"] for f in ("source", "out"))

    assert len(set(before.values())) > 2
    assert after == before
    assert loads(result.out)


def test_an_index_with_one_shard_becomes_a_single_file(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    names = dict.fromkeys(load_file(source / "model.safetensors"), "model-00001-of-00001.safetensors")
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    result = spikepatch.convert(str(source), tmp_path / "out", reinit="none")

    assert [path.name for path in result.out.glob("model*.safetensors*")] == ["model.safetensors"]
    assert loads(result.out)


def test_a_shard_size_for_fresh_weights(tmp_path: Path) -> None:
    tiny_config("gpt2").save_pretrained(tmp_path / "source")
    whole = spikepatch.convert(str(tmp_path / "source"), tmp_path / "whole")
    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", max_shard_size="200KB")
    shards = sorted(result.out.glob("model-*.safetensors"))

    assert len(shards) > 2
    assert all(len(load_file(shard)) == 1 or shard.stat().st_size < 220_000 for shard in shards)
    assert loads(result.out)
    one, many = tensors(whole.out), tensors(result.out)
    assert one.keys() == many.keys()
    assert all(same_bits(one[name], many[name]) for name in one)


@pytest.mark.parametrize("reinit", ["all", "residual"])
def test_another_dtype(reinit: Any, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    full = spikepatch.convert(str(source), tmp_path / "full", reinit=reinit)
    result = spikepatch.convert(str(source), tmp_path / "out", reinit=reinit, dtype="bfloat16")
    wide, narrow = tensors(full.out), tensors(result.out)

    assert (full.dtype, result.dtype) == ("float32", "bfloat16")
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}
    assert all(torch.equal(wide[name].bfloat16(), narrow[name]) for name in wide)
    assert AutoConfig.from_pretrained(result.out, trust_remote_code=True).dtype == torch.bfloat16
    assert loads(result.out)


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    rewrite(source, lambda all_: {n: t.half() if "ln" in n or "c_proj" in n else t for n, t in all_.items()})
    result = spikepatch.convert(str(source), tmp_path / "out", reinit="residual")
    before, after = tensors(source), tensors(result.out)

    assert {tensor.dtype for tensor in after.values()} == {torch.float16, torch.float32}
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"reinit": "none"}, "factor 1.5"),
        ({"reinit": "residual"}, "factor 1"),
        ({"reinit": "none", "recipe": "embed-ln"}, "planned"),
    ],
)
def test_a_dry_run_writes_nothing(options: dict[str, Any], first: str, tiny: Path, tmp_path: Path) -> None:
    dry = spikepatch.convert(str(tiny), tmp_path / "deep" / "out", dry_run=True, **options)
    assert list(tmp_path.iterdir()) == []
    wet = spikepatch.convert(str(tiny), tmp_path / "deep" / "out", **options)
    factors = [edit.factor for edit in dry.plan.select(ScaleEmbedding)]
    names = [row.model for row in dry.drift]

    assert dry.plan == wet.plan
    assert dry.bytes == wet.bytes
    assert names[:2] == ["source", first]
    assert {f"factor {c:.6g}" for c in (1.5, 2, 4, *factors)} <= set(names) or not factors
    planned = dry.drift[names.index(f"factor {factors[0]:.6g}" if factors else "planned")]
    assert wet.drift == (dry.drift[0], dataclasses.replace(planned, model="written"))


def test_overwrite_replaces_the_folder(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "model-00001-of-00002.safetensors").write_text("stale")
    spikepatch.convert(str(tiny), out, overwrite=True)

    assert set(hashes(out)) == {"model.safetensors", "config.json", "spikepatch.json", "README.md"} | COPIED | CODE
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def full_while_there(remains: Path) -> Callable[[Path], SimpleNamespace]:
    """``shutil.disk_usage`` of a disk that the remains of a killed run have filled up."""
    return lambda folder: SimpleNamespace(free=0 if remains.exists() else 10**12)


def test_the_remains_of_a_run_that_was_killed_are_no_lack_of_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config("gpt2").save_pretrained(tmp_path / "source")
    remains = tmp_path / ".out.new.spikepatch" / "large"
    remains.parent.mkdir()
    remains.touch()
    monkeypatch.setattr(shutil, "disk_usage", full_while_there(remains))
    with pytest.raises(spikepatch.BadTarget, match="is in the way"):
        spikepatch.convert(str(tmp_path / "source"), tmp_path / "out")
    (tmp_path / ".out.lock.spikepatch").touch()
    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out")

    assert loads(result.out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("value", "options", "why"),
    [(math.nan, {}, "the source's weights are not finite"), (1e6, {"dtype": "float16"}, "too large for the dtype")],
)
def test_a_failure_on_the_way_leaves_all_as_it_was(
    old: bool, value: float, options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    source = save_source(tmp_path / "source")

    def spoil(everything: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        everything["transformer.h.1.mlp.c_fc.weight"][3, 4] = value
        return everything

    rewrite(source, spoil)
    if old:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("{}")
    before = hashes(tmp_path)
    with pytest.raises(spikepatch.BadSource, match=r"transformer\.h\.1\.mlp\.c_fc\.weight holds NaN") as caught:
        spikepatch.convert(str(source), tmp_path / "out", reinit="none", overwrite=old, **options)

    assert why in caught.value.why
    assert hashes(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"][not old :]


# Checkpoints that are older than the code


def test_legacy_names(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "old")

    def age(everything: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(3)}
        return {name.removeprefix("transformer."): tensor for name, tensor in everything.items()} | masks

    rewrite(tmp_path / "old", age)
    new, old = (spikepatch.convert(str(tmp_path / n), tmp_path / f"{n} out", reinit="residual") for n in ("new", "old"))
    expected, found = tensors(new.out), tensors(old.out)

    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert "3 tensors of the source are not part of the architecture and left out: h.0.attn.bias" in " ".join(old.notes)
    assert not any("left out" in note for note in new.notes)
    assert loads(old.out)


def test_a_tied_tensor_under_its_other_name(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    rewrite(source, lambda all_: {n.replace("transformer.wte", "lm_head"): t for n, t in all_.items()})
    assert "lm_head.weight" in load_file(source / "model.safetensors")
    result = spikepatch.convert(str(source), tmp_path / "out", reinit="none")

    assert "transformer.wte.weight" in tensors(result.out)
    assert loads(result.out)


@pytest.mark.parametrize("differ", [False, True])
def test_both_names_of_a_tied_tensor(differ: bool, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    rewrite(source, lambda all_: all_ | {"lm_head.weight": all_["transformer.wte.weight"] + int(differ)})
    result = spikepatch.convert(str(source), tmp_path / "out", reinit="none")
    assert ("lm_head.weight" in tensors(result.out)) == differ
    assert not any("left out" in note for note in result.notes)
    assert any("kept apart, as transformers loads them" in note for note in result.notes) == differ


def test_all_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")

    def damage(everything: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del everything["transformer.ln_f.bias"], everything["transformer.h.0.ln_1.weight"]
        everything["transformer.wpe.weight"] = torch.zeros(3, 64)
        return everything

    rewrite(source, damage)
    with pytest.raises(spikepatch.BadSource, match="does not fit the architecture") as caught:
        spikepatch.convert(str(source), tmp_path / "out", reinit="none")

    for finding in (
        "transformer.ln_f.bias is missing",
        "transformer.h.0.ln_1.weight is missing",
        "transformer.wpe.weight has shape (3, 64), the architecture (64, 64)",
    ):
        assert finding in caught.value.why
    assert spikepatch.convert(str(source), tmp_path / "out").out.is_dir()  # fresh weights need none of them


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba"])
def test_weights_that_transformers_rescales_whenever_it_loads(model_type: str, tmp_path: Path) -> None:
    tiny_config(model_type, rescale_prenorm_residual=True).save_pretrained(tmp_path / "source")
    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", recipe="vanilla")
    written = tensors(result.out)
    loaded = AutoModelForCausalLM.from_pretrained(result.out)

    assert result.storage == "plain"
    assert "config.json sets rescale_prenorm_residual to false" in result.notes[-1]
    assert all(same_bits(loaded.state_dict()[name], tensor) for name, tensor in written.items())
    assert written


# The hub


#: Runs each command line of argv[1], and prints exit codes and output as one JSON list.
RUN_ALL = """
import json, sys
from click.testing import CliRunner
from spikepatch.cli import main
results = [CliRunner().invoke(main, ["convert", *words]) for words in json.loads(sys.argv[1])]
print(json.dumps([[result.exit_code, result.output] for result in results]))
"""


def convert_all(environment: dict[str, str], *lines: tuple[str, ...]) -> list[tuple[int, str]]:
    """(exit code, output) of each command, in one process: huggingface_hub reads its settings when it is imported."""
    command = [sys.executable, "-c", RUN_ALL, json.dumps(lines)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [(code, output) for code, output in json.loads(done.stdout)]


@pytest.mark.slow
def test_the_hub(tiny: Path, tmp_path: Path, hub: LocalHub) -> None:
    source = tmp_path / "repository"
    shutil.copytree(tiny, source)
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: org/ancestor\n---\n")
    commit = hub.add("org/model", source)
    environment = hub.environment(tmp_path / "home")
    fresh, kept = str(tmp_path / "fresh"), str(tmp_path / "kept")
    ((code, output),) = convert_all(environment, ("org/model", fresh))

    assert code == 0, output
    assert not [request for request in hub.requests if ".safetensors" in request]
    assert "fresh weights: the learned weights of org/model are NOT used; --reinit none keeps them\n" in output
    assert ModelCard.load(tmp_path / "fresh" / "README.md").data.to_dict() == {
        "license": "mit",  # but no base model: the weights are drawn
        "library_name": "transformers",
        "tags": ["spikepatch", "scaled-embed"],
    }

    ((code, output),) = convert_all(environment, ("org/model", kept, "--reinit", "none", "--revision", commit))
    assert code == 0, output
    assert [request for request in hub.requests if request.endswith("/model.safetensors")]
    assert "learned weights of org/model\n" in output
    assert "on a sample text (log V = 10.8):\n" in output
    manifest = json.loads((tmp_path / "kept" / "spikepatch.json").read_text())
    assert (manifest["source"]["name"], manifest["source"]["commit"]) == ("org/model", commit)
    assert {"model.safetensors": hashes(source)["model.safetensors"]} == manifest["source"]["weights"]


@pytest.mark.slow
def test_the_hub_refuses(tiny: Path, tmp_path: Path, hub: LocalHub) -> None:
    hub.add("org/model", tiny)
    hub.add("org/gated", tiny)
    hub.gated.add("org/gated")
    out, used = str(tmp_path / "out"), tmp_path / "used"
    used.mkdir()
    (used / "x").touch()
    ((code, output),) = convert_all(hub.environment(tmp_path), ("org/model", str(used), "--reinit", "none"))
    assert (code, hub.requests) == (2, [])
    assert "is not empty" in output

    refused = convert_all(
        hub.environment(tmp_path),
        ("org/gated", out),
        ("org/absent", out),
        ("org/gated", out, "--revision", "v9"),
    )
    refused += convert_all(hub.environment(tmp_path, HF_HUB_OFFLINE="1"), ("org/other", out))
    expected = [
        ("is gated, and access was refused", "hf auth login"),
        ("is not a model on the Hub", "check the spelling"),
        ("has no revision 'v9'", "check --revision"),
        ("is not in the local cache", "arch:TYPE"),
    ]
    for (code, output), (what, remedy) in zip(refused, expected, strict=True):
        assert code == 2
        assert what in output
        assert remedy in output
        assert "Traceback" not in output
    assert "a local folder" in refused[-1][1]
    assert not (tmp_path / "out").exists()
