"""Tables and prose at any width: whole numbers, whole names, lines that end between words."""

from __future__ import annotations

import io
import os
import pty
import re
import struct
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from spikepatch.cli import main
from spikepatch.report.document import EMPTY, Table
from spikepatch.report.terminal import columns_of, table_lines, wrapped
from spikepatch.spikes.spike_page import event_table
from spikepatch.training import tables
from spikepatch.training.outcome import outcome
from tests.training.synthetic import calm, folder

WIDTHS = (60, 80, 200)

NUMBERS = st.sampled_from(["-", "0.003", "-1.5e-07", "12,345", "3", "27.71", "n/a", "1e+04", "98%"])
NAMES = st.sampled_from(
    ["a", "lr", "held-out", "gpt2", "vanilla-2304", "模型", "model.layers.11.self_attn.o_proj.weight"]
)
PROSE = st.lists(NAMES | NUMBERS, min_size=1, max_size=9).map(" ".join)


@st.composite
def drawn_tables(draw: st.DrawFn) -> Table:
    kinds = draw(st.lists(st.sampled_from([NUMBERS, NAMES, PROSE]), min_size=1, max_size=12))
    headers = tuple(draw(st.lists(PROSE, min_size=len(kinds), max_size=len(kinds))))
    rows = draw(st.lists(st.tuples(*kinds), min_size=1, max_size=3))
    return Table("", headers, tuple(rows))


def words(lines: list[str]) -> list[str]:
    return [word.removesuffix(":") for line in lines for word in line.split()]


def check(table: Table, width: int) -> None:
    """Each word of each entry is whole, as often as it is there; no line is wider, but for a word that is."""
    lines = list(table_lines(table, width))
    found = words(lines)
    entries = [entry for row in table.shown.rows for entry in row if entry not in EMPTY]
    wanted = words(entries)
    for word in set(wanted):
        assert found.count(word) >= wanted.count(word), word
    longest = max((cell_len(word) for word in " ".join((*table.headers, *wanted)).split()), default=0)
    assert max(map(cell_len, lines), default=0) <= max(width, longest + 5)
    assert not any("…" in line or line != line.rstrip() for line in lines)


@given(drawn_tables(), st.integers(20, 220))
def test_every_entry_is_whole(table: Table, width: int) -> None:
    check(table, width)


def spiky(model: str, lr: float, seed: int, step: int) -> float:
    return calm(model, lr, seed, step) + (8 if step % 97 == 96 and model != "patched" else 0)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tables_of_a_training(width: int, tmp_path: Path) -> None:
    names = ("vanilla", "patched", "a-model-with-a-name-of-some-length@scaled-embed")
    verdict = outcome(folder(tmp_path, names, curve=spiky, seeds=(0, 1, 2), steps=300)).verdict
    made = (tables.run_table, tables.arm_table, tables.model_table, tables.score_table, tables.event_table)
    for make in made:
        assert make(verdict).rows
        check(make(verdict), width)
    assert event_table.__module__ != tables.event_table.__module__  # that one is tried by its command


@pytest.mark.parametrize("width", WIDTHS)
def test_the_command_cuts_nothing(width: int, tmp_path: Path) -> None:
    """What --json says of every run and event is in what is printed, at every width."""
    path = str(folder(tmp_path / "x", curve=spiky, steps=300))
    verdict = outcome(path).verdict
    printed = CliRunner(env={"COLUMNS": str(width)}).invoke(main, ["report", path]).stdout
    found = words(printed.splitlines())
    for run in verdict.runs:
        expected = [run.name, f"{run.lr:g}", f"{run.final_loss:.4g}", f"{run.eval_loss:.4g}", f"{run.perplexity:.4g}"]
        for event in run.events:
            expected += [str(event.onset), str(event.peak), f"{event.value:.4g}", str(event.back)]
        assert [word for word in expected if word not in found] == []
    assert max(map(len, printed.splitlines())) <= max(width, len(f"page: {path}/report.html"))


