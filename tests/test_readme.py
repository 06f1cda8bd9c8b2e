"""The README says what the program does: commands, their output, Python blocks, the file tree."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

import spikepatch
from spikepatch.cli import main
from spikepatch.plans.plan import Fill, Recipe
from spikepatch.recipes.built_in import RECIPES
from tests import ROOT
from tests.architectures import tiny_model
from tests.residual.test_golden import golden

pytestmark = pytest.mark.slow  # processes, trainings, or models at full size

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def block(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None, marker
    return found[1]


def shell(command: str, folder: Path) -> str:
    """What it prints, with the interpreter that runs the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = re.sub(r"^spikepatch ", f"{sys.executable} -m spikepatch ", command, flags=re.MULTILINE)
    done = subprocess.run(
        ["bash", "-euc", command],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the ten lines ran, and what they printed; CI has run them in a fresh environment."""
    if done := os.environ.get("SPIKEPATCH_README_SESSION"):
        return Path(done), Path(done, "printed.txt").read_text()
    folder = tmp_path_factory.mktemp("session")
    return folder, shell(block("ci: session"), folder)


def test_the_session_prints_what_is_shown(session: tuple[Path, str]) -> None:
    assert session[1] == block("output: session")


def test_convert_and_fold_print_what_is_shown(session: tuple[Path, str]) -> None:
    folder, _ = session
    assert shell("spikepatch convert arch:gpt2 out/ --overwrite", folder) == block("output: convert")
    assert shell("spikepatch fold out/ plain/ --overwrite", folder) == block("output: fold")


def test_check_prints_what_is_shown() -> None:
    """Some rows of its table, without the lines of the frame."""
    found = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["check", "arch:gpt2", "--recipe", "scaled-embed"])
    printed = {" ".join(re.sub(r"[│┃]", " ", line).split()) for line in found.stdout.splitlines()}
    rows = [" ".join(row.split()) for row in block("rows: check").splitlines()]
    assert len(rows) == 6
    assert [row for row in rows if row not in printed] == []


def test_codemod_prints_what_is_shown() -> None:
    printed = shell("spikepatch codemod model.py --factory model:small -q", ROOT / "examples/own_modelling_file")
    assert printed.endswith(block("ends: codemod"))


def test_commands_are_listed_and_parse() -> None:
    """Every line of a shell block that calls the program has options and arguments that it takes."""
    listed = re.search(r"```text\n(spikepatch audit SOURCE.*?)```", TEXT, re.DOTALL)
    assert listed is not None
    assert sorted(line.split()[1] for line in listed[1].splitlines()) == sorted(main.commands)
    lines = "".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ").splitlines()
    inline = [" ".join(command.split()) for command in re.findall(r"`(spikepatch [a-z]+ [^`]*)`", TEXT)]
    calls = [shlex.split(line) for line in [*lines, *inline] if line.startswith("spikepatch ")]
    assert len(calls) > 8
    for _, name, *words in calls:
        main.commands[name].make_context(name, words)


def test_megatron_options_are_as_shown() -> None:
    words = "recipes scaled-embed --for megatron --width 2048 --layers 24 -q".split()
    assert CliRunner().invoke(main, words).output == block("output: megatron")
    shown = " ".join(re.search(r"`spikepatch (recipes scaled-embed --for[^`]*)`", TEXT)[1].split())  # type: ignore[index]
    assert shown == " ".join(words)


def test_python_blocks_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for code in blocks:
        subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "patched/model.safetensors").exists()


def test_options_exist() -> None:
    options = set(re.findall(r"`(--[a-z-]+)", TEXT))
    assert len(options) >= 7
    help_text = "".join(CliRunner().invoke(main, [command, "--help"]).output for command in main.commands)
    assert {o for o in options if o not in help_text} == set()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_are_listed(recipe: Recipe) -> None:
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{recipe.name}`"))
    marks = [cell.strip() for cell in row.split("|")][-3:-1]
    assert marks == ["yes" if met else "no" for met in (recipe.small_sublayers, recipe.large_shortcut)]


def test_the_recipe_of_ones_own_is_one(tmp_path: Path) -> None:
    """Its file is read, and planned: a std of 0.02, and 0.02 over the root of 2 sub-layers in each of 3 layers."""
    file = tmp_path / "mine.toml"
    file.write_text(block("recipe"), encoding="utf-8")
    plan = spikepatch.plan(tiny_model("gpt2"), str(file), reinit="all")
    assert plan.recipe == "mine"
    assert plan.structural
    assert {fill.std for fill in plan.select(Fill)} == {0.02, 0.02 / math.sqrt(6)}
    assert "transformer.wte.weight" in plan.no_decay


def test_the_file_tree_is_there() -> None:
    tree = re.search(r"```text\n(patcher/.*?)```", TEXT, re.DOTALL)
    assert tree is not None
    names = re.findall(r"^    (\w+(?:\.py|/))", tree[1], re.MULTILINE)
    assert len(names) > 8
    assert [n for n in names if not (ROOT / "patcher/spikepatch" / n).exists()] == []


def test_architectures_are_counted_as_in_the_golden_file() -> None:
    proven = Counter(key.partition("/")[0] for key, value in golden().items() if value.get("proven"))
    total = Counter(key.partition("/")[0] for key in golden())
    counts = {task: f"{proven[task]} of {'its ' if task == 'causal' else ''}{total[task]}" for task in total}
    assert counts["tower"] == f"{total['tower']} of {total['tower']}"
    assert all(counts[task] in TEXT for task in ("causal", "seq2seq", "masked")), counts
    table = re.search(r"Refused are:\n\n(.*?)\n\n", TEXT, re.DOTALL)
    assert table is not None
    listed = [name for row in table[1].splitlines()[2:] for name in row.split("|")[1].strip().split(", ")]
    assert sorted(listed) == sorted(key.partition("/")[2] for key, value in golden().items() if not value.get("proven"))
