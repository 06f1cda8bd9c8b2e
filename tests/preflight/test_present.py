"""The page of a check, in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest

import spikepatch
from spikepatch.preflight.judge import Thresholds
from spikepatch.preflight.present import page
from spikepatch.report.html import write_page
from tests.preflight.initialisations import gpt2
from tests.report.test_html import BROWSER, browse


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
            series = [part.partition("</g>")[0] for part in chart.split(f'data-name="{name}"')[1:]]
            assert sum(part.count("<use") for part in series) == 4, name
