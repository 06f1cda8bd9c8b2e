"""The wrong noun for a command: at once, by one message, whose remedy is a command that takes what was given."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from spikepatch.cli import main
from spikepatch.commands.nouns import check_noun, recognised
from spikepatch.errors import BadSource
from spikepatch.source.local import nearby
from tests.training.synthetic import folder

RUN = "training/vanilla/lr1e-3-seed0"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one of each."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "training", steps=60)
    for model in ("model", "trainer", "my model", f"{RUN}/model"):
        (tmp_path / model).mkdir(parents=True)
        (tmp_path / model / "config.json").write_text('{"model_type": "gpt2"}')
        (tmp_path / model / "model.safetensors").write_bytes(b"")
    (tmp_path / "trainer/trainer_state.json").write_text('{"log_history": []}')
    rows = "".join(f'{{"step": {i}, "loss": {3 + i * 7 % 5 / 50}}}\n' for i in range(100))
    (tmp_path / "log.jsonl").write_text(rows)
    (tmp_path / "own.log").write_text("".join(f"INFO step {i}: train loss 3.{i % 7}\n" for i in range(100)))
    (tmp_path / "text.txt").write_text("It was the best of times.\nIt was the worst of times.\n")
    (tmp_path / "output/checkpoint-9").mkdir(parents=True)
    (tmp_path / "output/checkpoint-9/trainer_state.json").write_text('{"log_history": []}')
    (tmp_path / "board").mkdir()
    (tmp_path / "board/events.out.tfevents.1").write_bytes(b"")
    (tmp_path / "model.py").write_text("")
    (tmp_path / "mine.toml").write_text('name = "mine"\n[[transform]]\nkind = "embed_scale"\n')
    return tmp_path


def words(command: str, given: str) -> list[str]:
    more = {"convert": ["out"], "fold": ["out"], "codemod": ["--factory", "a:b"]}
    more |= {"train": ["--data", "x", "--out", "out", "--steps", "1", "--lr", "1"]}
    return [command, given, *more.get(command, [])]


#: What is given, to which commands, and what they say instead.
CASES: list[tuple[str, str, str]] = [
    ("gpt2@scaled-embed", "convert inspect audit fold", "spikepatch convert gpt2 OUT --recipe scaled-embed"),
    ("gpt2@scaled-embed", "verify codemod report spikes", "spikepatch convert gpt2 OUT --recipe scaled-embed"),
    ("arch:gpt2@scaled-embd", "convert inspect", "spikepatch convert arch:gpt2 OUT --recipe scaled-embed"),
    ("model@mine.toml", "check", "spikepatch check model --recipe mine.toml"),
    ("mine=gpt2@embed-ln", "check recipes", "spikepatch check gpt2 --recipe embed-ln"),
    ("mine=gpt2", "convert", "spikepatch convert gpt2 OUT"),
    ("mine=gpt2", "inspect", "spikepatch inspect gpt2"),
    ("model.py", "convert inspect audit check train fold verify report", "spikepatch codemod model.py --factory"),
    ("absent.py", "inspect", "spikepatch codemod absent.py --factory"),
    ("model/config.json", "inspect", "spikepatch inspect model"),
    ("model/model.safetensors", "convert", "spikepatch convert model OUT"),
    ("my model/config.json", "check", "spikepatch check 'my model'"),
    ("model/config.json", "verify", "spikepatch verify model"),
    ("model/config.json", "report spikes", "spikepatch check model"),
    ("model/config.json", "codemod", "spikepatch convert model OUT"),
    ("log.jsonl", "convert inspect check audit fold verify report codemod", "spikepatch spikes log.jsonl"),
    ("own.log", "report", "spikepatch spikes own.log"),
    ("log.jsonl", "train", "spikepatch train MODEL --data log.jsonl"),
    ("board", "inspect report", "spikepatch spikes board"),
    ("board/events.out.tfevents.1", "report", "spikepatch spikes board/events.out.tfevents.1"),
    ("trainer", "report", "spikepatch spikes trainer"),
    ("output", "report inspect", "spikepatch spikes output"),
    ("text.txt", "report verify", "spikepatch spikes text.txt --loss KEY"),
    ("text.txt", "train inspect", "spikepatch train MODEL --data text.txt"),
    ("trainer/trainer_state.json", "report inspect", "spikepatch spikes trainer/trainer_state.json"),
    ("training", "inspect convert spikes fold verify codemod train", "spikepatch report training"),
    ("training", "check", f"spikepatch check {RUN}/model"),
    ("training/run.json", "report spikes inspect", "spikepatch report training"),
    (RUN, "report", "spikepatch report training"),
    (RUN, "convert", f"spikepatch convert {RUN}/model OUT"),
    (RUN, "inspect", f"spikepatch spikes {RUN}"),
    ("arch:gpt2", "report spikes", "spikepatch check arch:gpt2"),
    ("arch:gpt2", "verify codemod", "spikepatch convert arch:gpt2 OUT"),
    ("model", "report spikes recipes", "spikepatch check model"),
    ("model", "codemod", "spikepatch convert model OUT"),
    ("scaled-embed", "convert inspect audit train", "spikepatch convert SOURCE OUT --recipe scaled-embed"),
    ("mine.toml", "check", "spikepatch check SOURCE --recipe mine.toml"),
]

EACH = [(given, command, said) for given, commands, said in CASES for command in commands.split()]


def remedies(stderr: str) -> list[str]:
    (line,) = re.findall(r"^  remedy: (.*)$", stderr, re.MULTILINE)
    return [each for each in re.split(r" or (?=spikepatch )", line) if each.startswith("spikepatch ")]


@pytest.mark.parametrize(("given", "command", "said"), EACH, ids=[f"{c} {g}" for g, c, _ in EACH])
def test_the_right_command_is_named_and_takes_it(given: str, command: str, said: str, place: Path) -> None:
    done = CliRunner().invoke(main, words(command, given))
    assert done.exit_code == 2, done.output
    assert done.stderr.count("error: ") == 1
    found = remedies(done.stderr)
    assert any(each.startswith(said) for each in found), done.stderr
    for each in found:
        _, name, *rest = shlex.split(each)
        rest += ["--data", "x", "--out", "y"] if name == "train" else []
        main.commands[name].make_context(name, rest)  # options and arguments are taken, and no noun is wrong
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("arch:gpt2", "`spikepatch check arch:gpt2`"),
        ("model", "`spikepatch check model`"),
        ("log.jsonl", "`spikepatch spikes log.jsonl`"),
        ("training", "`spikepatch report training`"),
        ("model.py", "`spikepatch codemod model.py --factory MODULE:FUNCTION`"),
        ("architectures llama", "`spikepatch architectures --filter llama`"),
        ("convert gpt2 out embed-ln", "`spikepatch convert ... --recipe embed-ln`"),
    ],
)
def test_a_noun_in_place_of_a_command_or_one_too_many(given: str, meant: str, place: Path) -> None:
    done = CliRunner().invoke(main, given.split())
    assert done.exit_code == 2
    assert f"remedy: did you mean {meant}? " in done.stderr


def test_a_remedy_that_is_quick_runs(place: Path) -> None:
    tried = 0
    for given, command in (("log.jsonl", "inspect"), ("own.log", "report"), ("training", "spikes"), (RUN, "report")):
        stderr = CliRunner().invoke(main, words(command, given)).stderr
        for each in remedies(stderr):
            _, name, *rest = shlex.split(each)
            if name in ("spikes", "report"):
                done = CliRunner().invoke(main, [name, *rest, "--json"])
                assert done.exit_code in (0, 1), done.stderr
                tried += 1
    assert tried >= 5


def test_what_is_right_passes(place: Path) -> None:
    taken = {
        "convert": ("gpt2", "org/model", "arch:gpt2", "model", "./model", "unknown"),
        "train": ("gpt2@scaled-embed", "mine=model", "a=arch:gpt2@mine.toml"),
        "report": ("training", "absent"),
        "spikes": ("log.jsonl", RUN, "board", "absent.log", "own.log", "text.txt", "trainer", "output"),
        "codemod": ("model.py",),
        "verify": ("model", "absent"),
        "recipes": ("scaled-embed", "mine.toml", "module:NAME"),
    }
    for command, nouns in taken.items():
        for noun in nouns:
            check_noun(command, noun)
    (place / "odd@name").mkdir()
    (place / "odd@name/config.json").write_text("{}")
    assert recognised("odd@name").kind == "model"  # type: ignore[union-attr]
    (place / "model/runs").mkdir()
    (place / "model/runs/events.out.tfevents.1").write_bytes(b"")
    check_noun("spikes", "model")  # it looks below for events


@pytest.mark.parametrize("given", ["./mymodle", "../x/y", "/nowhere", "~/nowhere", "a/b/c", "mymodel/"])
@pytest.mark.parametrize("command", ["convert", "inspect", "train", "fold", "check", "audit"])
def test_what_can_be_no_id_is_refused_before_anything_is_imported(command: str, given: str, place: Path) -> None:
    (place / "mymodel").touch() if given == "mymodel/" else (place / "mymodel").mkdir()
    done = CliRunner().invoke(main, words(command, given))
    assert done.exit_code == 2
    assert "a local source is a folder" in done.stderr
    assert ("did you mean mymodel" in done.stderr) == (given == "./mymodle")


def test_no_torch_is_imported_for_it(tmp_path: Path) -> None:
    code = """
