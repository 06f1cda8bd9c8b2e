"""Convert, train, fold: the plain architecture computes what the patched model did."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, LlamaForCausalLM

import spikepatch
from spikepatch.cli import main
from spikepatch.plans.plan import DetachEmbedding
from tests.apply.folder.test_convert import full_while_there
from tests.apply.folder.test_routes import config_of
from tests.architectures import tiny_config
from tests.elsewhere import logits_elsewhere
from tests.folders import hashes

#: Type, options of ``convert``; whether a tied head has to get its own matrix.
CASES: list[tuple[str, dict[str, Any], bool]] = [
    ("gpt2", {}, True),
    ("gpt2", {"recipe": "embed-ln"}, True),
    ("gpt2", {"positions": True, "factor": 3.7, "untie": True}, False),
    ("llama", {"recipe": "embed-ln"}, False),
    ("mixtral", {}, False),
    ("gpt_neox", {}, False),
    ("mamba", {}, True),
    ("falcon", {}, True),
    ("pegasus", {"storage": "code"}, True),
]


def load(folder: Path, *, trust: bool, dtype: torch.dtype | None = None) -> Any:
    config = json.loads((folder / "config.json").read_text())
    auto_class = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    return auto_class.from_pretrained(folder, trust_remote_code=trust, dtype=dtype or "auto").eval()


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(0)} if model.config.is_encoder_decoder else {})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**inputs_of(model)).logits
    return result


def train(folder: Path, out: Path, dtype: torch.dtype | None = None, **options: Any) -> Path:
    """A few real steps, saved as a Trainer saves."""
    model = load(folder, trust=True, dtype=dtype).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(5, model.config.vocab_size, (4, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    positions = ("wpe", "embed_positions")
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert all(name.split(".")[-2] in positions for name in still), still
    model.save_pretrained(out, **options)
    return out


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_config("gpt2").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "options", "untied"), CASES)
def test_trained_and_folded(model_type: str, options: dict[str, Any], untied: bool, tmp_path: Path) -> None:
    config_of(model_type).save_pretrained(tmp_path / "source")
    converted = spikepatch.convert(str(tmp_path / "source"), tmp_path / "patched", **options)
    trained = train(converted.out, tmp_path / "trained")
    before = hashes(trained)
    result = spikepatch.fold(str(trained), tmp_path / "plain")
    found = logits_elsewhere(result.out, trust=False, auto_class=result.auto_class)
    patched = load(trained, trust=True)
    config = json.loads((result.out / "config.json").read_text())

    assert converted.storage == "code"
    assert hashes(trained) == before
    assert (found["class"], found["problems"]) == (converted.plan.architecture, {})
    assert torch.equal(found["inputs"]["input_ids"], inputs_of(patched)["input_ids"])
    assert torch.equal(found["logits"], logits(patched))
    assert result.untied == untied
    assert result.tables
    assert config["model_type"] == converted.plan.model_type
    assert not {"spikepatch", "auto_map"} & config.keys()
    assert not list(result.out.glob("*.py"))
    assert "Adam's step" in " ".join(result.notes)
    # Nothing but the table has changed, and the head has what the table was.
    old, new = load_file(trained / "model.safetensors"), load_file(result.out / "model.safetensors")
    changed = {name for name in old.keys() & new.keys() if not torch.equal(old[name], new[name])}
    assert changed <= set(result.tables)
    assert old.keys() - new.keys() <= {name for name in old if ".norm." in name or name.endswith("shared.weight")}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["scaled-embed", "embed-ln"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_the_dtype_of_the_weights_it_is_exact(dtype: torch.dtype, recipe: str, source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"factor": 7.3} if recipe == "scaled-embed" else {}
    patched = spikepatch.convert(str(source), tmp_path / "patched", recipe=recipe, **options)
    trained = train(patched.out, tmp_path / "trained", dtype)
    plain = spikepatch.fold(str(trained), tmp_path / "plain").out

    assert load(plain, trust=False).dtype == dtype
    assert torch.equal(logits(load(trained, trust=True)), logits(load(plain, trust=False)))
    # In float64 the rounding of E' to the stored dtype is seen: one rounding of each element of the stream's start.
    reference = logits(load(trained, trust=True, dtype=torch.float64))
    error = (logits(load(plain, trust=False, dtype=torch.float64)) - reference).abs().max()
    eps = torch.finfo(dtype).eps
    width, layers = 64, 3
    bound = eps * math.sqrt(width) * (1 + 2 * layers) * reference.abs().max()
    assert error <= bound
    if dtype == torch.float64:
        assert error == 0
    else:
        assert error > 0


def test_weights_that_transformers_rescales_whenever_it_loads(tmp_path: Path) -> None:
    tiny_config("mamba", rescale_prenorm_residual=True).save_pretrained(tmp_path / "source")
    patched = spikepatch.convert(str(tmp_path / "source"), tmp_path / "patched").out
    plain = spikepatch.fold(str(patched), tmp_path / "plain").out

    assert torch.equal(logits(load(patched, trust=True)), logits(load(plain, trust=False)))
    assert json.loads((plain / "config.json").read_text())["rescale_prenorm_residual"] is False


def test_a_detached_embedding_is_plain_already(source: Path, tmp_path: Path) -> None:
    """Its forward pass is the plain one's, so nothing is folded, and a tied head stays tied."""
    patched = spikepatch.convert(str(source), tmp_path / "patched", recipe="embed-detach")
    trained = train(patched.out, tmp_path / "trained")
    result = spikepatch.fold(str(trained), tmp_path / "plain")
    plain = load(result.out, trust=False)
    old, new = load_file(trained / "model.safetensors"), load_file(result.out / "model.safetensors")

    assert len(patched.plan.select(DetachEmbedding)) == 1
    assert (result.tables, result.untied) == ((), False)
    assert not any("Adam" in note for note in result.notes)
    assert torch.equal(logits(plain), logits(load(trained, trust=True)))
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_shards_tokenizer_and_what_is_said(gpt2_tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_config("gpt2", vocab_size=50257).save_pretrained(source)
    shutil.copytree(gpt2_tokenizer, source, dirs_exist_ok=True)
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: org/base\n---\n")
    patched = spikepatch.convert(str(source), tmp_path / "patched")
    trained = train(patched.out, tmp_path / "trained", max_shard_size="200KB")
    for name in (*(p.name for p in gpt2_tokenizer.iterdir()), "README.md"):
        shutil.copyfile(patched.out / name, trained / name)
    result = spikepatch.fold(str(trained), tmp_path / "plain")
    index = "model.safetensors.index.json"
    before, after = (json.loads((f / index).read_text())["weight_map"] for f in (trained, result.out))
    manifest = json.loads((result.out / "spikepatch.json").read_text())
    card = (result.out / "README.md").read_text()
    left = {name: digest for name, digest in hashes(result.out).items() if name != "spikepatch.json"}

    assert len(set(before.values())) > 2
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"lm_head.weight"}
    assert torch.equal(logits(load(trained, trust=True)), logits(load(result.out, trust=False)))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json"):
        assert (result.out / name).read_bytes() == (trained / name).read_bytes()
    assert (
        AutoTokenizer.from_pretrained(result.out)("a b").input_ids
        == AutoTokenizer.from_pretrained(source)("a b").input_ids
    )
    assert manifest["files"] == left
    assert manifest["folded"]["embeddings"] == {"transformer.wte": {"factor": "sqrt(width)"}}
    assert manifest["command"] == f"spikepatch fold {trained.name} OUT"
    assert "license: mit" in card
    assert "base_model" not in card  # the weights were drawn
    assert 'from_pretrained("PATH")' in card
    again = spikepatch.fold(str(trained), tmp_path / "again")
    assert hashes(again.out) == hashes(result.out)


