"""The table of docs/exit_codes.md, and what a terminal is shown of hostile names."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from spikepatch import cli
from spikepatch.cli import main
from spikepatch.errors import SHOWN, SpikepatchError, unprintable
from tests import ROOT
from tests.training.synthetic import folder

#: What a terminal obeys, and what turns the writing's direction.
HOSTILE = ("\x1b[2J", "\r", "\x07", "\x9b1m", "\u202e", "\u2066", "\x00", "\x7f")


def ending(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and stderr of a command that ends so."""

    def fails() -> None:
        raise error

    monkeypatch.setattr(cli, "check_platform", fails)
    done = CliRunner().invoke(main, ["recipes"])
    return done.exit_code, done.stderr


def table() -> dict[int, str]:
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "docs" / "exit_codes.md").read_text(), re.MULTILINE)
    return {int(code): text for code, text in rows}


def test_every_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    losses = [2 + 0.01 * (i % 3) + (9 if 300 <= i < 310 else 0) for i in range(600)]
    log.write_text("".join(json.dumps({"step": i, "loss": loss}) + "\n" for i, loss in enumerate(losses)))
    found = {
        0: CliRunner().invoke(main, ["recipes"]).exit_code,
        1: CliRunner().invoke(main, ["spikes", str(log)]).exit_code,
        2: CliRunner().invoke(main, ["inspect", str(tmp_path / "absent")]).exit_code,
        3: ending(ZeroDivisionError("a bug"), monkeypatch)[0],
        130: ending(KeyboardInterrupt(), monkeypatch)[0],
        141: ending(BrokenPipeError(), monkeypatch)[0],
        143: ending(SystemExit(128 + signal.SIGTERM), monkeypatch)[0],
    }
    assert found.keys() == table().keys()
    assert all(code == seen for code, seen in found.items()), found


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE])
def test_what_the_system_refuses_is_no_bug(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = ending(OSError(number, os.strerror(number), "some/file"), monkeypatch)
    assert code == 2
    assert said.startswith(f"error: {os.strerror(number)}: some/file\n  remedy: ")


def test_a_current_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    done = CliRunner().invoke(main, ["convert", "arch:gpt2", "out"])
    assert done.exit_code == 2
    assert "the current folder cannot be found" in done.stderr
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--foo"], "No such option '--foo'"),
        (["convrt"], "did you mean convert?"),
        (["convert"], "Missing argument 'SOURCE'"),
        (["convert", "--recpie", "x"], "did you mean --recipe"),
        (["check", "--seed", "x", "arch:gpt2"], "'x' is not a valid"),
        (["inspect", "arch:gpt2", "more"], "unexpected extra argument"),
    ],
)
def test_the_option_parser_says_why_and_what_to_do(words: list[str], says: str) -> None:
    done = CliRunner().invoke(main, words, prog_name="spikepatch")
    assert done.exit_code == 2
    assert re.fullmatch(r"error: spikepatch.*: .*\n  why: it is used as .*\n  remedy: .* --help .*\n", done.stderr)
    assert says in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "spikepatch", "check", "arch:llama"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()  # it has begun
        time.sleep(0.2)
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == 128 + number
    assert "Traceback" not in said


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_messages_are_shown_as_they_are_written(hostile: str) -> None:
    error = SpikepatchError(f"a{hostile}b", where=f"c{hostile}d\ne", why=f"f{hostile}\ng", remedy="h" * 10_000)
    said = str(error)
    assert hostile not in said
    assert len(said) < SHOWN + 200
    assert "d\\ne: a" in said  # a place is one line
    assert said.count("\n") == 3  # a reason may have several
    assert all(c.isprintable() or c == "\n" for c in said)
    assert error.where == f"c{hostile}d\ne"  # as data it is what it was


@pytest.mark.parametrize("hostile", [*HOSTILE, "\n"], ids=ascii)
def test_what_a_config_brings_is_shown_escaped(hostile: str, tmp_path: Path) -> None:
    configs = (
        {"model_type": "gpt2", "architectures": [f"GPT2{hostile}"]},
        {"model_type": f"gp{hostile}"},
        {"model_type": "x", "auto_map": {"AutoConfig": f"a{hostile}.B"}},  # in the refusal that asks for trust
    )
    for i, config in enumerate(configs):
        source = tmp_path / str(i)
        source.mkdir()
        (source / "config.json").write_text(json.dumps(config))
        done = CliRunner().invoke(main, ["inspect", str(source)])
        assert done.exit_code == 2, done.stderr
        assert all(c.isprintable() or c == "\n" for c in done.stderr)
    assert unprintable(["fine", f"not{hostile}"]) == [ascii(f"not{hostile}")]


