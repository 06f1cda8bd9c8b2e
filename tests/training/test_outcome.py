"""Folders of one training that are read together, as those of seeds that ran side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spikepatch.cli import main
from spikepatch.errors import Refused
from spikepatch.training.curves import arm_panels
from spikepatch.training.outcome import outcome
from spikepatch.training.page import page_of
from tests.training.synthetic import calm, folder

STEPS = 120


def spiky(model: str, lr: float, seed: int, step: int) -> float:
    return calm(model, lr, seed, step) + (8 if model == "vanilla" and 70 <= step < 70 + seed else 0)


def make(path: Path, **options: Any) -> Path:
    return folder(path, curve=spiky, steps=STEPS, **options)


def edit(path: Path, **changes: Any) -> None:
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(record | changes))


def test_seeds_in_two_folders_are_those_in_one(tmp_path: Path) -> None:
    whole = outcome(make(tmp_path / "whole", seeds=(0, 1, 2)))
    parts = outcome(make(tmp_path / "a", seeds=(0, 1)), make(tmp_path / "b", seeds=(2,)))
    assert parts.verdict == whole.verdict
    assert [arm.with_events for arm in parts.verdict.arms] == [2, 0]
    assert [arm.fisher for arm in parts.verdict.arms] == [None, pytest.approx(0.4)]
    assert parts.record["seeds"] == [0, 1, 2]
    assert parts.record["commands"] == ["spikepatch train --out a", "spikepatch train --out b"]
    assert [s.title for s in page_of(parts).sections] == [s.title for s in page_of(whole).sections]


def test_models_in_two_folders_see_the_same_batches(tmp_path: Path) -> None:
    """An event that both have at one step is the data's, wherever the other one lies."""

    def both(model: str, lr: float, seed: int, step: int) -> float:
        return calm(model, lr, seed, step) + (8 if 220 <= step < 223 else 0)

    names = ("vanilla", "patched")
    paths = [folder(tmp_path / name, (name,), curve=both, steps=300) for name in names]
    found = outcome(*paths)
    assert [run.name for run in found.verdict.runs] == list(names)
    assert {event.origin for run in found.verdict.runs for event in run.events if event.kind == "loss"} == {"data"}
    assert [event.origin for event in outcome(paths[0]).verdict.runs[0].events if event.kind == "loss"] == [None]


def test_what_waits_is_of_all_folders(tmp_path: Path) -> None:
    found = outcome(make(tmp_path / "a", begun=1), make(tmp_path / "b", seeds=(1,), begun=0))
    assert found.waiting == ("patched/lr1e-3-seed0", "vanilla/lr1e-3-seed1", "patched/lr1e-3-seed1")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": {"steps": STEPS, "batch_tokens": 2048, "seq_len": 64, "schedule": "cosine"}}, "batch_tokens"),
        ({"data": {"files": ["x"], "evaluation": [], "tokens": 10_000, "fingerprint": "g"}}, "data.fingerprint"),
        ({"versions": {"torch": "2.14.0"}}, "versions.torch"),
        ({"lr": 2e-3}, "lr is 0.001 and 0.002"),
        (
            {"models": {"vanilla": {"name": "vanilla", "source": "y", "recipe": None, "patched": False}}},
            "model vanilla is",
        ),
    ],
)
def test_other_trainings_are_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", seeds=(0,)), make(tmp_path / "b", seeds=(1,))
    edit(b, **changes)
    with pytest.raises(Refused, match=named):
        outcome(a, b)


def test_the_place_of_the_data_may_differ(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", seeds=(0,)), make(tmp_path / "b", seeds=(1,))
    edit(b, data={"files": ["elsewhere"], "evaluation": ["too"], "tokens": 10_000, "fingerprint": "f" * 64})
    assert len(outcome(a, b).logs) == 4


def test_a_run_counts_once(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", seeds=(0, 1)), make(tmp_path / "b", seeds=(1,))
    with pytest.raises(Refused, match="vanilla/lr1e-3-seed1 would count twice"):
        outcome(a, b)
    with pytest.raises(Refused, match="count twice"):
        outcome(a, a)


def test_a_row_of_panels_for_each_arm(tmp_path: Path) -> None:
    found = outcome(make(tmp_path, seeds=(1, 2), multipliers=(1, 2)))
    rows = arm_panels(found.logs, found.verdict)
    seen = "2 of 2 runs have a loss event"
    assert [loss.title for loss, _ in rows] == [
        f"vanilla, lr 0.001: {seen}", "patched, lr 0.001: 0 of 2 runs have a loss event",
        f"vanilla, lr 0.002: {seen}", "patched, lr 0.002: 0 of 2 runs have a loss event",
    ]  # fmt: skip
    for loss, norm in rows:
        assert [line.name for line in loss.series] == [line.name for line in norm.series] == ["seed 1", "seed 2"]
        for line in (*loss.series, *norm.series):
            assert len(line.points) == STEPS
            assert all(dict(line.points)[event.x] == pytest.approx(event.y) for event in line.events)
            assert bool(line.events) == loss.title.startswith("vanilla")


def test_nothing_has_begun(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", begun=0), make(tmp_path / "b", seeds=(1,), begun=0)
    done = CliRunner().invoke(main, ["report", str(a), str(b), "--out", str(tmp_path / "x.svg")])
    assert done.exit_code == 0, done.output
    assert "4 not begun" in done.stdout


def test_the_command_takes_several_folders(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", seeds=(0, 1)), make(tmp_path / "b", seeds=(2,))
    done = CliRunner().invoke(main, ["report", str(a), str(b)])
    assert done.exit_code == 0, done.output
    assert "vanilla 2 of 3" in " ".join(done.stdout.split())
    assert list(tmp_path.rglob("*.html")) == []
    for name, begin in (("page.html", "<!doctype html>"), ("arms.svg", "<svg ")):
        done = CliRunner().invoke(main, ["report", str(a), str(b), "--out", str(tmp_path / name), "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["arms"][0]["runs"] == 3
        assert (tmp_path / name).read_text().lower().startswith(begin)
