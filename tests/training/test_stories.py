"""What docs/train.md shows works: its blocks, as they stand there."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from spikepatch.cli import main
from spikepatch.training.log import read
from tests import ROOT
from tests.training.models import config_folder, text

pytestmark = pytest.mark.slow  # processes, trainings, or models at full size

PAGE = (ROOT / "docs/train.md").read_text(encoding="utf-8")
STORIES = dict(re.findall(r"<!-- story: (\w+) -->\n```\w+\n(.*?)\n```", PAGE, re.DOTALL))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    config_folder(tmp_path / "small", "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return tmp_path


def spikepatch(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def commands(story: str) -> list[list[str]]:
    """The lines of ``spikepatch`` in a block; those of python are run."""
    lines = shlex.split(STORIES[story].replace("\\\n", " ").replace("\n", " ; "), comments=True)
    found: list[list[str]] = [[]]
    for word in lines:
        if word == ";":
            found.append([])
        else:
            found[-1].append(word)
    for words in found:
        if words[:2] == ["python", "-c"]:
            exec(words[2].replace(" ; ", "\n"), {})  # the block's own Python
    return [words[1:] for words in found if words[:1] == ["spikepatch"]]


def test_own_tokens_a_tracker_and_python(here: Path) -> None:
    for story in ("tokens", "tracker"):
        (words,) = commands(story)
        done = spikepatch(*words)
        assert done.exit_code == 1, done.output  # four steps are too few to tell
        assert f"{here}/train.bin: raw tokens, uint16, taken as they are" in done.stderr
    assert list((here / "runs/tracked").rglob("events.out.tfevents*"))
    exec(STORIES["python"], {})
    logs = [read(here / f"runs/{out}/ours/lr1e-3-seed0/log.jsonl") for out in ("tokens", "python")]
    losses = [[step.loss for step in log.steps] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_own_trainer_on_two_processes(here: Path) -> None:
    (here / "trainer.py").write_text(STORIES["trainer"])
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "trainer.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", "-m", *torchrun]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no spike in 4 steps") == 1


def _rank(rank: int, environment: dict[str, str], said: Path) -> None:
    """As torchrun starts it, but for the imports."""
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    with said.with_suffix(f".{rank}").open("w") as file, contextlib.redirect_stdout(file):
        exec(compile(STORIES["loop"], "loop.py", "exec"), {})


def test_own_loop_on_two_processes(here: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    context: Any = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, environment, here / "said")) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()
        assert process.exitcode == 0
    assert [(here / f"said.{rank}").read_text() for rank in (0, 1)] == ["steps 4 events 0\n", ""]


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
