"""The command itself: what it prints where, how fast it answers, and how it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spikepatch.cli import main
from tests.architectures import tiny_config

COMMAND = [sys.executable, "-m", "spikepatch"]

#: The fields of the issue's example of `inspect --json`, and the types of their values.
CONTRACT: dict[str, Any] = {
    "source": str,
    "model_type": str,
    "architecture": str,
    "width": int,
    "layers": int,
    "sublayers": int,
    "placement": str,
    "proven": bool,
    "leaks": list,
    "embeddings": [{"module": str, "parameter": str, "kind": str, "scale": float, "normed": bool}],
    "residual_projections": [{"parameter": str, "layer": int, "sublayer": int, "kind": str, "between": list}],
    "norms": [{"module": str, "role": str, "kind": str, "eps": float, "layer": (int, type(None)), "gain": str}],
    "head": {"parameter": str, "tied": bool},
    "matrices": [{"parameter": str, "fan_in": int, "fan_out": int, "in_axis": int, "out_axis": int}],
    "tied": [list],
    "streams": list,
}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("source")
    tiny_config("gpt2").save_pretrained(folder)
    return str(folder)


def test_help_is_light() -> None:
    script = """
import sys
from click.testing import CliRunner
from spikepatch.cli import main
for words in (["--help"], ["convert", "--help"], ["inspect", "--help"], ["recipes"], ["--version"]):
    assert CliRunner().invoke(main, words).exit_code == 0, words
