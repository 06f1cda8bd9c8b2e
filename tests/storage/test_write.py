"""Safetensors files against the library's own, byte for byte, and the index against transformers'."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spikepatch.apply.tensors import layout
from spikepatch.residual.trace import skeleton
from spikepatch.storage.formats import INDEX_FILE
from spikepatch.storage.header import DTYPES
from spikepatch.storage.read import read_checkpoint, read_tensor
from spikepatch.storage.write import Planned, split, write_checkpoint, write_text
from tests.architectures import tiny_model


def planned(tensors: dict[str, torch.Tensor]) -> list[Planned]:
    return [Planned(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def write(folder: Path, tensors: dict[str, torch.Tensor], files: dict[str, list[str]]) -> tuple[dict[str, str], int]:
    steps: list[int] = []
    written = write_checkpoint(folder, planned(tensors), files, tensors.__getitem__, steps.append)
    return written.hashes, sum(steps)


def examples() -> dict[str, torch.Tensor]:
    """Every dtype that is written, in an order of its own; odd names; an empty tensor and a scalar."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, (name, (torch_name, size)) in enumerate(DTYPES.items()):
        raw = torch.randint(
            0, 2 if name == "BOOL" else 120, (3 * (i + 1) * size,), generator=generator, dtype=torch.uint8
        )
        tensors[f"{(7 * i) % 10}.{name}"] = raw.view(getattr(torch, torch_name)).reshape(3, i + 1)
    tensors["empty"] = torch.zeros(0, 5)
    tensors["scalar"] = torch.tensor(1.5, dtype=torch.bfloat16)
    tensors['odd "name"\n\x01 é 漢'] = torch.ones(2)
    return tensors


def test_same_bytes_as_safetensors(tmp_path: Path) -> None:
    tensors = examples()
    assert len(tensors) == len(DTYPES) + 3
    hashes, bytes_written = write(tmp_path, tensors, {"ours.safetensors": list(tensors)})
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "ours.safetensors").read_bytes()
    assert data == (tmp_path / "theirs.safetensors").read_bytes()
    assert hashes == {"ours.safetensors": hashlib.sha256(data).hexdigest()}
    assert bytes_written == sum(t.numel() * t.itemsize for t in tensors.values())


def test_readable(tmp_path: Path) -> None:
    tensors = examples()
    write(tmp_path, tensors, {"model.safetensors": list(tensors)})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read, tensor), name
    entries = read_checkpoint(tmp_path).tensors
    assert all(torch.equal(read_tensor(entries[name]), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6, 7])
def test_data_is_aligned(tmp_path: Path, count: int) -> None:
    tensors = {"x" * (count + 1): torch.ones(3)}
    write(tmp_path, tensors, {"model.safetensors": list(tensors)})
    length = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0


def test_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    tensors = {"t": torch.arange(12.0).reshape(3, 4).T, "s": torch.arange(10.0)[::3]}
    write(tmp_path, tensors, {"model.safetensors": list(tensors)})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("content", [torch.ones(3), lambda start, stop: torch.ones(1)], ids=["value", "computed"])
def test_a_value_unlike_its_plan_is_our_own_bug(tmp_path: Path, content: Any) -> None:
    wanted = [Planned("a", torch.float32, (2,))]
    with pytest.raises(AssertionError):
        write_checkpoint(tmp_path, wanted, {"f": ["a"]}, lambda name: content, lambda n: None)


@pytest.mark.parametrize(("model_type", "size"), [("gpt2", "20KB"), ("gpt2", "5GB"), ("mixtral", "5GB")])
def test_shards_and_index_as_transformers_writes_them(tmp_path: Path, model_type: str, size: str) -> None:
    """Not so for experts in small shards: transformers keeps all of a layer in one file, larger than was asked."""
    model = tiny_model(model_type)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    model.save_pretrained(theirs, max_shard_size=size)
    entries = read_checkpoint(theirs).tensors
    tensors = {target.name: read_tensor(entries[target.name]) for target in layout(skeleton(model))}
    assert tensors.keys() == entries.keys()

    ours.mkdir()
    files = split(planned(tensors), size)
    assert (len(files) > 3) is (size == "20KB")
    hashes, _ = write(ours, tensors, files)
    assert hashes.keys() == {path.name for path in ours.iterdir()}
    for name, digest in hashes.items():
        data = (ours / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
        if name == INDEX_FILE:
            assert json.loads(data) == json.loads((theirs / name).read_text())
        else:
            assert data == (theirs / name).read_bytes(), name


def test_text(tmp_path: Path) -> None:
    assert write_text(tmp_path / "t", "é\n") == hashlib.sha256("é\n".encode()).hexdigest()
    assert (tmp_path / "t").read_bytes() == "é\n".encode()
