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

pytestmark = pytest.mark.slow  # processes, trainings, or models at full size

if TYPE_CHECKING:
    from tests.conftest import LocalHub

GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 2, "vocab_size": 1000, "n_positions": 64}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}

#: Runs the (function, source, out, options) of argv[1] one after the other. What is reported is told to the hub, too.
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
for name, source, out, options in json.loads(sys.argv[1]):
    told.clear()
    if name != "plan" and "HF_HUB_OFFLINE" not in os.environ:
        options["progress"] = tell
    try:
        done = getattr(spikepatch, name)(source, *([out] if out else []), **options)
        results.append(f"{len(done.drift)} measured" if name == "convert" else "done")
    except spikepatch.SpikepatchError as error:
        results.append([error.where, error.what, error.why, error.remedy])
print(json.dumps(results))
"""
WRITING = "GET /told/writing%20weights"


def run_all(environment: dict[str, str], *runs: tuple[str, str, Path | None, dict[str, Any]]) -> list[Any]:
    """What each run says, or the parts of its error; in a process that reads the hub's settings when it imports."""
    words = json.dumps([(name, source, out and str(out), options) for name, source, out, options in runs])
    command = [sys.executable, "-W", "error", "-c", RUN_ALL, words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if not line.endswith("are NOT used; --reinit none keeps them")]
    assert (done.returncode, told) == (0, []), done.stderr
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
    commit = hub.add("org/one", sharded)
    hub.add("org/two", sharded)
    shards = order(sharded)
    hub.before[shards[2]] = lambda: hub.wait_for(WRITING)
    runs: list[dict[str, Any]] = [
        {"reinit": "none"},
        {"reinit": "residual", "seed": 3, "dtype": "bfloat16", "max_shard_size": "250KB"},
    ]
    environment = hub.environment(tmp_path / "home", HF_HUB_DOWNLOAD_TIMEOUT="600")
    found = run_all(
        environment, ("convert", "org/one", tmp_path / "0", runs[0]), ("convert", "org/two", tmp_path / "1", runs[1])
    )
    assert found == ["0 measured"] * 2

    assert len(shards) == 4
    weighed = [line for line in hub.requests if "/org/one/resolve/" in line and ".safetensors" in line]
    assert weighed
    assert all(f"/resolve/{commit}/" in line for line in weighed)
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
    assert run_all(offline, ("convert", "org/one", tmp_path / "offline", runs[0])) == ["0 measured"]
    assert hub.requests == []
    assert hashes(tmp_path / "offline") == hashes(tmp_path / "0")


def test_what_is_fetched_for_what(
    sharded: Path, tmp_path: Path, hub: LocalHub, save_tiny: Callable[..., Path], gpt2_tokenizer: Path
) -> None:
    measured = save_tiny("gpt2", max_shard_size="300KB", **{**GPT2, "vocab_size": 50257})
    shutil.copytree(gpt2_tokenizer, measured, dirs_exist_ok=True)
    count = len(list(measured.glob("*.safetensors")))
    assert count > 2
    patched = spikepatch.convert(str(sharded), tmp_path / "patched", reinit="none").out
    none, dry = {"reinit": "none"}, {"reinit": "none", "dry_run": True}
    expected: list[tuple[str, Path, Path | None, dict[str, Any], str, int]] = [
        ("convert", sharded, tmp_path / "out", {"reinit": "all"}, "0 measured", 0),
        ("plan", sharded, None, {"reinit": "all"}, "done", 0),
        ("plan", sharded, None, none, "done", 1),
        ("convert", sharded, tmp_path / "not", dry, "0 measured", 1),  # it has no tokenizer to measure with
        ("convert", measured, tmp_path / "not", dry, "5 measured", count),
        ("convert", measured, tmp_path / "kept", none, "2 measured", count),
        ("fold", patched, tmp_path / "folded", {}, "done", 4),
        ("check", sharded, None, {"tokens": 8}, "done", 4),
    ]
    for i, (_, folder, *_) in enumerate(expected):
        hub.add(f"org/{i}", folder)
    runs = [(name, f"org/{i}", out, options) for i, (name, _, out, options, _, _) in enumerate(expected)]
    assert run_all(hub.environment(tmp_path / "home"), *runs) == [said for *_, said, _ in expected]

    for i, (_, folder, out, _, _, files) in enumerate(expected):
        asked = [line for line in hub.requests if f"/org/{i}/" in line]
        assert asked
        fetched = hub.fetched(f"org/{i}")
        assert (len(fetched), len(set(fetched))) == (files, files)
        if not files:
            assert not [line for line in asked if ".safetensors" in line]
        if files == 1:
            assert fetched == order(folder)[:1]
        assert out is None or out.exists() == (out.name != "not")
    assert weights(tmp_path / "folded") == weights(spikepatch.fold(str(patched), tmp_path / "local").out)