print(sorted({"torch", "transformers", "numpy", "libcst", "rich", "huggingface_hub"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert "Usage: python -m spikepatch" in done.stdout

    assert min(seconds) < 0.5


def test_every_option_of_convert_is_explained() -> None:
    shown = CliRunner().invoke(main, ["convert", "--help"]).output
    options = "recipe reinit factor positions untie storage seed dtype max-shard-size revision trust-remote-code"

    for option in (*options.split(), "overwrite", "dry-run", "json"):
        assert re.search(rf"^  --{option}\b.*\S", shown, re.MULTILINE), option
    assert "arch:TYPE" in shown


def test_recipes() -> None:
    shown = CliRunner().invoke(main, ["recipes"]).output
    blocks = {block.split()[0]: block for block in shown.split("\n\n")}

    for name, conditions in {
        "scaled-embed": ("small sub-layers: yes", "large shortcut: yes"),
        "embed-ln": ("small sub-layers: yes", "large shortcut: yes"),
        "vanilla": ("small sub-layers: yes", "large shortcut: no"),
    }.items():
        assert all(condition in blocks[name] for condition in conditions)
        assert "N(0, 2/(5d))" in blocks[name]
        assert "arXiv 2312.16903" in blocks[name]
    assert shown.startswith("scaled-embed (default)\n")


def test_convert_prints_the_result_on_stdout_and_progress_on_stderr(source: str, tmp_path: Path) -> None:
    done = run("convert", source, str(tmp_path / "out"))

    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "reading the source ...",
        "mapping the residual stream ...",
        "choosing how it is stored ...",
        "writing weights ...",
        "checking what was written ...",
    ]
    lines = done.stdout.splitlines()
    assert lines[0] == "fresh weights: a model to pre-train"
    assert "GPT2LMHeadModel: width d = 64, S = 6 sub-layers, proven" in lines
    assert "  transformer.wte: output * 8 = sqrt(d)" in lines
    assert lines[-1] == f'load it with AutoModelForCausalLM.from_pretrained("{tmp_path}/out", trust_remote_code=True)'


def test_convert_as_json(source: str, tmp_path: Path) -> None:
    done = run("convert", source, str(tmp_path / "out"), "--json")
    result = json.loads(done.stdout)

    assert done.returncode == 0
    assert (result["storage"], result["dtype"], result["out"]) == ("code", "float32", str(tmp_path / "out"))
    assert result["notes"][0] == "fresh weights: a model to pre-train"
    assert result["plan"]["recipe"] == "scaled-embed"
    assert result["residual"]["proven"]


def test_a_dry_run_lists_what_is_left_alone(source: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["convert", source, str(tmp_path / "out"), "--dry-run"])

    assert done.exit_code == 0
    assert "dry run, nothing written" in done.output
    assert re.search(r"^  transformer\.h\.0\.ln_1\.weight +not a weight", done.output, re.MULTILINE)
    assert not (tmp_path / "out").exists()


def assert_has(data: Any, contract: Any) -> None:
    if isinstance(contract, dict):
        assert contract.keys() <= data.keys()
        for name, part in contract.items():
            assert_has(data[name], part)
    elif isinstance(contract, list):
        assert data
        for item in data:
            assert_has(item, contract[0])
    else:
        assert isinstance(data, contract), (data, contract)


def test_inspect_as_json() -> None:
    done = run("inspect", "arch:gpt2", "--json")
    data = json.loads(done.stdout)

    assert done.returncode == 0
    assert_has(data, CONTRACT)
    assert (data["source"], data["model_type"], data["architecture"]) == ("arch:gpt2", "gpt2", "GPT2LMHeadModel")
    assert (data["width"], data["layers"], data["sublayers"], data["placement"]) == (768, 12, 24, "pre-norm")
    assert (data["proven"], data["leaks"], data["streams"]) == (True, [], [])
    assert data["head"] == {"parameter": "lm_head.weight", "tied": True}
    token = {"module": "transformer.wte", "parameter": "transformer.wte.weight", "kind": "token"}
    token_as_it_is = token | {"scale": 1.0, "normed": False}
    assert token_as_it_is.items() <= data["embeddings"][0].items()
    projection = {"parameter": "transformer.h.0.attn.c_proj.weight", "layer": 0, "sublayer": 0, "kind": "attention"}
    assert projection.items() <= data["residual_projections"][0].items()
    norm = {"module": "transformer.h.0.ln_1", "role": "pre", "kind": "layernorm", "eps": 1e-05, "layer": 0}
    assert any(norm.items() <= found.items() for found in data["norms"])


def test_inspect_cuts_no_name(tmp_path: Path) -> None:
    tiny_config("gemma2").save_pretrained(tmp_path)
    done = subprocess.run(
        [*COMMAND, "inspect", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "40"},
    )

    for name in ("model.layers.*.self_attn.o_proj.weight", "model.layers.*.post_feedforward_layernorm"):
        assert any(name in line.split() for line in done.stdout.splitlines())
    assert "layers 0-2" in done.stdout
    assert done.stdout.splitlines()[1].startswith("proven: ")
    assert done.stderr == "mapping the residual stream ...\n"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["convert"], 2),
        (["convert", "arch:gpt2", "out", "--reinit", "some"], 2),
        (["convert", "arch:nothing", "out"], 2),
        (["no-such-command"], 2),
    ],
)
def test_exit_codes(words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert CliRunner().invoke(main, words).exit_code == code
    assert list(tmp_path.iterdir()) == []


def test_an_exception_of_our_own_is_reported_as_a_bug(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("of our own")

    monkeypatch.setattr("spikepatch.conversion.check_shards", fail)
    done = CliRunner().invoke(main, ["convert", source, str(tmp_path / "out")])

    assert done.exit_code == 3
    assert "KeyError: 'of our own'" in done.output
    assert "this is a bug in spikepatch" in done.output
    assert "report it" in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_terminal_gets_a_bar_and_whole_lines(source: str, tmp_path: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200", "LINES": "50"}
    process = subprocess.Popen(
        [*COMMAND, "convert", source, str(tmp_path / "out")],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
    )
    os.close(follower)
    received = bytearray()
    while True:
        try:
            data = os.read(leader, 1 << 16)
        except OSError:  # Linux reports the end of a pseudo-terminal so
            break
        if not data:
            break
        received += data
    os.close(leader)

    assert process.wait() == 0
    text = received.decode()
    assert "\x1b[" in text
    assert "━" in text
    assert "mapping the residual stream" in text
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip("\r") for line in text.split("\n")]
    result = lines[next(i for i, line in enumerate(lines) if line.endswith("fresh weights: a model to pre-train")) :]
    assert any("loads with trust_remote_code=True" in line for line in result)
    assert any(line.startswith("load it with AutoModelForCausalLM") for line in result)
    assert not any("━" in line for line in result[1:])
    assert "it/s]" not in text


def test_architectures() -> None:
    result = CliRunner().invoke(main, ["architectures", "--filter", "openai-gpt", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["type"], row["proven"], row["placement"]) == ("openai-gpt", True, "post-norm")
    table = CliRunner().invoke(main, ["architectures", "--filter", "openai-gpt"]).stdout
    assert "1 of 1 proven" in table
