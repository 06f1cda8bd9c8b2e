"""Nothing appears that does not load as the model that was meant: each difference is found, and says which it is."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import spikepatch
from spikepatch.apply.folder.load_test import Wanted, differences
from spikepatch.apply.folder.loader import Loader, loader
from spikepatch.apply.generated.structure import restructure
from spikepatch.cli import main
from spikepatch.source.open import build_meta, open_source
from tests.architectures import tiny_model
from tests.remote_sources import save_style

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def process() -> Iterator[Loader]:
    """One fresh process, which loads all folders one after the other."""
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("SPIKEPATCH_LOAD_TEST", raising=False)
            found = stack.enter_context(loader(True))
        assert found is not None
        yield found


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: Path) -> tuple[Path, Wanted]:
    """A converted folder, with a tokenizer, and what it is to load as."""
    source = tmp_path_factory.mktemp("good") / "source"
    shutil.copytree(gpt2_tokenizer, source)
    tiny_model("gpt2", vocab_size=50257).save_pretrained(source)
    result = spikepatch.convert(str(source), source.with_name("out"), reinit="none", factor=3.0)
    model = build_meta(open_source(str(source), weights=True))
    restructure(model, result.plan)
    return result.out, Wanted(model, "SpikepatchGPT2LMHeadModel", "AutoModelForCausalLM", True)


def test_a_good_folder(good: tuple[Path, Wanted], process: Loader) -> None:
    folder, wanted = good
    assert [*differences(process, folder, wanted, tokenizer=True)] == []


def edited(folder: Path, **entries: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | entries))


def factor(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())["spikepatch"]
    record["embeddings"]["transformer.wte"]["factor"] = 3.01
    edited(folder, spikepatch=record)


def untied(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    head = {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
    save_file(tensors | head, folder / "model.safetensors", {"format": "pt"})
    edited(folder, tie_word_embeddings=False)


def plain_class(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    data |= data.pop("spikepatch")["original"]
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.ln_f.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def broken_code(folder: Path) -> None:
    file = folder / "spikepatch_model.py"
    file.write_text(file.read_text().replace("install(_model(self), config.spikepatch)", "raise OSError('no')"))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (factor, "its logits differ by up to"),
    (untied, "tied are none, and not lm_head.weight and transformer.wte.weight"),
    (plain_class, "its class is GPT2LMHeadModel, not SpikepatchGPT2LMHeadModel"),
    (missing, "missing keys: transformer.ln_f.bias"),
    (broken_code, "it does not load: OSError: no"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_difference_is_named(
    damage: Callable[[Path], None], words: str, good: tuple[Path, Wanted], process: Loader, tmp_path: Path
) -> None:
    folder, wanted = good
    copy = tmp_path / damage.__name__
    shutil.copytree(folder, copy)
    damage(copy)
    if damage is missing:  # what our own reading needs as well
        found = process.ask({"folder": str(copy), "auto_class": "AutoModelForCausalLM", "trust": True, "whole": True,
                             "inputs": None, "tensors": str(tmp_path / "t.safetensors"), "texts": None})  # fmt: skip
        assert found["problems"] == {"missing_keys": ["transformer.ln_f.bias"]}
        return
    assert any(words in sentence for sentence in differences(process, copy, wanted, tokenizer=False))


def test_buffers_that_nobody_fills_are_refused(load_test: None, tmp_path: Path) -> None:
    """The author's own class leaves them; ours does not."""
    source = save_style(tmp_path / "rotary", "rotary buffers")
    options: dict[str, Any] = {"recipe": "vanilla", "reinit": "residual", "trust_remote_code": True}
    with pytest.raises(spikepatch.Refused, match="does not load as the same model") as caught:
        spikepatch.convert(str(source), tmp_path / "out", **options)
    assert "buffers have other values: model.rotary" in caught.value.why
    assert "--storage code" in caught.value.why
    assert not (tmp_path / "out").exists()
    spikepatch.convert(str(source), tmp_path / "out", storage="code", **options)
    result = spikepatch.convert(str(source), tmp_path / "left", load_test=False, **options)
    assert json.loads((result.out / "spikepatch.json").read_text())["load_test"] == "left out"


def test_the_commands(load_test: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    for words in (
        ["convert", "source", "out", "--reinit", "none", "--factor", "3"],
        ["convert", "source", "left", "--reinit", "none", "--factor", "3", "--no-load-test"],
        ["fold", "out", "plain"],
    ):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
        manifest = json.loads((tmp_path / words[2] / "spikepatch.json").read_text())
        left = "--no-load-test" in words
        assert manifest["load_test"] == ("left out" if left else "passed")
        assert ("--no-load-test" in manifest["command"]) == left
        assert ("not tried whether it loads" in done.output) == left


@pytest.mark.parametrize("name", ["llama", "reads use_cache"])
def test_a_model_that_is_too_large(load_test: None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its structure at full size, its numbers at a small one."""
    own = name != "llama"
    source = save_style(tmp_path / "source", name) if own else tmp_path / "source"
    if own:
        edited(source, num_hidden_layers=4)
        spikepatch.convert(str(source), tmp_path / "deeper", recipe="vanilla", trust_remote_code=True)
        source = tmp_path / "deeper"
    else:
        tiny_model(name, num_hidden_layers=4).save_pretrained(source)
    small = tmp_path / "small"
    layers: list[int] = []

    def fits(model: Any) -> bool:
        layers.append(model.config.num_hidden_layers)
        return layers[-1] == 2

    for module in ("load_test", "convert"):
        monkeypatch.setattr(f"spikepatch.apply.folder.{module}.fits", fits)
    options: dict[str, Any] = {"reinit": "none", "factor": 3.0, "trust_remote_code": own}
    result = spikepatch.convert(str(source), small, **options)
    said = json.loads((result.out / "spikepatch.json").read_text())["load_test"]
    assert said == "passed, with numbers at a small size"
    assert {2, 4} == set(layers)
    assert any("too large to be run on this machine" in note for note in result.notes)


def test_a_process_that_dies_is_no_success() -> None:
    with contextlib.ExitStack() as stack:
        found = Loader(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.callback(found.close)
        found._process.kill()
        answer = found.ask({"whole": True})
    assert "the process ended with" in answer["error"]


def test_finite_numbers(good: tuple[Path, Wanted], process: Loader, tmp_path: Path) -> None:
    folder, wanted = good
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] = torch.nan
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    found = [*differences(process, copy, wanted, tokenizer=False)]
    assert found == ["the forward pass of the live model gives NaN or infinite logits"]
