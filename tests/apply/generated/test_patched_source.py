"""A patched folder as a source: it is taken for what it was before the patch, and nothing is applied twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import spikepatch
from spikepatch.cli import main
from spikepatch.source.tokenizer import SAMPLE
from tests.architectures import ids, tiny_config, tiny_model
from tests.folders import hashes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: Path) -> Path:
    """A GPT-2 with learned weights and the real vocabulary."""
    folder = tmp_path_factory.mktemp("source") / "gpt2"
    tiny_model("gpt2", vocab_size=50257).save_pretrained(folder)
    shutil.copytree(gpt2_tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def trained(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patched with the factor 3, trained for a step, saved as a Trainer saves, tokenizer beside it."""
    folder = tmp_path_factory.mktemp("trained")
    patched = spikepatch.convert(str(source), folder / "patched", reinit="none", factor=3.0)
    model = AutoModelForCausalLM.from_pretrained(patched.out, trust_remote_code=True).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=ids(model), labels=ids(model)).loss.backward()
    optimiser.step()
    model.save_pretrained(folder / "trained")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(patched.out / name, folder / "trained" / name)
    return folder / "trained"


def embeddings(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text())["spikepatch"]["embeddings"])


def test_another_factor_takes_the_place_of_the_first(trained: Path, tmp_path: Path) -> None:
    before = hashes(trained)
    result = spikepatch.convert(str(trained), tmp_path / "out", reinit="none", factor=5.0)
    model: Any = AutoModelForCausalLM.from_pretrained(trained, trust_remote_code=True)
    tokens = AutoTokenizer.from_pretrained(trained)(SAMPLE, return_tensors="pt").input_ids[:, :64]
    with torch.no_grad():
        loss = float(model(input_ids=tokens, labels=tokens).loss)
    again: Any = AutoModelForCausalLM.from_pretrained(result.out, trust_remote_code=True)
    rows = again.get_input_embeddings()(tokens)
    old, new = load_file(trained / "model.safetensors"), load_file(result.out / "model.safetensors")

    assert hashes(trained) == before
    assert embeddings(result.out) == {"transformer.wte": {"factor": 5.0}}
    assert (
        "is patched already (scaled-embed, transformer.wte: output * 3): the new plan takes the old one's"
        in result.notes[1]
    )
    assert result.notes[1].endswith("and the learned weights were trained with the old one")
    assert torch.equal(rows, 5.0 * model.get_input_embeddings().weight[tokens])
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    # The source is what was trained, patch included.
    assert result.drift[0].loss == pytest.approx(loss, rel=1e-5)
    assert result.drift[1].kl > 0


def test_a_dry_run_compares_with_the_patch_and_without(trained: Path, tmp_path: Path) -> None:
    result = spikepatch.convert(str(trained), tmp_path / "out", reinit="none", factor=5.0, dry_run=True)
    rows = {row.model: row for row in result.drift}

    assert {"source", "factor 1", "factor 5"} < rows.keys()
    assert rows["source"].stream[0] > 2 * rows["factor 1"].stream[0]
    assert rows["factor 1"].kl > 0


def test_the_same_again_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(spikepatch.Refused, match="patched already, with just this"):
        spikepatch.convert(str(trained), tmp_path / "out", reinit="none", factor=3.0)
    result = spikepatch.convert(str(trained), tmp_path / "out", reinit="residual", factor=3.0)

    assert embeddings(result.out) == {"transformer.wte": {"factor": 3.0}}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["scaled-embed", "embed-ln", "vanilla"])
def test_fresh_weights_need_the_structure_only(recipe: str, source: Path, trained: Path, tmp_path: Path) -> None:
    """The same tensors and the same config as from the model before the patch."""
    one, two = (spikepatch.convert(str(s), tmp_path / s.name, recipe=recipe, seed=3) for s in (source, trained))
    configs = [json.loads((result.out / "config.json").read_text()) for result in (one, two)]

    assert one.storage == two.storage
    assert hashes(one.out)["model.safetensors"] == hashes(two.out)["model.safetensors"]
    assert configs[0] == configs[1]
    assert {p.name for p in one.out.glob("*.py")} == {p.name for p in two.out.glob("*.py")}


def test_a_learned_norm_is_not_replaced(source: Path, tmp_path: Path) -> None:
    patched = spikepatch.convert(str(source), tmp_path / "patched", recipe="embed-ln", reinit="none").out
    for recipe in ("scaled-embed", "embed-ln", "vanilla"):
        with pytest.raises(spikepatch.Refused, match="learned norm behind the embedding cannot be replaced") as caught:
            spikepatch.convert(str(patched), tmp_path / "out", recipe=recipe, reinit="residual")
        assert "spikepatch fold" in caught.value.remedy
    folded = spikepatch.fold(str(patched), tmp_path / "plain").out
    result = spikepatch.convert(str(folded), tmp_path / "out", reinit="none", factor=2.0)

    assert embeddings(result.out) == {"transformer.wte": {"factor": 2.0}}


@pytest.mark.parametrize(("model_type", "storage"), [("granite", "native"), ("llama", "host")])
def test_without_code_as_well(model_type: str, storage: Any, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "source")
    options: dict[str, Any] = {"reinit": "none", "storage": storage}
    first = spikepatch.convert(str(tmp_path / "source"), tmp_path / "first", factor=3.0, **options)
    second = spikepatch.convert(str(first.out), tmp_path / "second", factor=5.0, **options)
    straight = spikepatch.convert(str(tmp_path / "source"), tmp_path / "straight", factor=5.0, **options)
    configs = [json.loads((result.out / "config.json").read_text()) for result in (second, straight)]

    assert {result.storage for result in (first, second, straight)} == {storage}
    assert configs[0] == configs[1]
    assert hashes(second.out)["model.safetensors"] == hashes(tmp_path / "source")["model.safetensors"]
    with pytest.raises(spikepatch.Refused, match="patched already, with just this"):
        spikepatch.convert(str(second.out), tmp_path / "third", factor=5.0, **options)


def test_inspect_shows_it_as_it_is(trained: Path) -> None:
    shown = CliRunner().invoke(main, ["inspect", str(trained), "--json"])
    (token,) = (e for e in json.loads(shown.stdout)["embeddings"] if e["kind"] == "token")

    assert shown.exit_code == 0
    assert token["scale"] == 3.0


def test_code_that_is_not_ours_is_not_guessed(trained: Path, tmp_path: Path) -> None:
    changed, marker = tmp_path / "changed", tmp_path / "ran"
    shutil.copytree(trained, changed)
    file = changed / "modeling_spikepatch_gpt2.py"
    file.write_text(f"open({str(marker)!r}, 'w')\n{file.read_text()}")
    for reinit in ("all", "none"):
        with pytest.raises(spikepatch.Refused, match=r"is not the file that this version of spikepatch writes"):
            spikepatch.convert(str(changed), tmp_path / "out", reinit=reinit, factor=5.0)

    assert not marker.exists()


def test_a_record_without_the_original(tmp_path: Path) -> None:
    tiny_config("gpt2", spikepatch={"recipe": "r", "embeddings": {"transformer.wte": {"factor": 2.0}}}).save_pretrained(
        tmp_path / "source"
    )
    with pytest.raises(spikepatch.Refused, match="its config does not say what it was before"):
        spikepatch.convert(str(tmp_path / "source"), tmp_path / "out")
