"""The README says what the program does: its commands and their output, and its Python.

What every page must be (short, with links that lead somewhere) is in `test_pages.py`; those of docs/ run in
`test_docs.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import ROOT
from tests.architectures import tiny_config
from tests.blocks import blocks
from tests.conftest import LocalHub
from tests.residual.test_golden import golden

pytestmark = pytest.mark.slow  # processes, trainings, or models at full size

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MARKED = {block.mark: block.text for block in blocks(TEXT) if block.mark}


def shell(command: str, folder: Path, **more: str) -> str:
    """What it prints, with the interpreter that runs the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **more, "PATH": path}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=folder, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_session_prints_what_is_shown(tmp_path: Path) -> None:
    """CI has run it in a fresh environment."""
    done = os.environ.get("SPIKEPATCH_README_SESSION")
    printed = Path(done, "printed.txt").read_text() if done else shell(MARKED["ci: session"], tmp_path)
    assert printed == MARKED["output: session"]


def test_the_first_command(tmp_path: Path, hub: LocalHub) -> None:
    """As it stands, from a hub that has a small model of this name; no weights are fetched."""
    command = next(block.text for block in blocks(TEXT))
    assert command.startswith("spikepatch convert gpt2 out/ ")
    tiny_config("gpt2", architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2/model.safetensors").write_bytes(b"not to be fetched")
    hub.add("gpt2", tmp_path / "gpt2")
    shell(command, tmp_path, **hub.environment(tmp_path / "home"))
    load = "import transformers as t; t.AutoModelForCausalLM.from_pretrained('out/', trust_remote_code=True)"
    shell(f'python -c "{load}"', tmp_path, HF_HUB_OFFLINE="1")


def test_python_runs(tmp_path: Path) -> None:
    found = [block.text for block in blocks(TEXT) if block.language == "python"]
    assert len(found) == 1
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", found[0]], cwd=tmp_path, check=True)
    assert (tmp_path / "patched/model.safetensors").exists()


def test_architectures_are_counted_as_in_the_golden_file() -> None:
    proven = Counter(key.partition("/")[0] for key, value in golden().items() if value.get("proven"))
    total = Counter(key.partition("/")[0] for key in golden())
    shown = re.findall(r"(\d+ of \d+)", " ".join(TEXT.split("**Maps**")[1].split("- **")[0].split()))
    assert shown == [f"{proven[task]} of {total[task]}" for task in ("causal", "seq2seq", "masked")]
