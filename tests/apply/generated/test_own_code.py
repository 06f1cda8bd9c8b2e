"""Models with their own modelling code: their files lie beside the generated ones, which derive from them."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import spikepatch
from tests.elsewhere import logits_elsewhere
from tests.own_code import FILES, save_own


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_own(tmp_path_factory.mktemp("own") / "author")


def convert(source: Path, out: Path, **options: Any) -> spikepatch.Conversion:
    return spikepatch.convert(str(source), out, trust_remote_code=True, **options)


def carried(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def test_code_is_not_run_unasked(own: Path, tmp_path: Path) -> None:
    with pytest.raises(spikepatch.Refused, match="needs code that comes with the model"):
        spikepatch.convert(str(own), tmp_path / "out")


@pytest.mark.slow
def test_a_subclass_beside_the_authors_files(own: Path, tmp_path: Path) -> None:
    result = convert(own, tmp_path / "out", reinit="none", factor=3.0, storage="code")
    live: Any = AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True).eval()
    spikepatch.patch(live, "scaled-embed", reinit="none", factor=3.0)
    saved = spikepatch.save(live, tmp_path / "saved")
    for folder in (result.out, saved):
        found = logits_elsewhere(folder, trust=True)
        files = carried(folder)
        with torch.no_grad():
            assert torch.equal(found["logits"], live(**found["inputs"]).logits)
        assert (found["class"], found["problems"]) == ("SpikepatchOwnForCausalLM", {})
        assert {name: files[name] for name in FILES} == FILES
        assert files.keys() - FILES.keys() == {
            "modeling_spikepatch_own_decoder.py",
            "spikepatch_embedding.py",
            "spikepatch_fresh.py",
            "spikepatch_model.py",
        }
    generated = (result.out / "modeling_spikepatch_own_decoder.py").read_text()
    assert len(generated.splitlines()) <= 150
    assert ast.get_docstring(ast.parse(generated))
    assert generated == (saved / "modeling_spikepatch_own_decoder.py").read_text()
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (result.out, own))
    assert config["model_type"] == "spikepatch_own-decoder"
    assert config["spikepatch"]["original"]["auto_map"] == original["auto_map"]


def test_a_setting_of_its_own_is_found(own: Path, tmp_path: Path) -> None:
    """Nothing says that ``signal`` multiplies the embedding but its forward pass."""
    result = convert(own, tmp_path / "out")

    assert (result.storage, result.trust) == ("native", True)
    assert "signal = 8.0 makes the plain OwnForCausalLM the patched model" in " ".join(result.notes)
    assert carried(result.out) == FILES


def test_new_weights_alone_leave_it_its_own(own: Path, tmp_path: Path) -> None:
    result = convert(own, tmp_path / "out", recipe="vanilla")
    config = json.loads((result.out / "config.json").read_text())

    assert (result.storage, result.trust) == ("plain", True)
    assert config["auto_map"] == json.loads((own / "config.json").read_text())["auto_map"]
    assert carried(result.out) == FILES


def test_a_tokenizer_of_its_own_is_carried(own: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_own(source)
    (source / "tokenization_own.py").write_text("from .helper_own import x\n")
    (source / "helper_own.py").write_text("x = 1\n")
    (source / "unrelated.py").write_text("y = 1\n")
    (source / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}})
    )
    result = convert(source, tmp_path / "out", recipe="vanilla")

    assert carried(result.out).keys() == FILES.keys() | {"tokenization_own.py", "helper_own.py"}


def test_folding_gives_the_authors_model_back(own: Path, tmp_path: Path) -> None:
    patched = convert(own, tmp_path / "patched", reinit="none", factor=3.0, storage="code")
    with pytest.raises(spikepatch.Refused, match="needs code that comes with the model"):
        spikepatch.fold(str(patched.out), tmp_path / "plain")
    result = spikepatch.fold(str(patched.out), tmp_path / "plain", trust_remote_code=True)
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for folder in (patched.out, result.out)
    ]
    ids = torch.arange(5, 17)[None]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (own, result.out))
    command = json.loads((result.out / "spikepatch.json").read_text())["command"]

    assert command == f"spikepatch fold {patched.out.name} OUT --trust-remote-code"
    assert result.trust
    assert result.untied
    assert carried(result.out) == FILES
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    assert after == before | {"tie_word_embeddings": False}


def test_what_acts_on_more_than_a_row_is_not_folded(tmp_path: Path) -> None:
    """A norm over a sum of rows is no norm of rows."""
    source = save_own(tmp_path / "source", mixed=True)
    patched = convert(source, tmp_path / "patched", reinit="none", factor=3.0, replace=True, storage="code")
    config = json.loads((patched.out / "config.json").read_text())
    config["spikepatch"]["embeddings"]["model.tokens"] = {"norm": "layernorm", "eps": 1e-5, "affine": False}
    for record in (config["spikepatch"]["embeddings"], {"model.tokens": {"factor": 3.0}}):
        config["spikepatch"]["embeddings"] = record
        (patched.out / "config.json").write_text(json.dumps(config))
        with pytest.raises(spikepatch.Refused, match="folding is not proven exact") as caught:
            spikepatch.fold(str(patched.out), tmp_path / "plain", trust_remote_code=True)
        assert "acts on more than single rows of its table" in caught.value.why
    assert not (tmp_path / "plain").exists()
