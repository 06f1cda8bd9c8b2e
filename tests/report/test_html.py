"""The page: self-contained, escaped, and rendered by a real browser."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest

from spikepatch.errors import BadTarget
from spikepatch.report.document import Badge, Chart, Line, Page, Ranked, Section, Table
from spikepatch.report.html import check_page, picture, render, write_page, write_picture

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


SVG = "{http://www.w3.org/2000/svg}"


def example(text: str = "plain") -> Page:
    chart = Chart(text, "layer", "std", (Line(text, ((1, 0.1), (2, 10.0))), Line("b", ((1, 1.0),))), log=True)
    table = Table(text, (text, "b"), ((text, "1"), ("c", "2")))
    return Page(text, text, (Badge(text, text, "good"),), (Section(text, (text,), (table,), (chart,)),), text)


def test_nothing_from_the_network_and_no_script() -> None:
    text = render(example())
    assert "<script" not in text
    assert "@import" not in text
    links = re.findall(r"(?:src|href|action)\s*=\s*[\"']([^\"']*)", text) + re.findall(r"url\(([^)]*)\)", text)
    links = [link for link in links if not link.startswith("#")]  # of the page itself
    assert links == ["data:,"]  # an empty icon, so that no browser asks for one
    assert "prefers-color-scheme: dark" in text


def test_text_is_escaped() -> None:
    hostile = "<script>alert('x')</script>&{{ 7 * 7 }}"
    text = render(example(hostile))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "{{ 7 * 7 }}" in text


def test_it_reads_well_on_a_small_screen() -> None:
    """As wide as the screen; what is wider scrolls in a box of its own; letters of a drawing are not too small."""
    text = render(example())
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert len(re.findall(r'<div class="scroll"><table>', text)) == text.count("<table>") == 1
    assert re.search(r"svg.chart \{[^}]*width: 100%", text)
    wide = float(re.findall(r'viewBox="0 0 (\d+)', text)[0])
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px; text-anchor", text)]
    assert sizes
    assert min(sizes) * (420 - 2 * 12 - 2 * 8) / wide > 9  # margins of the page and of the figure


def test_findings_say_their_rank_in_a_word_and_a_colour() -> None:
    section = Section("Findings", ranked=(Ranked("unstable", "<a>", "bad"), Ranked("note", "b")))
    text = render(Page("t", "s", (), (section,)))
    assert '<li class="bad"><strong>unstable</strong> &lt;a&gt;</li>' in text
    assert '<li class="neutral"><strong>note</strong> b</li>' in text


def test_columns_that_say_nothing_are_not_on_the_page() -> None:
    table = Table("", ("a", "empty", "x"), (("1", "-", "1"), ("2", "-", "1")), {"x": "1"})
    text = render(Page("t", "s", (), (Section("s", tables=(table,)),)))
    assert re.findall(r"<th\b[^>]*>(.*?)</th>", text) == ["a"]


def test_the_same_page_again(tmp_path: Path) -> None:
    write_page(example(), tmp_path / "a.html")
    write_page(example(), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_picture_is_a_document_of_its_own(tmp_path: Path) -> None:
    """Well-formed, nothing from the network, every line in every chart, and each name in the legend inside of it."""
    names = ("as it is", "<&>", *(f"a recipe with a long name, {i}" for i in range(6)))
    chart = Chart("<&>", "layer", "std", tuple(Line(name, ((1, 0.1), (2, 10.0))) for name in names), log=True)
    write_picture((chart, chart), tmp_path / "picture.svg")
    root = ElementTree.parse(tmp_path / "picture.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    drawn = [each.get("data-name") for each in root.iter() if each.get("data-name")]
    assert set(drawn) == set(names)
    assert len(drawn) == 2 * 2 * len(names)  # a line and its dots, in both charts
    text = picture((chart, chart))
    assert text == (tmp_path / "picture.svg").read_text()
    assert "prefers-color-scheme: dark" in text
    assert re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)|url\((?!#)|<script|@import", text) == []
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    placed = {
        each.text: (float(each.get("x", 0)), float(each.get("y", 0)))
        for each in root.iter(f"{SVG}text")
        if each.text in names
    }
    assert len(placed) == len(names)
    assert len({y for _, y in placed.values()}) > 1
    assert all(x + 7 * len(name) <= width and y < height for name, (x, y) in placed.items())


def browse(*words: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,4000", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


@contextmanager
def full_disk(left: int = 100) -> Iterator[None]:
    """No file grows over ``left`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", ["page.html", "picture.svg"])
def test_a_full_disk_leaves_the_old_page(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    charts = example().sections[0].charts
    write = partial(write_page, example()) if name == "page.html" else partial(write_picture, charts)
    write(path)
    old = path.read_bytes()
    with (
        full_disk(),
        pytest.raises(BadTarget, match=r"written\n  why: .*; what was there before is as it was"),
    ):
        write(path)
    assert path.read_bytes() == old
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_what_a_page_replaces(tmp_path: Path) -> None:
    """A page or a picture of ours, or nothing; else only with overwrite. A link keeps pointing to it."""
    charts, path = example().sections[0].charts, tmp_path / "page.html"
    write_picture(charts, path)
    write_page(example(), path)
    (tmp_path / "empty").touch()
    write_page(example(), tmp_path / "empty")
    (tmp_path / "link").symlink_to("page.html")
    write_page(example("other"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert "other" in path.read_text()
    path.write_text("<html>somebody's, made by hand</html>")
    with pytest.raises(BadTarget, match=r"no page of spikepatch\n.*\n.*--overwrite"):
        write_page(example(), path)
    write_page(example(), path, overwrite=True)
    assert path.read_text() == render(example())


def test_where_no_page_can_be(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "up").symlink_to("model")
    os.mkfifo(tmp_path / "pipe")
    cases = {"model": "it is a folder", "pipe": "it is no file", "absent/page.html": "is no folder"}
    cases |= dict.fromkeys(("model/page.html", "up/page.html", "model/a/../page.html"), "is read, and stays as it is")
    for name, why in cases.items():
        sources = [tmp_path / "model"] if "read" in why else []
        with pytest.raises(BadTarget, match=why):
            check_page(tmp_path / name, overwrite=True, sources=sources)
    check_page(tmp_path / "page.html", sources=[tmp_path / "model"])
