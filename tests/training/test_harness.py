"""What is asked of a training: given, by default, or by the folder that is gone on with."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from spikepatch.errors import BadSource, Refused
from spikepatch.training.going_on import write_record
from spikepatch.training.harness import what_is_asked
from spikepatch.training.settings import TrainingCommand
from tests.training.synthetic import folder

GIVEN: dict[str, Any] = {"models": ("a=x@vanilla",), "data": ("text.txt",), "steps": 100, "lr": 1e-3}


def begun(out: Path, at: int, **given: Any) -> TrainingCommand:
    """A training that has come to step ``at`` of its one run."""
    asked = what_is_asked(GIVEN | given, out, resume=False)
    folder(out, ("a",), steps=at, ended=False)
    (out / "run.json").unlink()
    model = {"name": "a", "source": "x", "recipe": "vanilla", "patched": False}
    about = {
        "settings": dataclasses.asdict(asked.settings), "lr": asked.lr, "multipliers": [1.0], "seeds": [0],
        "models": {"a": model}, "data": {},
    }  # fmt: skip
    write_record(out, about, asked, "the command")
    return asked


def test_a_new_one() -> None:
    more = {"text_column": "content", "untie": True, "warmup": 3.0, "seeds": [1]}
    asked = what_is_asked(GIVEN | more, Path("o"), resume=False)
    assert (asked.settings.steps, asked.settings.warmup, asked.settings.seq_len) == (100, 3.0, 512)
    assert (asked.reading.text_column, asked.reading.skip_bad, asked.seeds) == ("content", False, (1,))
    assert asked.options == {"untie": True}
    with pytest.raises(Refused, match=r"o: MODEL and --lr are missing\n.*\n  remedy: .*--resume OUT"):
        what_is_asked({"data": ("x",), "steps": 3}, Path("o"), resume=False)
    with pytest.raises(Refused, match="holds no training that could say"):
        what_is_asked({}, Path("o"), resume=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seq_len": 1}, "seq_len cannot be 1"),
        ({"lr": float("nan")}, "lr cannot be nan"),
        ({"betas": (0.9, 1.0)}, "betas cannot be 1.0"),
        ({"multipliers": (0.0,)}, "multipliers cannot be 0.0"),
        ({"lr": 1e300, "multipliers": (1.0, 1e300)}, "lr times multipliers cannot be inf"),
        ({"seeds": (-1,)}, "seeds cannot be -1"),
        ({"schedule": "linear"}, "'linear' is none of"),
        ({"bos": "sometimes"}, "'sometimes' is none of"),
        ({"batch_tokens": "many"}, "'many' is no whole number"),
    ],
)
def test_what_makes_no_sense(given: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        what_is_asked(GIVEN | given, Path("o"), resume=False)


def test_the_folder_says_the_rest(tmp_path: Path) -> None:
    asked = begun(tmp_path, 60, untie=True, seq_len=64)
    assert what_is_asked({}, tmp_path, resume=True) == asked
    assert what_is_asked({"seq_len": 32}, tmp_path, resume=True).settings.seq_len == 32  # to be refused by its name


@pytest.mark.parametrize(
    ("schedule", "at", "steps", "why"),
    [
        ("constant", 60, 200, ""),
        ("constant", 100, 200, ""),
        ("constant", 60, 80, "can only be raised"),
        ("cosine", 60, 200, "the rate of every step depends on it"),
        ("wsd", 80, 200, ""),
        ("wsd", 81, 200, "a/lr1e-3-seed0 is at step 81, and with --schedule wsd the rate falls from step 80 on"),
    ],
)
def test_more_steps(schedule: str, at: int, steps: int, why: str, tmp_path: Path) -> None:
    begun(tmp_path, at, schedule=schedule, warmup=0.05)
    if why:
        with pytest.raises(Refused, match=why):
            what_is_asked({"steps": steps}, tmp_path, resume=True)
    else:
        settings = what_is_asked({"steps": steps}, tmp_path, resume=True).settings
        assert (settings.steps, settings.warmup_steps) == (steps, 5)


def test_a_record_of_an_older_version(tmp_path: Path) -> None:
    begun(tmp_path, 60)
    path = tmp_path / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in record.items() if name != "asked"}))
    with pytest.raises(BadSource, match=r"run\.json: what was asked for is not written down"):
        what_is_asked({}, tmp_path, resume=True)
    assert what_is_asked(GIVEN, tmp_path, resume=True).settings.steps == 100  # as that remedy says
    record["settings"]["steps"] = 50
    path.write_text(json.dumps(record))
    with pytest.raises(BadSource, match="it has two numbers of steps"):
        what_is_asked({}, tmp_path, resume=True)


def test_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/text.txt").touch()
    monkeypatch.chdir(tmp_path / "there")
    begun(tmp_path / "x", 60)
    monkeypatch.chdir(tmp_path)
    there = f"{tmp_path}/there"
    with pytest.raises(Refused, match=rf"text.txt is meant as seen from {there}\n  remedy: cd {there}"):
        what_is_asked({}, tmp_path / "x", resume=True)
    os.remove("there/text.txt")
    assert what_is_asked({}, tmp_path / "x", resume=True).data == ("text.txt",)