def test_what_a_header_brings_is_shown_escaped(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    header = json.dumps({"a\x1b[2J": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    done = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "out"), "--reinit", "none"])
    assert done.exit_code == 2
    assert "a\\x1b[2J" in done.stderr
    assert "\x1b" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hostile", [*HOSTILE[:-2], "\x7f", "\udcff"], ids=ascii)
def test_a_result_is_shown_escaped(hostile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every way onto stdout: lines, and tables of rich."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "run", ("a",), steps=60)
    record = json.loads((tmp_path / "run/run.json").read_text())
    record["models"]["a"]["source"] = f"x{hostile}y"
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    log = next((tmp_path / "run").rglob("log.jsonl"))
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(json.dumps(json.loads(lines[0]) | {"source": f"x{hostile}y"}) + "\n" + "".join(lines[1:]))
    for words in (["report", "run"], ["verify", f"absent{hostile}"], ["spikes", f"log{hostile}.txt"]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code in (0, 2), done.output
        assert hostile not in done.output
        assert ascii(hostile)[1:-1] in done.output or words[0] == "report"  # rich leaves some out
        assert not done.stdout or "x" in done.stdout


def test_help_names_no_command_that_is_not_there() -> None:
    named = set(re.findall(r"^ +spikepatch (\w+) ", main.help or "", re.MULTILINE))
    assert named
    assert named <= set(main.commands)
    assert isinstance(main, click.Group)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["recipes"], ["recipes", "--help"]])
def test_a_full_disk_behind_stdout(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "spikepatch", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device\n  remedy: make room on the disk\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "codes", "said"),
    [
        ("recipes >&-", "0", ""),
        ("recipes 2>&-", "0", None),
        ("recipes <&- >&- 2>&-", "0", ""),
        ("recipes --nonsense >&- 2>&-", "2", ""),
        ("recipes 2>/dev/full", "0", None),
        ("recipes --nonsense 2>/dev/full", "2", None),
        ("recipes >/dev/full 2>/dev/full", "2", ""),
        ("recipes | true", "141 0", ""),
        ("recipes --help | true", "141 0", ""),
    ],
)
def test_streams_that_cannot_be_written_to(line: str, codes: str, said: str | None, tmp_path: Path) -> None:
    """The exit code is as true as ever: above all, it is no 1."""
    line = line.replace("recipes", f"{sys.executable} -m spikepatch recipes")
    codes_of = (
        f"({line}); echo ${{PIPESTATUS[*]}} > codes" if "|" not in line else f"{line}; echo ${{PIPESTATUS[*]}} > codes"
    )
    done = subprocess.run(["bash", "-c", codes_of], stderr=subprocess.PIPE, cwd=tmp_path, text=True, check=False)
    assert (tmp_path / "codes").read_text().strip() == codes
    if said is not None:
        assert done.stderr == said


@pytest.mark.slow
def test_what_is_closed_takes_the_number_of_no_file(tmp_path: Path) -> None:
    """Else what a library prints would be written into the file that has it."""
    script = (
        "import os, sys; from spikepatch import cli; cli._open_streams()\n"
        "file = open('written', 'w'); os.write(1, b'noise'); os.write(2, b'noise'); file.write('whole')"
    )
    line = f"{sys.executable} -c {shlex.quote(script)} <&- >&- 2>&-"
    subprocess.run(line, shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "written").read_text() == "whole"


@pytest.mark.slow
def test_what_a_library_prints_is_not_among_the_results() -> None:
    """tokenizers prints names of unknown options of a tokenizer.json past Python, whatever they are."""
    script = (
        "import os, click; from spikepatch.cli import main\n"
        "@main.command('x')\n"
        "def x(): os.write(1, b'noise\\x1b[2J'); click.echo('{}'); print('é')\n"
        "main(['x'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, encoding="utf-8")
    assert (done.stdout, done.stderr) == ("{}\né\n", "")


@pytest.mark.slow
def test_without_docstrings() -> None:
    environment = {**os.environ, "PYTHONOPTIMIZE": "2"}
    command = [sys.executable, "-m", "spikepatch", "recipes"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "remedy: unset PYTHONOPTIMIZE" in done.stderr
