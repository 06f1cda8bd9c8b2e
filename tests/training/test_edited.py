"""Folders of trainings that somebody has edited: `report` and `--resume` refuse them, or show what they say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikepatch.errors import BadSource
from spikepatch.report.html import render
from spikepatch.training.folder import read_record
from spikepatch.training.outcome import outcome
from spikepatch.training.page import page_of
from spikepatch.training.tables import print_verdict
from tests.training.synthetic import calm, folder

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow of numbers that nobody logs


def spiky(model: str, lr: float, seed: int, step: int) -> float:
    return calm(model, lr, seed, step) + (8 if 40 <= step < 43 else 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("edited") / "x", curve=spiky, multipliers=(1, 2), steps=60)


def shown(path: Path) -> None:
    """All that `report` does."""
    found = outcome(path)
    render(page_of(found))
    print_verdict(found.verdict)


def test_a_whole_folder_is_shown(whole: Path) -> None:
    shown(whole)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settings", []), ("settings", {"steps": "60", "batch_tokens": 1}), ("lr", "1e-3"), ("lr", True),
        ("multipliers", [None]), ("seeds", 0), ("seeds", ["0"]), ("models", ["a"]), ("models", {"a": 1}),
        ("lr", 1e308), ("lr", float("inf")), ("lr", float("nan")),
        *(("models", {"a": {"name": name, "source": "x", "recipe": None, "patched": False}})
          for name in ("../x", "/x", "a/../../x", "a\0b", "x" * 300, "\ud800")),
        ("models", {"a": {"name": 3, "source": "x", "recipe": None, "patched": False}}),
        ("data", "x"), ("versions", {"torch": 2}), ("commands", "spikepatch train"), ("commands", [1]),
    ],
)  # fmt: skip
def test_a_record_of_other_types(name: str, value: Any, whole: Path, tmp_path: Path) -> None:
    record = json.loads((whole / "run.json").read_text()) | {name: value}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(BadSource, match=r"run\.json does not tell which runs there are"):
        read_record(tmp_path)


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_log_that_is_no_file(put: Callable[[Path], None], tmp_path: Path) -> None:
    log = next(folder(tmp_path / "x", steps=20).rglob("log.jsonl"))
    log.unlink()
    put(log)
    with pytest.raises(BadSource, match="the log cannot be read"):
        outcome(tmp_path / "x")
