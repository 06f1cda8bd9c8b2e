"""The README says what the program does: commands, their output, Python blocks, the file tree."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from spikepatch.cli import main
from spikepatch.plans import Recipe
from spikepatch.recipes import RECIPES
from tests.residual.test_golden import golden

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def block(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None, marker
    return found[1]


def test_the_main_job_prints_what_the_readme_shows(tmp_path: Path) -> None:
    """The two commands after the installation, as they stand; CI runs the whole block in a fresh environment."""
    _, convert, load = block("ci: run").split("&&\n")
    convert = convert.replace(".venv/bin/spikepatch", f"{sys.executable} -m spikepatch")
    load = load.replace(".venv/bin/python", sys.executable)
    output = "".join(
        subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for command in (convert.strip(), load)
    )
    assert output == block("output: run")


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
