"""Weights from the Hub, over real HTTP: what is fetched, when, and what becomes of a conversion if it is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import spikepatch
from tests.folders import hashes

if TYPE_CHECKING:
    from tests.conftest import LocalHub

GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 2, "vocab_size": 1000, "n_positions": 64}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}

#: Converts (source, out, options) of argv[1] one after the other, or plans without an out. What is reported is told to
#: the hub, too, and what was made of it is printed.
RUN_ALL = """
import contextlib, json, os, sys, urllib.error, urllib.parse, urllib.request
import spikepatch
told = set()
def tell(step, done=0, total=0):
    if step not in told:
        told.add(step)
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/told/" + urllib.parse.quote(step))
results = []
for source, out, options in json.loads(sys.argv[1]):
    told.clear()
    try:
        if out is None:
            spikepatch.plan(source, **options)
            results.append("planned")
        else:
            done = spikepatch.convert(source, out, progress=None if "HF_HUB_OFFLINE" in os.environ else tell, **options)
            results.append(f"{len(done.drift)} measured")
    except spikepatch.SpikepatchError as error:
        results.append([error.where, error.what, error.why, error.remedy])
print(json.dumps(results))
"""
WRITING = "GET /told/writing%20weights"


def run_all(environment: dict[str, str], *runs: tuple[str, Path | None, dict[str, Any]]) -> list[Any]:
    """What each run says, or the parts of its error; in a process that reads the hub's settings when it imports."""
    words = json.dumps([(source, out and str(out), options) for source, out, options in runs])
    command = [sys.executable, "-W", "error", "-c", RUN_ALL, words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return list(json.loads(done.stdout))


def weights(folder: Path) -> dict[str, str]:
    """Hashes of all that does not say where the source was."""
    kept = {name: digest for name, digest in hashes(folder).items() if name not in ("README.md", "spikepatch.json")}
    assert any(name.endswith(".safetensors") for name in kept)
    return kept


@pytest.fixture(scope="module")
def sharded(save_tiny: Callable[..., Path]) -> Path:
    """Learned weights in four shards, without a tokenizer."""
    return save_tiny("gpt2", max_shard_size="300KB", **GPT2)


def order(folder: Path) -> list[str]:
    """Its shards as they are needed: first the embedding's, whose std is planned with, and then as the index does."""
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = list(dict.fromkeys([places["transformer.wte.weight"], *places.values()]))
    assert len(needed) > 2
    return needed


@pytest.mark.parametrize("ranges", [True, False])
def test_shards_are_converted_as_they_arrive(sharded: Path, tmp_path: Path, hub: LocalHub, ranges: bool) -> None:
    """The third shard is not sent before another one is being written: a whole download first would never end."""
    hub.ranges = ranges
    hub.add("org/one", sharded)
    hub.add("org/two", sharded)
    shards = order(sharded)
    hub.held = {shards[2]: WRITING}
    runs: list[dict[str, Any]] = [
        {"reinit": "none"},
        {"reinit": "residual", "seed": 3, "dtype": "bfloat16", "max_shard_size": "250KB"},
    ]
    environment = hub.environment(tmp_path / "home", HF_HUB_DOWNLOAD_TIMEOUT="600")
    found = run_all(environment, ("org/one", tmp_path / "0", runs[0]), ("org/two", tmp_path / "1", runs[1]))
    assert found == ["0 measured"] * 2

    assert len(shards) == 4
    assert hub.fetched("org/one") == hub.fetched("org/two") == shards  # each once, one after the other
    last = next(i for i, line in enumerate(hub.requests) if line.startswith("GET") and line.endswith(shards[3]))
    headers = [i for i, line in enumerate(hub.requests) if ".safetensors bytes=" in line]
    assert len(headers) == 2 * len(shards)
    assert headers[len(shards) - 1] < hub.requests.index(WRITING) < last
    for i, options in enumerate(runs):
        local = spikepatch.convert(str(sharded), tmp_path / f"local{i}", **options)
        assert weights(tmp_path / str(i)) == weights(local.out)
        manifests = [json.loads((f / "spikepatch.json").read_text()) for f in (tmp_path / str(i), local.out)]
        assert manifests[0]["source"]["weights"] == manifests[1]["source"]["weights"]

    hub.requests.clear()
    offline = hub.environment(tmp_path / "home", HF_HUB_OFFLINE="1")
    assert run_all(offline, ("org/one", tmp_path / "offline", runs[0])) == ["0 measured"]
    assert hub.requests == []
    assert hashes(tmp_path / "offline") == hashes(tmp_path / "0")


def test_what_is_fetched_for_what(
    sharded: Path, tmp_path: Path, hub: LocalHub, save_tiny: Callable[..., Path], gpt2_tokenizer: Path
) -> None:
    measured = save_tiny("gpt2", max_shard_size="300KB", **{**GPT2, "vocab_size": 50257})
    shutil.copytree(gpt2_tokenizer, measured, dirs_exist_ok=True)
    count = len(list(measured.glob("*.safetensors")))
    assert count > 2
    none, dry = {"reinit": "none"}, {"reinit": "none", "dry_run": True}
    expected: list[tuple[Path, Path | None, dict[str, Any], str, int]] = [
        (sharded, tmp_path / "out", {"reinit": "all"}, "0 measured", 0),
        (sharded, None, {"reinit": "all"}, "planned", 0),
        (sharded, None, none, "planned", 1),
        (sharded, tmp_path / "not", dry, "0 measured", 1),  # it has no tokenizer to measure with
        (measured, tmp_path / "not", dry, "5 measured", count),
        (measured, tmp_path / "kept", none, "2 measured", count),
    ]
    for i, (folder, *_) in enumerate(expected):
        hub.add(f"org/{i}", folder)
    runs = [(f"org/{i}", out, options) for i, (_, out, options, _, _) in enumerate(expected)]
    assert run_all(hub.environment(tmp_path / "home"), *runs) == [said for *_, said, _ in expected]

    for i, (folder, out, options, _, files) in enumerate(expected):
        asked = [line for line in hub.requests if f"/org/{i}/" in line]
        assert asked
        fetched = hub.fetched(f"org/{i}")
        assert (len(fetched), len(set(fetched))) == (files, files)
        assert not files or fetched[0] == order(folder)[0]
        if options["reinit"] == "all":
            assert not [line for line in asked if ".safetensors" in line]
        assert out is None or out.exists() == (out.name != "not")
