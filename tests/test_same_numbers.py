"""What two commands print of one model is one number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spikepatch.cli import main
from spikepatch.training.log import read
from tests.training.models import SMALL, config_folder, text


def said(*words: object) -> Any:
    done = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(params=[pytest.param("weights", marks=pytest.mark.slow), "config", "converted"])
def model(request: pytest.FixtureRequest, save_tiny: Callable[..., Path], tmp_path: Path) -> tuple[Path, str]:
    """A folder, and the weights that a recipe keeps of it."""
    if request.param == "config":
        return config_folder(tmp_path / "model", "llama"), "all"
    folder = save_tiny("gpt2", vocab_size=256, bos_token_id=0, eos_token_id=0, **SMALL["gpt2"])
    if request.param == "converted":
        said("convert", folder, tmp_path / "model", "--recipe", "embed-detach", "--no-load-test")
        folder = tmp_path / "model"
    return folder, "none"


def test_side_by_side(model: tuple[Path, str], tmp_path: Path) -> None:
    folder, reinit = model
    own = ("--recipe", "scaled-embed", "--reinit", reinit)
    looked = said("inspect", folder)
    dry = said("convert", folder, tmp_path / "out", *own, "--dry-run")
    done = said("convert", folder, tmp_path / "out", *own, "--no-load-test")
    checked = said("check", folder, "--tokens", 16, *own)
    verified = said("verify", tmp_path / "out")
    written = json.loads((tmp_path / "out/spikepatch.json").read_text())
    (recipe,) = checked["models"]

    assert written["plan"]["source"] == folder.name  # what others read tells nothing of where it lay
    for plan in (dry["plan"], done["plan"]):
        assert plan | {"source": Path(plan["source"]).name} == written["plan"]
    (stream,) = done["plan"]["streams"]
    assert {m["width"] for m in (looked, checked, recipe, stream, done["residual"])} == {looked["width"]}
    assert {m["sublayers"] for m in (looked, checked, recipe, done["residual"])} == {len(stream["sublayers"])}
    assert {m["placement"] for m in (looked, checked, recipe, done["residual"])} == {looked["placement"]}
    assert {m["architecture"] for m in (looked, done["plan"], done["residual"])} == {looked["architecture"]}
    assert done["log_vocab"] == checked["log_vocab"] == recipe["log_vocab"]
    assert (dry["bytes"], dry["parameters"]) == (done["bytes"], done["parameters"])
    assert (verified["bytes"], verified["bytes"]) == (done["bytes"], 4 * done["parameters"])
    assert len(verified["folder"]) > 0 < verified["tensors"]

    # What was written is the model that was compared: the stream's size, the loss and the gradients are its own.
    again = said("check", tmp_path / "out", "--tokens", 16)
    for name in ("sigma_start", "sigma_end", "initial_loss", "gradient_ratio", "eq15_excess_layer1"):
        assert again[name] == recipe[name], name
    assert [layer["sigma_in"] for layer in again["layers"]] == [layer["sigma_in"] for layer in recipe["layers"]]


@pytest.mark.slow
def test_of_a_training(model: tuple[Path, str], tmp_path: Path) -> None:
    """The same plan, the same number of parameters, and the commit and config of the same source."""
    folder, reinit = model
    text(tmp_path)
    words = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "x"), "--steps", "1", "--lr", "1e-3"]
    words += ["--batch-tokens", "64", "--seq-len", "16", "--watch-every", "0"]
    done = CliRunner().invoke(main, ["train", f"a={folder}@scaled-embed", *words])
    assert done.exit_code == 1, done.output
    converted = said("convert", folder, tmp_path / "out", "--reinit", reinit, "--no-load-test")
    run = tmp_path / "x/a/lr1e-3-seed0"
    plan = json.loads((run / "model/spikepatch.json").read_text())["plan"]
    assert plan | {"source": ""} == converted["plan"] | {"source": ""}
    assert read(run / "log.jsonl").run.parameters == converted["parameters"]
    assert said("verify", run / "model")["bytes"] == converted["bytes"]
