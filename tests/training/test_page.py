"""The page and the tables of a training: all runs, every event, of finished, unfinished and broken ones."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spikepatch.cli import main
from spikepatch.report.document import Chart, Page
from spikepatch.report.html import render, write_page
from spikepatch.report.svg import svg
from spikepatch.source.typed import parsed
from spikepatch.training.log import open_log, read
from spikepatch.training.page import page
from spikepatch.training.run_identity import run_folder
from spikepatch.training.verdict import Verdict
from tests.report.test_html import BROWSER, browse
from tests.training.synthetic import calm, folder


def spiky(model: str, lr: float, seed: int, step: int) -> float:
    """The unpatched model has a spike, and diverges at the largest learning rate: first high, then not finite."""
    loss = calm(model, lr, seed, step)
    if model == "vanilla" and lr > 3e-3 and step > 150:
        return 9.0 if step < 290 else math.nan
    return loss + 8 if model == "vanilla" and 120 <= step < 123 else loss


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["report", *words])


def texts(found: Page, section: str) -> list[str]:
    return [entry for s in found.sections if s.title == section for t in s.tables for row in t.rows for entry in row]


def lines_drawn(chart: Chart) -> int:
    groups = ElementTree.fromstring(str(svg(chart))).iter("g")
    return sum(len(group.findall("path")) for group in groups if group.get("class") == "series")


def test_every_run_and_every_event(tmp_path: Path) -> None:
    found = page(folder(tmp_path, curve=spiky, multipliers=(1, 2, 4), seeds=(0, 1), steps=400))
    titles = [section.title for section in found.sections]
    assert titles[:4] == ["Runs", "Loss and gradient norm", "Over the learning rate", "Events"]
    assert titles[-1] == "How it was run"
    assert [(badge.label, badge.value, badge.tone) for badge in found.badges] == [
        ("vanilla", "spikes", "warning"), ("patched", "healthy", "good"),
    ]  # fmt: skip
    runs, curves, rates, events = found.sections[:4]
    arms, table, models, scores = runs.tables
    assert [row[:3] for row in arms.rows[:2]] == [("0.001", "vanilla", "2 of 2"), ("0.001", "patched", "0 of 2")]
    assert runs.paragraphs[0].startswith("lr 0.001: patched: 0 of 2 runs have a loss event, 2 of 2 of vanilla")
    assert len(table.rows) == len(scores.rows) == 2 * 3 * 2
    assert {row[0]: row[4] for row in models.rows} == {"vanilla": "-", "patched": "0.004"}
    assert len(curves.charts) == 2 * 3 * 2
    for chart in curves.charts:
        assert [series.name for series in chart.series] == ["vanilla", "patched"]
        assert all(len(series.points) == 400 for series in chart.series)
        assert chart.series[0].events
        assert not chart.series[1].events
    numbers = {row[0] for row in events.tables[0].rows}
    shown = {event.label.split()[0] for chart in curves.charts for series in chart.series for event in series.events}
    assert numbers == shown == {str(i + 1) for i in range(len(numbers))}
    assert len(numbers) >= 2 * (2 + 2 + 2)
    (chart,) = rates.charts
    assert [[x for x, _ in series.points] for series in chart.series] == [[1e-3, 2e-3, 4e-3]] * 2
    assert {event.kind for event in chart.series[0].events} == {"one seed", "not back"}
    assert {event.kind for event in chart.series[1].events} == {"one seed"}


def test_an_event_lies_on_its_curve(tmp_path: Path) -> None:
    found = page(folder(tmp_path, curve=spiky))
    checked = 0
    for chart in found.sections[1].charts:
        for series in chart.series:
            for event in series.events:
                assert dict(series.points)[event.x] == event.y
                checked += 1
    assert checked == 2
    losses = found.sections[1].charts[0]
    assert losses.series[0].events[0].kind == "event of the loss"
    assert 120 <= losses.series[0].events[0].x < 123


def test_what_is_not_finite_is_a_gap_and_a_mark(tmp_path: Path) -> None:
    found = page(folder(tmp_path, ("a",), curve=lambda m, lr, s, n: math.nan if n == 100 else calm(m, lr, s, n)))
    for chart in found.sections[1].charts:
        (series,) = chart.series
        assert dict(series.points)[100] is None
        assert [(event.x, event.y, event.shape) for event in series.events] == [(100, None, "cross")]
        assert lines_drawn(chart) == 2


def test_a_wide_loss_gets_a_logarithmic_axis(tmp_path: Path) -> None:
    calm_page = page(folder(tmp_path / "a", ("a",)))
    wild_page = page(folder(tmp_path / "b", ("a",), curve=lambda m, lr, s, n: 1e4 if n == 90 else calm(m, lr, s, n)))
    assert [p.sections[1].charts[0].log for p in (calm_page, wild_page)] == [False, True]


def test_heat_maps_of_compared_models_share_their_scale(tmp_path: Path) -> None:
    found = page(folder(tmp_path, curve=spiky, multipliers=(2, 1), seeds=(0,)))
    inside = [section for section in found.sections if section.title.startswith("Inside")]
    assert [(s.title, s.folded) for s in inside] == [
        ("Inside the models, lr 0.001, seed 0", False), ("Inside the models, lr 0.002 (x 2), seed 0", True),
    ]  # fmt: skip
    for section in inside:
        stream, other, gradient, last = section.heat_maps
        assert [(len(m.rows), m.y) for m in section.heat_maps] == [(8, "sub-layer")] * 2 + [(4, "layer")] * 2
        assert stream.scale == other.scale != gradient.scale == last.scale
        assert stream.columns == tuple(range(1, 201, 20))
        present = [v for m in (stream, other) for row in m.values for v in row if v is not None]
        assert stream.scale == (min(present), max(present))


def test_an_unfinished_training(tmp_path: Path) -> None:
    path = folder(
        tmp_path, begun=2, ended=False, seeds=(0, 1),
        curve=lambda m, lr, s, n: None if m == "patched" and n > 70 else calm(m, lr, s, n),
    )  # fmt: skip
    log = path / run_folder("patched", 1e-3, 0) / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-7])  # torn
    found = page(path)
    told = found.sections[0].paragraphs[0]
    assert told.startswith("Not finished. patched is at step 69; 2 runs not begun: vanilla/lr1e-3-seed1")
    assert len(found.sections[0].tables[1].rows) == 2
    assert "69 of 200" in texts(found, "Runs")
    assert "Not finished" in render(found)
    done = run(str(path))
    assert done.exit_code == 0
    assert "not finished: 1 under way, 2 not begun" in done.stdout


@pytest.mark.parametrize("steps", [0, 1])
def test_hardly_begun(steps: int, tmp_path: Path) -> None:
    path = folder(tmp_path, ("a", "b"), begun=1, ended=False, curve=lambda m, lr, s, n: 2.0 if n <= steps else None)
    found = page(path)
    assert f"a is at step {steps}" in found.sections[0].paragraphs[0]
    assert ("no values" in render(found)) == (steps == 0)
    assert run(str(path)).exit_code == 0


def test_nothing_has_begun(tmp_path: Path) -> None:
    found = page(folder(tmp_path, begun=0))
    assert "2 runs not begun" in found.sections[0].paragraphs[0]
    assert [badge.value for badge in found.badges] == ["no run at x 1 yet"] * 2
    render(found)
    assert run(str(tmp_path)).exit_code == 0


def test_one_model_and_nothing_but_nan(tmp_path: Path) -> None:
    found = page(folder(tmp_path, ("a",), curve=lambda m, lr, s, n: math.nan))
    assert found.badges[0].tone == "bad"
    assert [section.title for section in found.sections][:3] == ["Runs", "Loss and gradient norm", "Events"]
    assert "no values" in render(found)


def test_rewinds(tmp_path: Path) -> None:
    path = folder(tmp_path, ("a",), begun=0)
    log = path / run_folder("a", 1e-3, 0) / "log.jsonl"
    whole = folder(tmp_path / "whole", ("a",), steps=100, ended=False) / run_folder("a", 1e-3, 0) / "log.jsonl"
    first, *lines = [json.loads(line) for line in whole.read_text().splitlines()]
    back = [line for line in lines if line["step"] > 40]
    log.parent.mkdir(parents=True)
    with open_log(log, resume_at=None) as file:
        rewind = {"type": "rewind", "step": 100, "to": 40, "skipped": [40, 99]}
        for record in (first, *lines, rewind, *back):
            file.write(record)
    found = page(path)
    chart = found.sections[1].charts[0]
    assert [(e.x, e.kind) for e in chart.series[0].events] == [(100, "rewind")]
    assert lines_drawn(chart) == 2
    assert texts(found, "Events") == ["a", "0.001", "0", "100", "40", "40 to 99"]
    inside = next(section for section in found.sections if section.title.startswith("Inside"))
    assert inside.heat_maps[0].columns == (1, 21, 41, 61, 81)


def test_text_is_escaped(tmp_path: Path) -> None:
    path = folder(tmp_path, ("a",), curve=spiky)
    hostile = "</title><script>alert('x')</script>\"'&{{ 7 * 7 }}[bold]"
    record = json.loads((path / "run.json").read_text())
    record["commands"] = record["data"]["files"] = [hostile]
    record["versions"] = {hostile: hostile}
    record["models"]["a"]["source"] = hostile
    (path / "run.json").write_text(json.dumps(record))
    log = path / run_folder("a", 1e-3, 0) / "log.jsonl"
    first, *lines = log.read_text().splitlines()
    run_record = json.loads(first) | {"name": hostile, "source": hostile, "notes": [hostile], "points": [hostile] * 8}
    log.write_text("\n".join([json.dumps(run_record), *lines]) + "\n")
    html = render(page(path))
    assert "<script" not in html
    assert html.count("</title>") == 1 + html.count("<title>", html.index("</head>"))
    assert html.count("&lt;script&gt;") > 5
    assert "{{ 7 * 7 }}" in html
    assert "[bold]" in run(str(path)).stdout


def test_nothing_from_the_network(tmp_path: Path) -> None:
    html = render(page(folder(tmp_path, curve=spiky)))
    assert "<script" not in html
    links = re.findall(r"(?:src|href|action)\s*=\s*[\"']([^\"']*)", html) + re.findall(r"url\(([^)]*)\)", html)
    assert len(links) > 4
    assert all(link.startswith(("data:", "#")) for link in links)


def test_the_command(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", curve=spiky)
    done = run(str(path))
    assert done.exit_code == 0
    for words in ("healthy", "held-out loss", "gradient norm", f"page: {path / 'report.html'}"):
        assert words in done.stdout
    assert (path / "report.html").read_text() == render(page(path))
    other = tmp_path / "other.html"
    done = run(str(path), "--out", str(other), "--json")
    assert done.exit_code == 0
    assert other.read_text() == render(page(path))
    verdict = parsed(Verdict, json.loads(done.stdout))
    assert [(r.name, r.verdict) for r in verdict.runs] == [("vanilla", "spikes"), ("patched", "healthy")]


def test_the_worst_runs_come_first(tmp_path: Path) -> None:
    found = page(folder(tmp_path, ("patched", "vanilla"), curve=spiky, seeds=(0, 1)))
    rows = found.sections[0].tables[1].rows
    assert [row[0] for row in rows] == ["vanilla", "vanilla", "patched", "patched"]


@pytest.mark.slow
def test_a_real_training(tmp_path: Path) -> None:
    """The page that the command leaves has every step of every log, and what was watched in between."""
    from tests.training.models import config_folder, text

    source, out = config_folder(tmp_path / "model"), tmp_path / "x"
    words = ["train", f"plain={source}", f"patched={source}@scaled-embed", "--data", str(text(tmp_path))]
    more = "--steps 5 --lr 3e-3 --batch-tokens 256 --seq-len 32 --watch-every 2".split()
    done = CliRunner().invoke(main, [*words, *more, "--out", str(out)])
    assert done.exit_code == 1, done.output
    assert "cannot tell" in done.stdout
    found = page(out)
    assert (out / "report.html").read_text() == render(found)
    losses, norms = found.sections[1].charts
    for i, name in enumerate(("plain", "patched")):
        steps = read(out / run_folder(name, 3e-3, 0) / "log.jsonl").steps
        assert len(steps) == 5
        assert losses.series[i].points == tuple((s.step, s.loss) for s in steps)
        assert norms.series[i].points == tuple((s.step, s.gradient_norm) for s in steps)
    inside = next(section for section in found.sections if section.title.startswith("Inside"))
    plain, patched, *_ = inside.heat_maps
    assert (len(plain.rows), plain.columns) == (4, (1, 3, 5))
    assert min(row[0] or 0 for row in patched.values) > max(row[0] or 0 for row in plain.values)  # a large shortcut
    assert not [section for section in found.sections if "Not finished" in " ".join(section.paragraphs)]


def test_many_events_are_not_all_printed(tmp_path: Path) -> None:
    def often(model: str, lr: float, seed: int, step: int) -> float:
        return calm(model, lr, seed, step) + (5 if step % 40 == 0 and step > 60 else 0)

    done = run(str(folder(tmp_path, ("a",), curve=often, steps=1000)))
    assert re.search(r"^and \d+ more, on the page$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "it has no run.json"),
        ("{", "run.json is not JSON"),
        ("[]", "run.json is not a JSON object"),
        ("{}", "run.json has no settings, lr, multipliers"),
        ('{"models": ["a"], "lr": "x", "multipliers": [1], "seeds": [0]}', "run.json has no settings"),
        ('{"models": {}, "lr": 1, "multipliers": [1], "seeds": [0]}', "run.json has no settings, data, versions"),
    ],
)
def test_other_folders_are_refused(content: str | None, why: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    done = run(str(tmp_path))
    assert done.exit_code == 2
    assert why in done.stderr
    assert "remedy: give what was --out" in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_what_cannot_be_read_or_written(tmp_path: Path) -> None:
    assert "there is no such folder" in run(str(tmp_path / "none")).stderr
    path = folder(tmp_path / "x")
    done = run(str(path), "--out", str(tmp_path / "none" / "a.html"))
    assert done.exit_code == 2
    assert "the page cannot be put there" in done.stderr
    (path / "report.html").write_text("notes of mine")
    done = run(str(path))
    assert (done.exit_code, "no page of spikepatch" in done.stderr) == (2, True)
    assert "vanilla, lr 0.001, seed 0: " in done.stdout, "the verdict comes first"
    assert (path / "report.html").read_text() == "notes of mine"
    assert run(str(path), "--overwrite").exit_code == 0
    log = path / run_folder("vanilla", 1e-3, 0) / "log.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"step": 7,', b'"step" 7,', 1))
    done = run(str(path))
    assert done.exit_code == 2
    assert "log.jsonl:9" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_a_browser(theme: str, tmp_path: Path) -> None:
    """Every curve, event and heat map of every model is there, without a message on the browser's console."""
    found = page(folder(tmp_path / "x", curve=spiky, multipliers=(1, 2, 4), seeds=(0, 1), steps=400))
    path = tmp_path / "report.html"
    write_page(found, path)
    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    shot = tmp_path / f"{theme}.png"
    done = browse("--enable-logging=stderr", "--v=0", *dark, f"--screenshot={shot}", path.as_uri())
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert shot.stat().st_size > 50_000
    dom = browse("--dump-dom", path.as_uri()).stdout
    figures = dom.split("<figure>")[1:]
    charts = [chart for section in found.sections for chart in section.charts]
    maps = [chart for section in found.sections for chart in section.heat_maps]
    assert (len(charts), len(maps)) == (2 * 3 * 2 + 1, 4 * 3 * 2)
    assert len(figures) == len(charts) + len(maps)
    assert sum('data-name="' in figure for figure in figures) == len(charts)
    for figure in figures:
        if 'data-name="' in figure:
            for name in ("vanilla", "patched"):
                line = figure.partition(f'data-name="{name}"')[2].partition("</g>")[0]
                assert "<path" in line, name
        else:
            assert figure.count("<image ") == 2
    events = sum(len(series.events) for chart in charts for series in chart.series)
    assert dom.count('<g class="event') == events > 20