def test_the_command(source: Path, tmp_path: Path) -> None:
    patched = spikepatch.convert(str(source), tmp_path / "patched").out
    shown = CliRunner().invoke(main, ["fold", str(patched), str(tmp_path / "plain")])
    lines = shown.stdout.splitlines()
    as_json = CliRunner().invoke(main, ["fold", str(patched), str(tmp_path / "again"), "--json"])
    refused = CliRunner().invoke(main, ["fold", str(tmp_path / "plain"), str(tmp_path / "twice")])

    assert shown.exit_code == 0
    assert "for use, not for training on" in lines[1]
    assert lines[2:4] == [
        "transformer.wte.weight: its rows are the embedding's output * 8 = sqrt(d) now",
        "the head has its own matrix now, and the config says so",
    ]
    assert lines[-1] == f'load it with AutoModelForCausalLM.from_pretrained("{tmp_path / "plain"}")'
    assert json.loads(as_json.stdout)["tables"] == ["transformer.wte.weight"]
    assert hashes(tmp_path / "again") == hashes(tmp_path / "plain")
    assert refused.exit_code == 2
    assert "there is nothing to fold" in refused.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"factor": 3.0}, "its rows are the embedding's output * 3 now"),
        ({"recipe": "embed-ln"}, "its rows are the embedding's output through a LayerNorm now"),
    ],
)
def test_it_says_what_became_of_the_table(options: dict[str, Any], said: str, source: Path, tmp_path: Path) -> None:
    patched = spikepatch.convert(str(source), tmp_path / "patched", **options).out
    notes = spikepatch.fold(str(patched), tmp_path / "plain").notes
    assert [note for note in notes if "its rows" in note] == [f"transformer.wte.weight: {said}"]


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spelt as a path, or so that it may be a hub id: no fresh model is offered, which could not be folded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, message in (("./plainnone", "does not exist"), ("plainnone", "is no folder here, cannot be fetched")):
        done = CliRunner().invoke(main, ["fold", name, "out"])
        assert done.exit_code == 2
        assert message in done.stderr
        assert "arch:" not in done.stderr
    offered = CliRunner().invoke(main, ["convert", "plainnone", "out"]).stderr
    assert "is no folder here" in offered
    assert "arch:TYPE" in offered


