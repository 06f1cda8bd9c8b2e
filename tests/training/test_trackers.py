"""What trackers are given: the numbers of steps and evaluations, by their names in the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from spikepatch.commands.train import train_command
from spikepatch.errors import Refused
from spikepatch.training import trackers

STEP = {
    "type": "step", "step": 3, "batch": 2, "loss": 1.5, "gradient_norm": None, "lr": 1e-3, "tokens": 96,
    "seconds": 0.25, "applied": True, "flags": [],
}  # fmt: skip
RECORDS: list[dict[str, Any]] = [
    {"type": "run", "lr": 2.0},
    STEP,
    {"type": "layers", "step": 3, "stream": [1.0]},
    {"type": "eval", "step": 3, "loss": 2.5},
]
ABOUT = {"name": "a", "recipe": None, "lr": 1e-3, "patched": True, "versions": {"torch": "2"}}


class Collecting(GeneralTracker):  # type: ignore[misc]
    name = "collecting"
    requires_logging_directory = False
    tracker = None

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


def test_what_a_tracker_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By accelerate, which makes trackers of any kind; ours are gone at the end, and the process group stays."""
    tracker, accelerator = Collecting(), Accelerator(cpu=True)
    monkeypatch.setattr(trackers, "filter_trackers", lambda names, logging_dir: [tracker])
    with trackers.tracking(accelerator, ["x"], "a/lr1e-3-seed0", tmp_path, ABOUT) as observe:
        for record in RECORDS:
            observe(record)
    assert accelerator.trackers == []
    assert tracker.calls == [
        "start",
        {"name": "a", "recipe": None, "lr": 1e-3, "patched": True},
        (3, {"loss": 1.5, "lr": 1e-3, "seconds": 0.25}),
        (3, {"eval_loss": 2.5}),
        "finish",
    ]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with trackers.tracking(Accelerator(cpu=True), ["tensorboard"], "a", tmp_path, ABOUT) as observe:
        for record in RECORDS:
            observe(record)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(3, 1.5)]
    assert [(e.step, e.value) for e in found.Scalars("eval_loss")] == [(3, 2.5)]


def test_all_of_accelerate_s() -> None:
    assert {*trackers.TRACKERS} == {name for name in LoggerType.list() if name != "all"}
    (option,) = (option for option in train_command.params if option.name == "log_with")
    assert [*option.type.choices] == sorted(trackers.TRACKERS)  # type: ignore[attr-defined]


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    trackers.check_installed([])
    with pytest.raises(Refused, match="pip install wandbless"):
        trackers.check_installed(["wandbless"])
