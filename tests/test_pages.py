"""README and docs/ as pages: short, reachable, with links, commands and options that exist."""

from __future__ import annotations

import contextlib
import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest

from spikepatch.cli import main
from spikepatch.errors import SpikepatchError
from spikepatch.plans.plan import Recipe
from spikepatch.recipes.built_in import RECIPES
from tests import ROOT
from tests.blocks import blocks, prose
from tests.claims import CLAIMS, LONGER

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BY_NAME = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
#: Words of prose; tables and outputs are not counted.
MOST = {"README.md": 1200}
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


@cache
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@BY_NAME
def test_it_is_short(page: Path) -> None:
    assert 40 < len(prose(text(page)).split()) <= MOST.get(page.name, 1000)


@BY_NAME
def test_links_lead_somewhere(page: Path) -> None:
    pictures = re.findall(r'<img src="([^"]+)"', text(page))
    for link in [*LINK.findall(text(page)), *pictures]:
        if link.startswith(("https://", "http://")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_reached_from_the_readme() -> None:
    reached, todo = set(), [PAGES[0]]
    while todo:
        page = todo.pop()
        if page not in reached and page.suffix == ".md" and page.exists():
            reached.add(page)
            todo += [(page.parent / link.partition("#")[0]).resolve() for link in LINK.findall(text(page))]
    assert [page.name for page in PAGES if page not in reached] == []


def test_every_example_is_mentioned() -> None:
    names = [path.name for path in (ROOT / "examples").iterdir() if path.suffix == ".py" or path.is_dir()]
    every = "".join(map(text, PAGES))
    assert len(names) > 5
    assert [name for name in names if name != "__pycache__" and name not in every] == []


@BY_NAME
def test_commands_parse(page: Path) -> None:
    """Every call of the program, in blocks and in prose, has options and arguments that it takes."""
    whole = [block.text for block in blocks(text(page)) if block.language == "bash"]
    lines = "".join(whole).replace("\\\n", " ").splitlines()
    inline = [" ".join(found.split()) for found in re.findall(r"`(spikepatch [a-z]+ [^`]*)`", prose(text(page)))]
    for line in [line for line in lines if line.startswith("spikepatch ")] + inline:
        words = shlex.split(re.split(r" (?:[|&]|2?>)", line)[0], comments=True)
        if len(words) > 2 and "..." not in words and words[1] in main.commands:
            with contextlib.suppress(SpikepatchError, *([click.MissingParameter] if line in inline else [])):
                main.commands[words[1]].make_context(words[1], words[2:])  # a folder that is not there has parsed
        else:
            assert words[1] in main.commands or words[1].startswith("-"), line


@BY_NAME
def test_options_exist(page: Path) -> None:
    """An option that prose names in code is one of some command, of accelerate or of pip."""
    known = {name for command in main.commands.values() for p in command.params for name in p.opts + p.secondary_opts}
    assert len(known) > 50
    known |= {"--help", "--version", "--light"}
    named = set(re.findall(r"`(--[a-z][a-z-]*)", re.sub(r"^\|.*$", "", text(page), flags=re.MULTILINE)))
    assert named - known - FOREIGN == set()


#: Options of other programs that pages name.
FOREIGN = {"--smoke", "--use_fsdp", "--use"}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_are_listed(recipe: Recipe) -> None:
    page = text(ROOT / "docs/recipes.md")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{recipe.name}`"))
    marks = [cell.strip() for cell in row.split("|")][-3:-1]
    assert marks == ["yes" if met else "no" for met in (recipe.small_sublayers, recipe.large_shortcut)]


def test_the_rooms_are_listed() -> None:
    listed = re.findall(r"^\| `([a-z_/]+)/` \|", text(ROOT / "docs/design.md"), re.MULTILINE)
    house = ROOT / "patcher/spikepatch"
    rooms = [p.relative_to(house).as_posix() for p in house.rglob("*") if (p / "__init__.py").exists()]
    assert sorted(listed) == sorted(room for room in rooms if room not in ("apply", "runtime/adapters"))


def test_the_readme_lists_what_help_lists() -> None:
    """The README sends its reader to --help for the list of commands, so that has one, with a word on each."""
    shown = main.get_help(click.Context(main, info_name="spikepatch"))
    assert [name for name in main.commands if not re.search(rf"^ +{name} +\w", shown, re.MULTILINE)] == []


def test_claims_are_made() -> None:
    """What `python -m tests.claims` measures is what pages say; and of what takes longer, the commands exist."""
    assert len(CLAIMS) >= 8
    for claim in CLAIMS:
        assert all(float(figure.replace(",", "")) >= 0 for figure in claim.figures()), claim
    for command in LONGER.values():
        for words in re.findall(r"(?:-m (tests[\w.]*)|python (examples/\S+\.py))", command):
            module = words[0].replace(".", "/")
            assert any((ROOT / place).exists() for place in (words[1] or f"{module}.py", f"{module}/__main__.py")), (
                command
            )