# What is refused


@pytest.mark.parametrize(
    ("model_type", "options", "why"),
    [
        ("gpt2", {"recipe": "vanilla"}, "it is a plain architecture, which loads without custom code$"),
        ("granite", {}, r"custom code \(its factor is a setting of its config\)"),
        ("llama", {"storage": "host"}, r"custom code \(its factor is a setting of its config\)"),
    ],
)
def test_what_is_plain_already(model_type: str, options: dict[str, Any], why: str, tmp_path: Path) -> None:
    tiny_config(model_type).save_pretrained(tmp_path / "source")
    out = spikepatch.convert(str(tmp_path / "source"), tmp_path / "patched", **options).out
    with pytest.raises(spikepatch.Refused, match="there is nothing to fold") as caught:
        spikepatch.fold(str(out), tmp_path / "plain")

    assert caught.match(why) if why.endswith(")") else why.rstrip("$") == caught.value.why
    with pytest.raises(spikepatch.Refused, match="there is nothing to fold"):
        spikepatch.fold(str(tmp_path / "source"), tmp_path / "plain")


@pytest.mark.slow
def test_a_table_that_cannot_be_untied(tmp_path: Path) -> None:
    """T5 ties its three tables whatever its config says."""
    sizes = {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 96, "vocab_size": 500}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model("t5", **sizes, **tokens, architectures=["T5ForConditionalGeneration"])
    config.save_pretrained(tmp_path / "source")
    patched = spikepatch.convert(str(tmp_path / "source"), tmp_path / "patched")
    found = logits_elsewhere(patched.out, trust=True, auto_class="AutoModelForSeq2SeqLM")
    live: Any = transformers.T5ForConditionalGeneration(config).eval()
    spikepatch.patch(live, "scaled-embed", reinit="all")

    assert torch.equal(found["logits"], logits(live))
    assert found["problems"] == {}
    with pytest.raises(spikepatch.Refused, match="cannot be told from what shares its matrix") as caught:
        spikepatch.fold(str(patched.out), tmp_path / "plain")
    assert "shared.weight would have to hold two values" in caught.value.why


