"""``spikepatch check``: what it prints, its exit codes, its files."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spikepatch.cli import main
from spikepatch.preflight.verdict import Thresholds
from tests.architectures import tiny_config
from tests.preflight.test_check import KEYS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("source")
    tiny_config("gpt2").save_pretrained(folder)
    return str(folder)


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["check", *words])


def test_every_option_is_explained() -> None:
    shown = run("--help").output
    options = (
        "recipe reinit factor positions untie tokens batch text seed device deep steps lr threshold report json fail-on"
        " revision trust-remote-code"
    )
    for option in options.split():
        assert re.search(rf"^  --{option}\b.*\S", shown, re.MULTILINE), option


def test_the_table(source: str) -> None:
    done = run(source, "--recipe", "embed-ln", "--tokens", "16", "--deep", "-v")
    assert done.exit_code == 0
    assert "sub-layers\n" not in run(source, "--tokens", "16").stdout
    assert "GPT2LMHeadModel: pre-norm, width d = 64, S = 6 sub-layers; 2 x 16 tokens" in done.stdout
    for words in (
        "as it is: at-risk",
        "embed-ln: stable",
        "Eq. 15 excess at layer 1",
        "Jacobian",
        "transformer.wte.weight",
    ):
        assert words in done.stdout
    assert done.stdout.count(f"remedy: spikepatch convert {source} OUT --recipe scaled-embed") == 1
    stream = r"at-risk: the stream enters .*: .* \(Eq\. 14; 0\.0\d+, the limit is 0\.5\)"
    assert re.search(stream, done.stdout)
    assert "Not predicted: spikes" in done.stdout
    assert "mapping the residual stream ..." in done.stderr
    assert "..." not in done.stdout


def test_the_help_names_every_threshold() -> None:
    shown = " ".join(run("--help").output.split())
    for field in dataclasses.fields(Thresholds):
        assert field.name in shown


def test_json(source: str) -> None:
    done = run(source, "--tokens", "16", "--json")
    assert done.exit_code == 0
    data = json.loads(done.stdout)
    assert data.keys() >= KEYS
    assert data["verdict"] == "at-risk"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 0),
        (["--fail-on", "at-risk"], 1),
        (["--fail-on", "unstable"], 0),
        (["--fail-on", "at-risk", "--recipe", "embed-ln"], 0),
        (["--fail-on", "at-risk", "--recipe", "embed-ln", "--recipe", "vanilla"], 1),
        (["--fail-on", "unstable", "--threshold", "ratio_unstable=0.5", "--threshold", "ratio_at_risk=0.1"], 1),
        (["--threshold", "nothing=1"], 2),
        (["--threshold", "excess"], 2),
        (["--recipe", "nothing"], 2),
        (["--text", "nowhere.txt"], 2),
        (["--tokens", "1"], 2),
    ],
)
def test_exit_codes(source: str, words: list[str], code: int) -> None:
    done = run(source, "--tokens", "12", *words)
    assert done.exit_code == code, done.output


def test_our_own_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("spikepatch.preflight.check.check", broken)
    done = run(source)
    assert done.exit_code == 3
    assert "bug in spikepatch" in done.stderr


def test_a_source_that_is_not_there() -> None:
    assert run("./nowhere").exit_code == 2


def test_the_report(source: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = run(source, "--recipe", "scaled-embed", "--tokens", "12", "--steps", "2", "--report", str(page))
    assert done.exit_code == 0
    text = page.read_text()
    for words in ("Pre-flight:", "at-risk", "scaled-embed", "Gradient at each layer", "Optimiser steps", "<svg"):
        assert words in text
    assert run(source, "--tokens", "12", "--report", str(tmp_path / "curves.svg")).exit_code == 0
    picture = (tmp_path / "curves.svg").read_text()
    assert "Bound of the MLP" in picture
    assert "Gradient at each layer" in picture
    refused = run(source, "--tokens", "12", "--report", str(tmp_path / "no" / "folder.html"))
    assert refused.exit_code == 2


def test_text_takes_the_tokenizer_of_the_source(gpt2_tokenizer: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(gpt2_tokenizer, folder)
    tiny_config("gpt2", vocab_size=50257).save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("In the beginning was the residual stream. " * 20)
    done = run(str(folder), "--text", str(text), "--tokens", "16", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tokens"] == 16
    text.write_text("too short")
    assert run(str(folder), "--text", str(text), "--tokens", "16").exit_code == 2
