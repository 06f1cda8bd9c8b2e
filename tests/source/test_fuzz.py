"""Headers, indexes and configs that nobody would write: a SpikepatchError or a right result, and nothing else."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from spikepatch.errors import SpikepatchError
from spikepatch.source.checkpoint import Checkpoint, read_checkpoint, read_tensor
from spikepatch.source.formats import INDEX_FILE, SINGLE_FILE
from spikepatch.source.open import build_meta, open_source
from tests.architectures import tiny_config

#: What one case may allocate: a header is refused before as much memory is taken as it claims.
MEMORY = 30_000_000

#: Values that a parser may stumble over.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400, -1, 0.5, float("inf"), float("nan"), 1e300]),
    st.text(max_size=8),
    st.sampled_from(
        ["F32", "BF16", "F8_E4M3", "../x", "/etc/passwd", "a\0b", "..", ".", "", "x\n'\"", "pt", "\ud800", "x" * 300]
    ),
    st.lists(st.integers(-1, 9), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)


def changed(draw: st.DrawFn, value: Any, depth: int = 0) -> Any:
    """JSON with one part of it, at any depth, replaced, removed or doubled."""
    if depth < 4 and isinstance(value, (dict, list)) and value and draw(st.integers(0, 4)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        how = draw(st.sampled_from(["inside", "inside", "inside", "remove", "rename"]))
        if how == "inside":
            copy[key] = changed(draw, value[key], depth + 1)
        elif how == "remove" or isinstance(copy, list):
            del copy[key]
        else:
            copy[draw(st.one_of(st.text(max_size=5), st.sampled_from(keys)))] = copy.pop(key)
        return copy
    return draw(ODD)


TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b.weight": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor(3),
    "empty": torch.zeros(0, 2),
}
WHOLE = save(TENSORS, {"format": "pt"})
HEAD = int.from_bytes(WHOLE[:8], "little")
HEADER, DATA = json.loads(WHOLE[8 : 8 + HEAD]), WHOLE[8 + HEAD :]


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A valid file with its header, its length, or some bytes changed."""
    header, data = HEADER, DATA
    kind = draw(st.sampled_from(["header", "header", "header", "bytes", "length", "raw"]))
    if kind == "raw":
        return draw(st.binary(max_size=64))
    if kind == "header":
        for _ in range(draw(st.integers(1, 2))):
            header = changed(draw, header)
    text = json.dumps(header).encode()
    length = len(text)
    if kind == "length":
        length = draw(st.one_of(st.integers(0, 2 * length), st.integers(0, 2**64 - 1)))
    found = bytearray(length.to_bytes(8, "little") + text + data)
    if kind == "bytes":
        for _ in range(draw(st.integers(1, 3))):
            found[draw(st.integers(0, len(found) - 1))] = draw(st.integers(0, 255))
        found = found[: draw(st.one_of(st.just(len(found)), st.integers(0, len(found))))]
    return bytes(found + draw(st.sampled_from([b"", b"", b"", b"x", bytes(9)])))


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def told(error: SpikepatchError) -> None:
    """The message has all its parts."""
    assert all((error.what, error.where, error.why, error.remedy)), error


def opened(folder: Path) -> Checkpoint | None:
    """The checkpoint, or None where it was refused in our own words."""
    with little_memory():
        try:
            return read_checkpoint(folder)
        except SpikepatchError as error:
            told(error)
            return None


def check_header(folder: Path, data: bytes) -> bool:
    """What is accepted, safetensors' own reader takes too, with the same tensors."""
    path = folder / SINGLE_FILE
    path.write_bytes(data)
    checkpoint = opened(folder)
    if checkpoint is None:
        return False
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(checkpoint.tensors)
        for name, entry in checkpoint.tensors.items():
            theirs, ours = file.get_tensor(name), read_tensor(entry)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
    return True


def check_index(folder: Path, index: Any) -> bool:
    """What is accepted is what the index and the shards say."""
    (folder / INDEX_FILE).write_text(json.dumps(index))
    checkpoint = opened(folder)
    if checkpoint is None:
        return False
    assert {name: entry.file.name for name, entry in checkpoint.tensors.items()} == index["weight_map"]
    assert all(entry.file.parent == folder for entry in checkpoint.tensors.values())
    return True


def largest(value: Any) -> float:
    """The largest number in JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return max(map(largest, value), default=0.0)
    return abs(value) if isinstance(value, (int, float)) and value == value else 0.0


def check_config(folder: Path, config: Any) -> bool:
    """What is accepted can be built, or is refused then."""
    (folder / "config.json").write_text(json.dumps(config))
    try:
        found = open_source(str(folder), weights=False)
        layers = found.config.num_hidden_layers
        # As many modules as it asks for would be built, and some constructors make tables of the size of a number.
        if (not isinstance(layers, int) or layers < 50) and largest(config) < 1 << 20:
            build_meta(found)
    except SpikepatchError as error:
        told(error)
        return False
    return True


def run(strategy: st.SearchStrategy[Any], examples: int, check: Callable[[Any], bool], *, accepted: int = 1) -> None:
    """Of ``examples`` cases some are refused, and at least ``accepted`` are not."""
    outcomes: Counter[bool] = Counter()

    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def case(value: Any) -> None:
        outcomes[check(value)] += 1

    case()
    assert outcomes[False] > examples // 4
    assert outcomes[True] >= accepted


def amounts(few: int) -> pytest.MarkDecorator:
    """1,000 cases in all by default, ten times as many with -m slow."""
    return pytest.mark.parametrize("examples", [few, pytest.param(10 * few, marks=pytest.mark.slow)])


@amounts(500)
def test_headers(examples: int, tmp_path: Path) -> None:
    assert check_header(tmp_path, WHOLE)
    run(files(), examples, lambda data: check_header(tmp_path, data))


@amounts(300)
def test_indexes(examples: int, tmp_path: Path) -> None:
    shards = {"one.safetensors": ["a", "c"], "two.safetensors": ["b.weight", "empty"]}
    for file, names in shards.items():
        (tmp_path / file).write_bytes(save({name: TENSORS[name] for name in names}, {"format": "pt"}))
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 40}, "weight_map": weight_map}
    assert check_index(tmp_path, index)
    outside = tmp_path.parent / "x"
    outside.mkdir(exist_ok=True)  # what "../x" would find
    run(st.composite(changed)(index), examples, lambda value: check_index(tmp_path, value))


@amounts(200)
def test_configs(examples: int, tmp_path: Path) -> None:
    config = tiny_config("llama").to_dict() | {"auto_map": {"AutoModelForCausalLM": "other--evil.Evil"}}
    assert not check_config(tmp_path, config)
    del config["auto_map"]
    assert check_config(tmp_path, config)
    run(st.composite(changed)(config), examples, lambda value: check_config(tmp_path, value))