def test_code_is_compared_and_never_run(source: Path, tmp_path: Path) -> None:
    patched, marker = spikepatch.convert(str(source), tmp_path / "patched").out, tmp_path / "ran"
    for name in ("modeling_spikepatch_gpt2.py", "spikepatch_embedding.py"):
        text = (patched / name).read_text()
        (patched / name).write_text(f"open({str(marker)!r}, 'w')\n{text}")
        with pytest.raises(spikepatch.Refused, match=f"{name} is not the file that this version of spikepatch writes"):
            spikepatch.fold(str(patched), tmp_path / "plain")
        (patched / name).write_text(text)
    (patched / "spikepatch_embedding.py").unlink()
    with pytest.raises(spikepatch.Refused, match=r"spikepatch_embedding\.py is not the file"):
        spikepatch.fold(str(patched), tmp_path / "plain")

    assert not marker.exists()
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    "embeddings",
    [
        {"transformer.nothing": {"factor": 2.0}},
        {"transformer.wte": {"power": 2.0}},
        {"transformer.h": {"factor": 2.0}},
        {"transformer.wte": 7},
    ],
)
def test_a_record_that_fits_nothing(embeddings: Any, source: Path, tmp_path: Path) -> None:
    patched = spikepatch.convert(str(source), tmp_path / "patched").out
    config = json.loads((patched / "config.json").read_text())
    config["spikepatch"]["embeddings"] = embeddings
    (patched / "config.json").write_text(json.dumps(config))
    with pytest.raises(spikepatch.BadSource, match=r"config\.json has no usable record of the patch"):
        spikepatch.fold(str(patched), tmp_path / "plain")


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight"])
def test_a_failure_on_the_way_leaves_nothing(name: str, source: Path, tmp_path: Path) -> None:
    patched = spikepatch.convert(str(source), tmp_path / "patched").out
    weights = load_file(patched / "model.safetensors")
    weights[name][3, 4] = math.nan
    save_file(weights, patched / "model.safetensors", {"format": "pt"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(spikepatch.BadSource, match=f"{name} holds NaN") as caught:
        spikepatch.fold(str(patched), tmp_path / "plain")
    assert "the source's weights are not finite" in caught.value.why
    with pytest.raises(spikepatch.BadTarget, match="lies inside the source"):
        spikepatch.fold(str(patched), patched / "plain")

    assert sorted(tmp_path.iterdir()) == before


def test_weights_that_are_not_finite(source: Path, tmp_path: Path) -> None:
    patched = spikepatch.convert(str(source), tmp_path / "patched").out
    name, table = "transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight"

    def spoil(name: str, value: float) -> None:
        tensors = load_file(patched / "model.safetensors")
        tensors[name][0, :2] = value
        save_file(tensors, patched / "model.safetensors", metadata={"format": "pt"})

    spoil(name, math.nan)
    with pytest.raises(spikepatch.BadSource, match="holds NaN or infinite values") as refused:
        spikepatch.fold(str(patched), tmp_path / "out")
    assert name in refused.value.what
    assert "--allow-nonfinite" in refused.value.remedy
    assert not (tmp_path / "out").exists()
    result = spikepatch.fold(str(patched), tmp_path / "out", allow_nonfinite=True)
    assert f"'{name}' (2)" in result.notes[-1]
    assert load_file(result.out / "model.safetensors")[name].isnan().sum() == 2
    command = json.loads((result.out / "spikepatch.json").read_text())["command"]
    assert command == f"spikepatch fold {patched.name} OUT --allow-nonfinite"

    spoil(table, math.inf)
    with pytest.raises(spikepatch.BadSource, match=f"{table} holds NaN or infinite values"):
        spikepatch.fold(str(patched), tmp_path / "again", allow_nonfinite=True)


def test_overwrite_and_verify(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched, out = spikepatch.convert(str(source), tmp_path / "patched").out, tmp_path / "plain"
    spikepatch.fold(str(patched), out)
    before = hashes(out)
    (out / "left.txt").write_text("of the folder that is replaced")
    with pytest.raises(spikepatch.BadTarget, match="is not empty"):
        spikepatch.fold(str(patched), out)
    assert (out / "left.txt").exists()
    remains = tmp_path / ".plain.new.spikepatch" / "large"
    remains.parent.mkdir()
    remains.touch()
    (tmp_path / ".plain.lock.spikepatch").touch()
    monkeypatch.setattr(shutil, "disk_usage", full_while_there(remains))
    spikepatch.fold(str(patched), out, overwrite=True)

    assert hashes(out) == before
    assert spikepatch.verify(out).tensors == len(load_file(out / "model.safetensors"))


# A real model


@pytest.mark.slow
def test_smollm2_folds_into_a_plain_llama(smollm2: Path, tmp_path: Path) -> None:
    patched = spikepatch.convert(str(smollm2), tmp_path / "patched", reinit="none", factor=2.0)
    result = spikepatch.fold(str(patched.out), tmp_path / "plain")
    ids = AutoTokenizer.from_pretrained(result.out)("In the beginning", return_tensors="pt").input_ids
    plain, info = LlamaForCausalLM.from_pretrained(result.out, output_loading_info=True)
    with torch.no_grad():
        expected = load(patched.out, trust=True)(ids).logits
        found = plain(ids).logits

    assert not any(info.values())
    assert type(AutoModelForCausalLM.from_pretrained(result.out)) is LlamaForCausalLM
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert result.untied
    assert result.parameters == patched.parameters + 49152 * 576
    source = load_file(smollm2 / "model.safetensors")["model.embed_tokens.weight"]
    folded = load_file(result.out / "model.safetensors")
    assert torch.equal(folded["lm_head.weight"], source)
    assert torch.equal(folded["model.embed_tokens.weight"], 2 * source)  # a power of two: no rounding
