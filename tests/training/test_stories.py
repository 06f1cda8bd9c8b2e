"""The line that an interrupted training says is tried; docs/train.md shows the rest (`tests/test_docs.py`)."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from spikepatch.cli import main
from spikepatch.training.log import read
from tests.training.models import config_folder, text

pytestmark = pytest.mark.slow  # processes, trainings, or models at full size


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    config_folder(tmp_path / "small", "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return tmp_path


def spikepatch(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def _interrupted(words: list[str], said: Path) -> None:
    torch.set_num_threads(1)
    with said.open("w") as file, contextlib.redirect_stderr(file):
        main(words, prog_name="spikepatch")


def test_going_on_after_an_interruption(here: Path) -> None:
    """The line that it says is tried."""
    text(here)
    more = ["--steps", "400", "--lr", "1e-3", "--seq-len", "32", "--batch-tokens", "64", "--checkpoint-every", "2"]
    words = ["train", "a=small", "--data", "text.txt", "--out", "runs/my x", "--schedule", "constant", *more]
    context: Any = multiprocessing.get_context("fork")
    process = context.Process(target=_interrupted, args=(words, here / "said.txt"))
    process.start()
    store = here / "runs/my x/a/lr1e-3-seed0/checkpoints"
    while process.is_alive() and not list(store.glob("step-*")):
        time.sleep(0.01)
    process.terminate()
    process.join()
    assert process.exitcode == 128 + 15
    (line,) = re.findall(r"go on with: spikepatch (.*)", (here / "said.txt").read_text())
    record = here / "runs/my x/run.json"
    assert spikepatch(*shlex.split(line), "--steps", "399").exit_code == 2
    record.write_text(record.read_text().replace('"steps": 400', '"steps": 20'))  # what is left of 400 would take long
    done = spikepatch(*shlex.split(line))
    assert done.exit_code == 1, done.output
    assert [step.step for step in read(store.parent / "log.jsonl").kept][-1] == 20
