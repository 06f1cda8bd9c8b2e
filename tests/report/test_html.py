"""The page: self-contained, escaped, and rendered by a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

from spikepatch.report.document import Badge, Chart, Line, Page, Section, Table
from spikepatch.report.html import picture, render, write_page, write_picture

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def example(text: str = "plain") -> Page:
    chart = Chart(text, "layer", "std", (Line(text, ((1, 0.1), (2, 10.0))), Line("b", ((1, 1.0),))), log=True)
    table = Table(text, (text, "b"), ((text, "1"), ("c", "2")))
    return Page(text, text, (Badge(text, text, "good"),), (Section(text, (text,), (table,), (chart,)),), text)


def test_nothing_from_the_network_and_no_script() -> None:
    text = render(example())
    assert "<script" not in text
    assert "@import" not in text
    links = re.findall(r"(?:src|href|action)\s*=\s*[\"']([^\"']*)", text) + re.findall(r"url\(([^)]*)\)", text)
    assert links == ["data:,"]  # an empty icon, so that no browser asks for one
    assert "prefers-color-scheme: dark" in text


def test_text_is_escaped() -> None:
    hostile = "<script>alert('x')</script>&{{ 7 * 7 }}"
    text = render(example(hostile))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "{{ 7 * 7 }}" in text


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
    assert drawn == [*names, *names]
    text = picture((chart, chart))
    assert text == (tmp_path / "picture.svg").read_text()
    assert "prefers-color-scheme: dark" in text
    assert re.findall(r"(?:src|href)\s*=|url\(|<script|@import", text) == []
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    legend = [g for g in root if (g.get("class") or "").startswith("series")]
    assert ["".join(g.itertext()) for g in legend] == list(names)
    places = [tuple(map(float, re.findall(r"[\d.]+", g.get("transform", "")))) for g in legend]
    assert len({y for _, y in places}) > 1
    assert all(x + 34 + 7 * len(name) <= width and y < height for (x, y), name in zip(places, names, strict=True))


def browse(*words: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,4000", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