def test_a_shard_that_does_not_arrive(sharded: Path, tmp_path: Path, hub: LocalHub) -> None:
    """Nothing is left, what has arrived is kept, and the same command completes."""
    hub.add("org/model", sharded)
    shards = order(sharded)
    environment = hub.environment(tmp_path / "home")
    command = [sys.executable, "-m", "spikepatch", "convert", "org/model", "new/out", "--reinit", "none"]
    hub.failing[shards[2]] = 500
    failed = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert failed.returncode == 2, failed.stderr
    steps, _, message = failed.stderr.partition("error: ")
    assert "writing weights ..." in steps
    assert f"fetching {shards[0]} ..." in steps
    assert message.startswith(f"org/model: {shards[2]} cannot be fetched\n  why: ")
    assert "500" in message
    assert message.endswith(
        "remedy: check the connection, and run again: what has arrived is kept in the Hub's cache\n"
    )
    assert (len(message.splitlines()), failed.stdout) == (3, "")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert not list(tmp_path.rglob("*.incomplete"))
    assert hub.fetched("org/model") == shards[:3]

    hub.failing.clear()
    hub.requests.clear()
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.fetched("org/model") == shards[2:]
    assert weights(tmp_path / "new" / "out") == weights(
        spikepatch.convert(str(sharded), tmp_path / "local", reinit="none").out
    )


def test_every_header_is_checked_before_a_shard_is_fetched(sharded: Path, tmp_path: Path, hub: LocalHub) -> None:
    shards = order(sharded)
    broken, gone = tmp_path / "broken", tmp_path / "gone"
    for folder in (broken, gone):
        shutil.copytree(sharded, folder)
    (broken / shards[1]).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (broken / shards[2]).write_bytes((sharded / shards[2]).read_bytes()[:-8])
    (broken / shards[3]).write_bytes(b"")
    (gone / shards[1]).unlink()
    hub.add("org/broken", broken)
    hub.add("org/gone", gone)
    out, none = tmp_path / "out", {"reinit": "none"}
    hub.add("org/refused", sharded)
    hub.failing[shards[0]] = 403
    runs = [("convert", f"org/{name}", out, none) for name in ("broken", "gone", "refused")]
    first, second, refused = run_all(hub.environment(tmp_path / "home"), *runs)

    assert first[1] == "3 things are wrong with it"
    for shard, problem in zip(shards[1:], ("a git-lfs pointer", "is truncated: its", "is truncated: 0"), strict=True):
        assert f"{shard}: {problem}" in first[2]
    assert f"{shards[1]}: is missing" in second[2]
    assert hub.fetched("org/broken") == hub.fetched("org/gone") == []
    assert refused[1] == "access was refused"
    assert "HF_TOKEN" in refused[3]
    assert not out.exists()


def test_a_shard_that_is_another_when_it_arrives(sharded: Path, tmp_path: Path, hub: LocalHub) -> None:
    """Its header is read before, and compared with what arrives."""
    folder, shards = tmp_path / "changing", order(sharded)
    shutil.copytree(sharded, folder)
    hub.add("org/model", folder)
    file = folder / shards[2]
    another = file.read_bytes().replace(b"ln_1.weight", b"ln_9.weight", 1)
    assert another != file.read_bytes()
    hub.before[shards[2]] = lambda: file.write_bytes(another)
    run = ("convert", "org/model", tmp_path / "out", {"reinit": "none"})
    (found,) = run_all(hub.environment(tmp_path / "home"), run)

    assert Path(found[0]).name == shards[2]
    assert found[1] == "has changed while it was read"
    assert "what has arrived has another header" in found[2]
    assert not (tmp_path / "out").exists()
