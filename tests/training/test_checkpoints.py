"""Checkpoints: whole or not there, bit for bit, whatever is killed when. Processes are in ``processes.py``."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spikepatch.errors import BadSource, Refused
from spikepatch.training import checkpoints
from tests import ROOT
from tests.training.models import small_model
from tests.training.processes import CASES

pytestmark = pytest.mark.slow  # processes, trainings, or models at full size


def test_processes(tmp_path: Path) -> None:
    """All cases in one test: parallel workers would each run them all."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.training.processes", str(tmp_path)],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    report: dict[str, str] = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() == CASES.keys()
    assert len(report) >= 15
    assert not any(report.values()), "\n".join(f"{name}: {error}" for name, error in report.items() if error)


def trained(model: nn.Module, steps: int, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(steps):
        ids = torch.randint(0, 256, (2, 16))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_everything_comes_back(model_type: str, tmp_path: Path) -> None:
    """Weights, both moments and step of every parameter, random states, and what the caller adds; tied weights too."""
    model = small_model(model_type, tie_word_embeddings=True)
    optimizer = trained(model, 3)
    path = checkpoints.save(tmp_path / "c", 3, model, optimizer, {"more": [1, None, "x"]})
    expected = draws()
    trained(model, 2, optimizer)

    other = small_model(model_type, tie_word_embeddings=True)
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True)
    state = checkpoints.load(path, other, fresh)
    assert state["more"] == [1, None, "x"]
    assert draws() == expected
    checkpoints.load(path, other, fresh)
    draws()
    trained(other, 2, fresh)
    checked = 0
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, fresh.state[two][key])
            checked += 1
    assert checked == 3 * len(list(model.parameters()))


def test_before_the_first_step_the_optimizer_has_no_state(tmp_path: Path) -> None:
    """What a rewind to the start goes back to is no Adam that has counted a step."""
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    path = checkpoints.save(tmp_path, 0, model, optimizer, {})
    assert not optimizer.state
    trained(model, 2, optimizer)
    checkpoints.load(path, model, optimizer)
    assert not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small_model().parameters(), strict=True))


def test_a_parameter_that_no_gradient_reaches(tmp_path: Path) -> None:
    model = small_model()
    model.unused = nn.Parameter(torch.ones(3))
    optimizer = trained(model, 2)
    path = checkpoints.save(tmp_path, 2, model, optimizer, {})
    other = small_model()
    other.unused = nn.Parameter(torch.zeros(3))
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True)
    checkpoints.load(path, other, fresh)
    assert torch.equal(other.unused, torch.ones(3))
    torch.manual_seed(1)
    trained(model, 2, optimizer)
    torch.manual_seed(1)
    trained(other, 2, fresh)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_last_two_stay(tmp_path: Path) -> None:
    model = small_model()
    optimizer = trained(model, 1)
    for step in (1, 2, 30, 400):
        checkpoints.save(tmp_path, step, model, optimizer, {})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000030", "step-00000400"]
    assert checkpoints.latest(tmp_path) == tmp_path / "step-00000400"
    assert checkpoints.latest(tmp_path, before=400) == tmp_path / "step-00000030"
    assert checkpoints.latest(tmp_path, before=30) is None
    assert checkpoints.latest(tmp_path / "nowhere") is None
    checkpoints.drop(tmp_path, after=30)
    assert checkpoints.latest(tmp_path) == tmp_path / "step-00000030"


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    for name in (".step-00000004.new.spikepatch", ".step-00000002.old.spikepatch", "step-00000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    assert checkpoints.committed(tmp_path) == [tmp_path / "step-00000002"]
    checkpoints.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    model = small_model()
    path = checkpoints.save(tmp_path, 1, model, trained(model, 1), {})
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "ranks": 2}))
    with pytest.raises(Refused, match="2 wrote it, and this run has 1"):
        checkpoints.load(path, model, torch.optim.AdamW(model.parameters()))


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = small_model()
    path = checkpoints.save(tmp_path, 1, model, trained(model, 1), {})
    different: list[dict[str, Any]] = [{"n_layer": 3}, {"n_layer": 1}, {"n_embd": 64}]
    for changes in different:
        other = small_model(**changes)
        with pytest.raises(BadSource, match="does not fit the model, or is damaged"):
            checkpoints.load(path, other, torch.optim.AdamW(other.parameters()))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    model = small_model()
    path = checkpoints.save(tmp_path, 1, model, trained(model, 1), {})
    (shard,) = path.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(BadSource, match="does not fit the model, or is damaged"):
        checkpoints.load(path, model, torch.optim.AdamW(model.parameters()))


class Calling:
    """Whoever unpickles it calls ``open``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")

    def __deepcopy__(self, memo: dict[int, Any]) -> Calling:
        return self


def test_nothing_of_a_foreign_checkpoint_is_run(tmp_path: Path) -> None:
    """What torch unpickles as it is: the description of the tensors, and values that are none."""
    model, marker = small_model(), tmp_path / "run"
    optimizer = trained(model, 1)
    path = checkpoints.save(tmp_path / "c", 1, model, optimizer, {})
    whole = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(pickle.dumps(Calling(marker)))
    with pytest.raises(BadSource, match=r"names _?io\.open, which no checkpoint needs"):
        checkpoints.load(path, model, optimizer)
    (path / ".metadata").write_bytes(whole)
    checkpoints.load(path, model, optimizer)

    optimizer.param_groups[0]["eps"] = Calling(marker)
    path = checkpoints.save(tmp_path / "c", 2, model, optimizer, {})
    marker.unlink(missing_ok=True)
    with pytest.raises(BadSource, match="eps is more than plain values"):
        checkpoints.load(path, model, torch.optim.AdamW(model.parameters()))
    assert not marker.exists()


def test_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of a checkpoint is synced before the rename."""
    import os

    synced: set[str] = set()
    real_sync, real_replace = os.fsync, os.replace
    committed: list[set[str]] = []

    def fsync(handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        real_sync(handle)

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == "step-00000001":
            committed.append({p.name for p in Path(source).iterdir()} - synced)
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    model = small_model()
    checkpoints.save(tmp_path, 1, model, trained(model, 1), {})
    assert committed == [{".metadata"}]  # which had another name then
    assert {".metadata.tmp", ".step-00000001.new.spikepatch"} <= synced
