"""``spikepatch check``: what it prints, its exit codes, its files."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spikepatch.cli import main
from spikepatch.preflight.judge import Thresholds
from tests.architectures import tiny_config
from tests.preflight.test_check import KEYS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("source")
    tiny_config("gpt2").save_pretrained(folder)
    return str(folder)


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["check", *words])


def test_the_table(source: str) -> None:
    done = run(source, "--recipe", "embed-ln", "--tokens", "16", "--deep", "-v")
    assert done.exit_code == 0
    assert "sub-layers\n" not in run(source, "--tokens", "16").stdout
    assert "GPT2LMHeadModel: pre-norm, width d = 64, S = 6 sub-layers; 1 x 16 tokens" in done.stdout
    for words in (
        "as it is: at-risk",
        "embed-ln: stable",
        "Eq. 15 excess at layer 1",
        "Jacobian",
        "transformer.wte.weight",
    ):
        assert words in done.stdout
    assert done.stdout.count(f"remedy: spikepatch convert {source} OUT --recipe scaled-embed") == 1
    stream = r"note: the stream enters .*: .* \(Eq\. 14; 0\.0\d+, the limit is 0\.5\)"
    assert re.search(stream, done.stdout)
    assert "Not predicted: spikes" in done.stdout
    assert "mapping the residual stream ..." in done.stderr
    assert "..." not in done.stdout


def test_several_sources_are_told_apart(source: str, tmp_path: Path) -> None:
    tiny_config("gemma2").save_pretrained(tmp_path / "other")
    other = str(tmp_path / "other")
    done = run(source, other, "--recipe", "scaled-embed", "--tokens", "12", "-v")
    assert done.exit_code == 0
    assert f"{source}: GPT2LMHeadModel: pre-norm" in done.stdout
    assert f"{other}: Gemma2ForCausalLM: branch-norm" in done.stdout
    assert done.stdout.count("Not predicted: spikes") == 1
    assert "refused: " in done.stdout  # Gemma multiplies its embedding already
    assert done.stdout.count("scaled-embed: sub-layers") == 1  # what was refused has no table
    assert "- (-)" not in done.stdout
    quiet = run(source, other, "--tokens", "12", "-q")
    assert [line.partition(": ")[0] for line in quiet.stdout.splitlines()] == [source, other]


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


@pytest.mark.slow
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


def test_it_says_that_the_report_is_written(source: str, tmp_path: Path) -> None:
    page = str(tmp_path / "report.HTML")
    for words, out, err in (([], True, False), (["--json"], False, True), (["-q"], False, False)):
        done = run(source, "--tokens", "12", "--report", page, *words)
        assert done.exit_code == 0
        assert (f"wrote {page}\n" in done.stdout, f"wrote {page}\n" in done.stderr) == (out, err)
    assert json.loads(run(source, "--tokens", "12", "--report", page, "--json").stdout)["verdict"] == "at-risk"


@pytest.mark.parametrize(
    ("name", "message"),
    [("x.pdf", "written as .html or .htm or .svg"), ("x", "such as --report"), ("no/x.html", "is no folder")],
)
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(
    source: str, name: str, message: str, tmp_path: Path
) -> None:
    done = run(source, "--tokens", "12", "--report", str(tmp_path / name))
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert "..." not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device")
def test_a_report_into_a_device_is_refused_before_anything_is_measured(source: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.symlink_to("/dev/full")
    done = run(source, "--tokens", "12", "--report", str(page))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "it is no file, and a page is one" in done.stderr


@pytest.mark.parametrize("seed", [5_000_000_000, 2**64, 10**50])
def test_seeds_of_any_size(source: str, seed: int) -> None:
    done = run(source, "--tokens", "12", "--seed", str(seed), "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["seed"] == seed
    assert (
        json.loads(done.stdout)["initial_loss"]
        != json.loads(run(source, "--tokens", "12", "--json").stdout)["initial_loss"]
    )


def test_out_of_memory_is_a_refusal(source: str) -> None:
    """2^40 sequences fit into no machine's memory; torch's allocator says so, and no verdict is made of it."""
    done = run(source, "--tokens", "12", "--batch", str(2**40))
    assert done.exit_code == 2, done.output
    assert "does not fit into memory" in done.stderr
    assert "--batch 1" in done.stderr
    assert "unknown" not in done.stdout


@pytest.mark.parametrize(
    "raised", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize("deep", [True, False])
def test_memory_that_runs_out_half_way(
    source: str, raised: Exception, deep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object, **more: object) -> None:
        raise raised

    monkeypatch.setattr(f"spikepatch.preflight.forward.{'jacobian' if deep else 'run_piece'}", fails)
    done = run(source, "--tokens", "12", *(["--deep"] if deep else []))
    assert done.exit_code == 2, done.output
    assert "does not fit into memory" in done.stderr


@pytest.mark.slow
def test_progress_says_which_model_and_how_far(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(source, "--tokens", "12", "--recipe", "vanilla")
    for step in ("as it is: forward", "as it is: backward", "vanilla: forward", "vanilla: backward"):
        assert done.stderr.splitlines().count(f"{step} ...") == 1, step
    alone = run(source, "--tokens", "12", "--deep", "--steps", "4")
    assert {"forward ...", "backward ...", "optimiser steps ..."} <= set(alone.stderr.splitlines())
    assert "%" not in alone.stderr
    monkeypatch.setattr("spikepatch.commands.console._EVERY", -1.0)  # every one
    lines = run(source, "--tokens", "12", "--deep", "--steps", "4").stderr.splitlines()
    assert [line for line in lines if line.startswith("optimiser steps")] == [
        "optimiser steps ...",
        *(f"optimiser steps: {percent} % ..." for percent in (25, 50, 75, 100)),
    ]
    assert sum(line.startswith("forward: ") for line in lines) >= 3


def test_a_recipe_of_ones_own_has_its_own_name(source: str, tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    for file, std in ((first, 0.02), (second, 0.01)):
        file.write_text(f'name = "mine"\n[[transform]]\nkind = "small_init"\nbase = "normal"\nstd = {std}\n')
    done = run(source, "--tokens", "12", "--recipe", str(first), "--json")
    assert [model["recipe"] for model in json.loads(done.stdout)["models"]] == ["mine"]
    done = run(source, "--tokens", "12", "--recipe", str(first), "--recipe", str(second), "--json")
    assert [model["recipe"] for model in json.loads(done.stdout)["models"]] == [str(first), str(second)]


def test_more_tokens_than_positions(source: str) -> None:
    positions = tiny_config("gpt2").max_position_embeddings
    done = run(source, "--tokens", "5000", "--batch", "1")
    assert f"1 x {positions} tokens" in done.stdout
    assert f"note: sequences of {positions} tokens, not 5000: the model has no more positions" in done.stdout
    assert "no more positions" not in run(source, "--tokens", str(positions), "--batch", "1").stdout


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    """As `train` takes it: as bytes; or tokens that are given, which the model must have."""
    source = tmp_path / "model"
    tiny_config("gpt2", vocab_size=256, bos_token_id=0, eos_token_id=0).save_pretrained(source)
    lines, tokens = tmp_path / "text.jsonl", tmp_path / "train.bin"
    lines.write_text(json.dumps({"content": "In the beginning was the residual stream. " * 20}) + "\n")
    done = run(str(source), "--text", str(lines), "--text-column", "content", "--tokens", "16", "--json")
    assert done.exit_code == 0, done.output
    tokens.write_bytes(bytes([5, 0, 9, 0]) * 40)
    done = run(str(source), "--text", str(tokens), "--token-dtype", "uint16", "--tokens", "16", "--json")
    assert done.exit_code == 0, done.output
    tokens.write_bytes(bytes([5, 1]) * 40)
    done = run(str(source), "--text", str(tokens), "--token-dtype", "uint16", "--tokens", "16")
    assert done.exit_code == 2
    assert "the id 261 is among them" in done.stderr
    done = run(str(source), "--text", str(lines), "--tokens", "16")
    assert "--text-column NAME says which column" in done.stderr


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
    positions = tiny_config("gpt2").max_position_embeddings
    done = run(str(folder), "--text", str(text), "--tokens", str(positions + 1), "--batch", "1", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tokens"] == positions
    text.write_text("too short")
    assert run(str(folder), "--text", str(text), "--tokens", "16").exit_code == 2


def test_a_folder_of_pickles_is_told_what_helps_here(tmp_path: Path) -> None:
    tiny_config("gpt2").save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    done = run(str(tmp_path))
    assert done.exit_code == 2
    assert "for check a folder with the config.json alone" in done.stderr
    (tmp_path / "pytorch_model.bin").unlink()
    assert run(str(tmp_path), "--tokens", "12").exit_code == 0