def test_text_is_folded_before_a_row_becomes_a_block() -> None:
    table = Table("", ("name", "lr", "why"), (("a.b.weight", "0.003", "one two three four five six seven eight"),))
    assert list(table_lines(table, None)) == [
        "name           lr  why",
        "──────────  ─────  ───────────────────────────────────────",
        "a.b.weight  0.003  one two three four five six seven eight",
    ]
    assert list(table_lines(table, 40)) == [
        "name           lr  why",
        "──────────  ─────  ─────────────────────",
        "a.b.weight  0.003  one two three four",
        "                   five six seven eight",
    ]
    assert list(table_lines(table, 30)) == [
        "name: a.b.weight",
        "  lr: 0.003",
        "  why: one two three four five",
        "    six seven eight",
    ]


def test_columns_that_say_nothing_are_left_out() -> None:
    usual = {"x": "1", "seed": "0"}
    rows = (("a", "1", "0", "-", "2"), ("b", "1", "0", "", "3"))
    table = Table("", ("model", "x", "seed", "area", "loss"), rows, usual)
    assert table.shown.headers == ("model", "loss")
    assert table.shown.rows == (("a", "2"), ("b", "3"))
    other = Table("", table.headers, (*rows, ("c", "2", "0", "4", "5")), usual)
    assert other.shown.headers == ("model", "x", "area", "loss")
    assert Table("", ("a",), (("-",),)).shown.headers == ("a",)  # never all of them
    assert list(table_lines(Table("t", ("a",), ()), 80)) == []


def test_letters_of_two_columns_are_counted_so() -> None:
    table = Table("", ("name", "n"), (("模型", "1"), ("ab", "22")))
    assert list(table_lines(table, 80)) == ["name   n", "────  ──", "模型   1", "ab    22"]


@given(PROSE, st.integers(0, 6), st.integers(20, 120))
def test_prose_ends_between_words(text: str, indent: int, width: int) -> None:
    lines = list(wrapped(" " * indent + text, width))
    assert " ".join(" ".join(lines).split()) == text
    longest = max(map(len, text.split()))
    assert max(map(len, lines)) <= max(width, longest + indent + 2)
    assert all(line.startswith(" " * indent) for line in lines)
    assert all(line.startswith(" " * (indent + 2)) for line in lines[1:])


def test_what_is_to_be_copied_is_on_one_line() -> None:
    command = "spikepatch convert a/very/long/name/of/a/folder out/of/it --recipe scaled-embed"
    for text in (f"  remedy: {command}", f"say it as `{command}`, or do not", command):
        assert sum(command in line for line in wrapped(text, 60)) == 1
        assert list(wrapped(text, None)) == [text]


def test_a_pipe_takes_lines_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert columns_of(io.StringIO()) is None
    with open(os.devnull) as file:
        assert columns_of(file) is None
    monkeypatch.setenv("COLUMNS", "60")
    assert columns_of(io.StringIO()) == 60
    for nonsense in ("", "0", "wide", "-5"):
        monkeypatch.setenv("COLUMNS", nonsense)
        assert columns_of(io.StringIO()) is None


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_terminal_says_how_wide_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl
    import termios

    monkeypatch.delenv("COLUMNS", raising=False)
    leader, follower = pty.openpty()
    with open(leader, "rb"), open(follower, "w") as terminal:
        for columns, found in ((73, 73), (5, 20), (0, None)):
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            assert columns_of(terminal) == found


def test_errors_are_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner(env={"COLUMNS": "60"}).invoke(main, ["report", "none"])
    assert done.exit_code == 2
    assert max(map(len, done.stderr.splitlines())) <= 60
    whole = CliRunner().invoke(main, ["report", "none"]).stderr
    assert re.sub(r"\s+", " ", done.stderr) == re.sub(r"\s+", " ", whole)
