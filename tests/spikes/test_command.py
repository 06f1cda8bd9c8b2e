"""``spikepatch spikes``: what it prints, its page, its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from spikepatch.cli import main
from tests.spikes.curves import Array, fall, flat, ramp, spike
from tests.spikes.logs import LINES


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["spikes", *map(str, words)])


def write(path: Path, losses: Array, norms: Array | None = None) -> Path:
    writer = LINES["llm.c's output"][0]
    sizes = norms if norms is not None else np.ones(len(losses))
    path.write_text("\n".join(writer(s, x, n) for s, (x, n) in enumerate(zip(losses, sizes, strict=True), 1)))
    return path


def test_it_says_what_it_read_and_what_cannot_be_judged(tmp_path: Path) -> None:
    done = run(write(tmp_path / "log.txt", fall(300)))
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].endswith("llm.c's output; 300 rows, steps 1 to 300, every step")
    assert lines[1] == "loss: of one step each, 6 digits behind the point; gradient norm: logged"
    assert lines[2] == "cannot be judged: the first 8 rows, to step 8, only make the baseline"
    assert re.fullmatch(r"healthy: no spike in steps 9 to 300; largest excess 0\.\d+ nats at step \d+", lines[3])
    assert len(lines) == 4


def test_exit_codes(tmp_path: Path) -> None:
    healthy = write(tmp_path / "a", fall(300))
    blip = write(tmp_path / "b", fall(300) + spike(300, 200, 2.0, 0.1))
    spiked = write(tmp_path / "c", fall(300) + spike(300, 200, 2.0, 5.0))
    gone = write(tmp_path / "d", fall(300) + ramp(300, 150, 40, 3.0))
    short = write(tmp_path / "e", fall(30))
    codes = {path.name: run(path).exit_code for path in (healthy, blip, spiked, gone, short)}
    assert codes == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 1}
    assert run(healthy, spiked).exit_code == 1
    assert run(healthy, blip).exit_code == 0
    missing = run(tmp_path / "none")
    assert missing.exit_code == 2
    assert "remedy:" in missing.stderr


def test_lines_fit_a_terminal(tmp_path: Path) -> None:
    log = str(write(tmp_path / "c", fall(300) + spike(300, 200, 2.0, 5.0)))
    lines = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["spikes", log]).stdout.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("─"))
    assert lines[rule - 1].split()[:5] == ["#", "in", "kind", "onset", "peak"]
    assert lines[rule + 1].split()[:4] == ["1", "loss", "spike", "201"]
    assert max(map(len, lines)) <= max(80, len(log) + 80)
    assert run(write(tmp_path / "c", fall(300)), "-q").stdout.startswith("healthy: ")


def test_json(tmp_path: Path) -> None:
    path = write(tmp_path / "c", fall(300) + spike(300, 200, 2.0, 5.0))
    found = json.loads(run(path, "--json").stdout)
    assert (found["verdict"], found["passed"], found["judged"]) == ("spikes", False, [9, 300])
    assert found["log"]["format"] == "llm.c's output"
    (event,) = found["events"]
    assert (event["onset"], event["form"], event["kind"]) == (201, "spike", "loss")
    assert len(json.loads(run(path, path, "--json").stdout)) == 2


def test_a_twin(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, 300)
    noise[150] += 1
    a = write(tmp_path / "a", fall(300) + noise + spike(300, 220, 2.0, 5.0))
    b = write(tmp_path / "b", fall(300, 0.005, seed=1) + noise)
    done = run(a, "--against", b)
    assert "both: data" in done.stdout
    assert "this run only" in done.stdout
    assert "on the same batches (correlation 0." in done.stdout


def test_the_page(tmp_path: Path) -> None:
    losses, norms = fall(300) + spike(300, 200, 2.0, 5.0), np.exp(flat(300, 0.0))
    norms[200] = 50
    page = tmp_path / "page.html"
    done = run(write(tmp_path / "log.txt", losses, norms), "--report", page)
    assert f"page: {page}" in done.stdout
    html = page.read_text()
    assert html.count('class="span"') == 3  # the loss, the norm, and the event from near
    for words in ("Gradient norm, ", "From near, ", "2: spike, from step 201", 'data-name="level"'):
        assert words in html
    assert "<script" not in html
    assert run(tmp_path / "log.txt", "--report", tmp_path / "none" / "p.html").exit_code == 2


def test_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("n,ce\n" + "".join(f"{s},{x}\n" for s, x in enumerate(fall(300), 1)))
    refused = run(path)
    assert refused.exit_code == 2
    assert "its keys are ce, n" in refused.stderr
    assert run(path, "--loss", "ce", "--step", "n").exit_code == 0