import sys
from click.testing import CliRunner
from spikepatch.cli import main
for words in (["check", "./absent"], ["inspect", "gpt2@vanilla"], ["convert", "absent.py", "out"]):
    assert CliRunner().invoke(main, words).exit_code == 2
print(sorted({"torch", "transformers", "matplotlib", "huggingface_hub"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_folders_that_are_near(place: Path) -> None:
    (place / "checkpoints/run-1").mkdir(parents=True)
    (place / "checkpoints/run-12").mkdir()
    assert nearby("checkpoints/run-1x") == ["checkpoints/run-1", "checkpoints/run-12"]
    assert nearby("checkpoint/run-1") == ["checkpoints/run-1", "checkpoints/run-12"]
    assert nearby("./modle") == ["model"]
    assert nearby(f"{place}/modle") == [f"{place}/model"]
    assert nearby("nothing/of/it") == nearby("zzz") == []


@pytest.mark.parametrize("command", ["audit", "check", "convert", "inspect", "train"])
def test_arch_completes(command: str) -> None:
    from click.shell_completion import ShellComplete

    complete = ShellComplete(main, {}, "spikepatch", "_SPIKEPATCH_COMPLETE").get_completions
    assert {"arch:gpt2", "arch:gpt_neox"} <= {item.value for item in complete([command], "arch:gp")}
    assert {item.value for item in complete([command], "arch:openai-gp")} == {"arch:openai-gpt"}
    assert len(complete([command], "ar")) > 100
    assert [item.type for item in complete([command], "mod")] == ["dir"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("spikepatch inspect arch : openai-gp", ["plain,openai-gpt"]),  # bash takes the colon for a word of its own
        ("spikepatch convert arch : gpt2 out --recipe sc", ["plain,scaled-embed"]),
        ("spikepatch convert arch:openai-gp", ["plain,openai-gpt"]),
    ],
)
def test_bash_completes_behind_a_colon(line: str, offered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    monkeypatch.setenv("_SPIKEPATCH_COMPLETE", "bash_complete")
    done = CliRunner().invoke(main, [], prog_name="spikepatch")
    assert done.output.splitlines() == offered


def test_every_command_knows_its_noun(place: Path) -> None:
    """Every argument that is read is looked at; OUT is written."""
    looked: Callable[[str], list[click.Parameter]] = lambda name: [  # noqa: E731
        p for p in main.commands[name].params if isinstance(p, click.Argument)
    ]
    for name in set(main.commands) - {"architectures", "train"}:
        assert looked(name)[0].callback is not None, name
    for name in ("convert", "report", "recipes"):
        with pytest.raises(BadSource, match="codemod"):
            looked(name)[0].process_value(click.Context(main.commands[name]), _first(looked(name)[0]))


def _first(argument: click.Parameter) -> object:
    return ("model.py",) if argument.nargs == -1 else "model.py"
