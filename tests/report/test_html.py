"""The page: self-contained, escaped, and rendered by a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import spikepatch
from spikepatch.preflight.present import page
from spikepatch.preflight.verdict import Thresholds
from spikepatch.report.document import Badge, Chart, Page, Section, Series, Table
from spikepatch.report.html import render, write_page
from tests.preflight.initialisations import gpt2

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def example(text: str = "plain") -> Page:
    chart = Chart(text, "layer", "std", (Series(text, ((1, 0.1), (2, 10.0))), Series("b", ((1, 1.0),))), log=True)
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


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_a_browser(theme: str, tmp_path: Path) -> None:
    """Every curve of every compared model is drawn, without a message on the browser's console."""
    model = gpt2(4, 64, 4, vocabulary=300, positions=32)
    report = spikepatch.check(model, recipes=["scaled-embed", "embed-ln"], tokens=16, deep=True, steps=3)
    path = tmp_path / "report.html"
    write_page(page(report, Thresholds()), path)

    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    shot = tmp_path / f"{theme}.png"
    done = browse("--enable-logging=stderr", "--v=0", *dark, f"--screenshot={shot}", path.as_uri())
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert shot.stat().st_size > 20_000
    dom = browse("--dump-dom", path.as_uri()).stdout
    charts = dom.split("<figure>")[1:]
    assert len(charts) == 6 + 4
    for chart in charts:
        for name in ("as it is", "scaled-embed", "embed-ln"):
            series = chart.partition(f'data-name="{name}"')[2].partition("</g>")[0]
            assert series.count("<circle") == 4, name


def browse(*words: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,4000", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
