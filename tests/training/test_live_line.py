"""What is seen of a training while it runs: on a terminal, in a log file, and nowhere but on the main process."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from spikepatch.training.live_line import reporting


def run(name: str = "a", seed: int = 0, steps: int = 100) -> dict[str, Any]:
    return {"type": "run", "name": name, "lr": 5e-4, "seed": seed, "steps": steps}


def step(number: int, loss: float | None = 2.5, seconds: float = 0.5) -> dict[str, Any]:
    return {
        "type": "step", "step": number, "loss": loss, "gradient_norm": 0.25, "tokens": 1000 * number,
        "seconds": seconds,
    }  # fmt: skip


def event(number: int, kind: str = "loss", back: int | None = None, onset: int = 7) -> dict[str, Any]:
    return {
        "type": "event", "step": number, "kind": kind, "onset": onset, "value": 9.0, "baseline": 2.5,
        "back": back, "duration": number - onset,
    }  # fmt: skip


class Clock:
    """Seconds pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(*records: Mapping[str, Any], runs: int = 1, clock: Clock | None = None) -> list[str]:
    """What is written where there is no terminal; the clock goes on by a second a record."""
    clock = clock or Clock()
    out = io.StringIO()
    with reporting(runs, console=Console(file=out), clock=clock) as report:
        for record in records:
            clock.now += 1
            report(record)
    return out.getvalue().splitlines()


def test_first_and_last_step_and_one_now_and_then() -> None:
    told = lines(run(), *(step(n) for n in range(1, 101)))
    assert told[0] == "run 1 of 1: a, lr 0.0005, seed 0"
    assert [int(line.split()[1]) for line in told[1:]] == [1, 31, 61, 91, 100]


def test_figures() -> None:
    """20 steps of 0.5 s and 1,000 tokens each were the last ones; the slow ones before do not count."""
    told = lines(run(), *(step(n, seconds=100.0) for n in range(1, 31)), *(step(n) for n in range(31, 101)))
    assert told[-1] == "  step 100 of 100: loss 2.5, gradient norm 0.25, 2,000 tokens/s, 0:00:00 left, no spikes"
    told = lines(run(steps=7300), *(step(n) for n in range(1, 101)))
    assert told[-1] == "  step 91 of 7300: loss 2.5, gradient norm 0.25, 2,000 tokens/s, 1:00:04 left, no spikes"
    assert lines(run(), step(1, loss=None))[-1] == "  step 1 of 100: loss -, gradient norm 0.25, no spikes"


def test_what_happens_is_said_at_once() -> None:
    told = lines(
        run(), step(1), event(7), event(7, "nonfinite"), event(9, back=9), step(100),
        {"type": "rewind", "step": 100, "to": 50, "skipped": [50, 99]},
        {"type": "stop", "step": 100, "why": "enough"},
        {"type": "evaluating", "step": 100, "done": 0, "total": 2048}, {"type": "eval", "step": 100, "loss": 2.25},
        {"type": "layers", "step": 1, "stream": [], "gradients": []},
    )  # fmt: skip
    assert told[2:4] == [
        "  step 7: a spike of the loss, 9 where 2.5 was expected",
        "  step 7: the loss or a gradient is not finite",
    ]
    assert told[4] == "  step 9: the event of step 7 is over, back after 2 steps"
    assert told[5].endswith("2 spikes")
    assert told[6:] == [
        "  step 100: back to the checkpoint of step 50",
        "  step 100: stopped, enough",
        "  step 100: evaluating on 2,048 held-out tokens",
        "  step 100: held-out loss 2.25",
    ]


def test_a_long_evaluation_is_seen() -> None:
    evaluating = [{"type": "evaluating", "step": 100, "done": 10 * i, "total": 1000} for i in range(100)]
    assert lines(run(), *evaluating)[1:] == [
        "  step 100: evaluating on 1,000 held-out tokens",
        *(f"  {done} of 1,000 held-out tokens" for done in (280, 580, 880)),
    ]


def test_runs_are_counted_once_and_spikes_per_run() -> None:
    told = lines(run("a"), step(1), event(7), step(100), run("a"), run("a", seed=1), step(1), run("b"), runs=3)
    assert [line for line in told if line.startswith("run")] == [
        "run 1 of 3: a, lr 0.0005, seed 0",
        "run 2 of 3: a, lr 0.0005, seed 1",
        "run 3 of 3: b, lr 0.0005, seed 0",
    ]
    assert told[3].endswith("1 spike")
    assert told[5].endswith("no spikes")


def test_names_are_not_markup() -> None:
    assert lines(run("[bold]x[/bold]"))[0] == "run 1 of 1: [bold]x[/bold], lr 0.0005, seed 0"


@pytest.mark.parametrize("no_color", [False, True])
def test_on_a_terminal(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "COLORTERM", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    with reporting(4, console=Console(file=out, force_terminal=True, width=150)) as report:
        for record in (run("[bold]"), step(1), step(2), event(7)):
            report(record)
    shown = out.getvalue()
    for words in ("run 1 of 4: [bold], lr 0.0005", "2/100", "loss 2.5", "tokens/s", "left"):
        assert words in shown
    assert "seed 0: step 7: a spike of the loss" in shown
    assert ("\x1b[38;5;" in shown or "\x1b[3" in shown) != no_color


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("name", ["a", "a-model-with-a-long-name@scaled-embed"])
def test_on_a_terminal_of_any_width_no_number_is_cut(name: str, width: int) -> None:
    out = io.StringIO()
    evaluating = {"type": "evaluating", "step": 12_345, "done": 100_512, "total": 201_024}
    for more in ([], [evaluating]):
        with reporting(10, console=Console(file=out, force_terminal=True, width=width)) as report:
            for record in (run(name, steps=20_000), step(1), step(2), event(7), step(12_345), *more):
                report(record)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    for words in (f"run 1 of 10: {name}, lr 0.0005, seed 0", "12345/20000", "loss 2.5", "100,512 of 201,024"):
        assert words in shown or words in " ".join(shown.split())
    assert "…" not in shown
    assert max(len(line) for line in re.split(r"[\r\n]", shown)) <= width


def test_an_evaluation_on_a_terminal() -> None:
    out = io.StringIO()
    with reporting(4, console=Console(file=out, force_terminal=True, width=150)) as report:
        for record in (run(), step(100), {"type": "evaluating", "step": 100, "done": 512, "total": 1024}):
            report(record)
    assert "held out: 512 of 1,024" in out.getvalue()


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(1, main=False) as report:
        report(run())
        report(step(1))
    assert capsys.readouterr() == ("", "")


def test_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(1) as report:
        report(run())
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "run 1 of 1: a, lr 0.0005, seed 0\n"


def test_an_error_ends_the_live_line() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True)

    def interrupted() -> None:
        with reporting(1, console=console) as report:
            report(run())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1  # the cursor is there again
