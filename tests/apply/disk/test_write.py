"""Safetensors files against the library's own, byte for byte, and the index against transformers'."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spikepatch.apply.disk import pipeline as stream
from spikepatch.apply.disk.manifest import file_hash
from spikepatch.apply.disk.write import Planned, split, write_checkpoint, write_text
from spikepatch.apply.values.draw import BLOCK, gaussian
from spikepatch.errors import BadSource
from spikepatch.source import pieces
from spikepatch.source.checkpoint import read_checkpoint, read_tensor
from spikepatch.source.formats import INDEX_FILE
from spikepatch.source.header import DTYPES, TensorEntry
from spikepatch.source.layout import layout
from spikepatch.source.meta import skeleton
from tests.architectures import tiny_model


def planned(tensors: dict[str, torch.Tensor]) -> list[Planned]:
    return [Planned(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def write(folder: Path, tensors: dict[str, torch.Tensor], files: dict[str, list[str]]) -> tuple[dict[str, str], int]:
    steps: list[int] = []
    written = write_checkpoint(folder, planned(tensors), files, tensors.__getitem__, steps.append)
    return dict(written.hashes), sum(steps)


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


# Streaming


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 100 elements, so that small tensors have many, and a last one that is shorter."""
    monkeypatch.setattr(pieces, "PIECE", 100)
    monkeypatch.setattr(stream, "PIECE", 100)


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, TensorEntry]:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return dict(read_checkpoint(folder).tensors)


def several() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (30, 41), "b": (1000,), "c": (), "d": (0, 3), "e": (3, 5, 7)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("kernel", [True, False])
def test_tensors_are_copied_as_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, kernel: bool) -> None:
    def unsupported(*_: object) -> int:
        raise OSError(errno.EXDEV, "another filesystem")

    if not kernel:
        monkeypatch.setattr(os, "copy_file_range", unsupported)
    monkeypatch.setattr(stream, "threads", lambda: count)
    entries = stored(tmp_path / "source", several())
    original = tmp_path / "source/model.safetensors"
    written = write_checkpoint(
        tmp_path, planned(several()), {"f": list(entries)}, entries.__getitem__, lambda done: None
    )
    assert (tmp_path / "f").read_bytes() == original.read_bytes()
    assert written.copies == {original: written.hashes["f"]} == {original: file_hash(original)}


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("change", ["metadata", "order", "dtype", "less", "computed"])
def test_what_is_no_copy_of_a_file(tmp_path: Path, change: str) -> None:
    """Its bytes are right, and the source's hash is not taken from it."""
    tensors = several()
    entries = stored(tmp_path / "source", tensors)
    wanted, content = planned(tensors), entries.__getitem__
    if change == "metadata":
        save_file(tensors, tmp_path / "source/model.safetensors", {"format": "pt", "x": "y"})
        content = dict(read_checkpoint(tmp_path / "source").tensors).__getitem__
    elif change == "order":
        save_file({f"{9 - i}": tensors[name] for i, name in enumerate(tensors)}, tmp_path / "source/model.safetensors")
        read = read_checkpoint(tmp_path / "source").tensors
        content = {name: read[f"{9 - i}"] for i, name in enumerate(tensors)}.__getitem__
    elif change == "dtype":
        wanted = [Planned(t.name, torch.float64, t.shape) for t in wanted]
    elif change == "less":
        wanted = wanted[1:]
    names = [t.name for t in wanted]

    def produce(name: str) -> Any:
        flat = tensors[name].reshape(-1)
        return (lambda start, stop: flat[start:stop]) if change == "computed" else content(name)

    written = write_checkpoint(tmp_path, wanted, {"f": names}, produce, lambda done: None)
    found = load_file(tmp_path / "f")
    assert found.keys() == set(names)
    assert all(torch.equal(found[t.name], tensors[t.name].to(t.dtype)) for t in wanted)
    assert written.copies == {}
    assert written.hashes["f"] == file_hash(tmp_path / "f")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_do_not_depend_on_pieces_or_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Of a tensor that crosses a block of its random fill, and of a cast."""
    shape = (3, BLOCK // 2 + 5)
    kept = {"kept": torch.randn(2000, generator=torch.Generator().manual_seed(1))}
    entries = stored(tmp_path / "source", kept)
    whole = gaussian(7, "drawn", 0, shape[0] * shape[1], 0.5).view(shape)
    wanted = [Planned("drawn", dtype, shape), Planned("kept", dtype, (2000,))]
    hashes = set()
    for count, piece in ((1, BLOCK), (3, BLOCK), (2, 300_001)):
        monkeypatch.setattr(stream, "threads", lambda n=count: n)
        monkeypatch.setattr(pieces, "PIECE", piece)
        written = write_checkpoint(
            tmp_path,
            wanted,
            {"f": ["kept", "drawn"]},
            lambda name: entries.get(name) or (lambda start, stop: gaussian(7, name, start, stop, 0.5)),
            lambda done: None,
        )
        hashes.add(written.hashes["f"])
        found = load_file(tmp_path / "f")
        assert torch.equal(found["drawn"], whole.to(dtype))
        assert torch.equal(found["kept"], kept["kept"].to(dtype))
        tally, exact = written.tallies["drawn"], found["drawn"].double()
        slack = 2 * torch.finfo(torch.float32).eps
        assert tally.total == pytest.approx(float(exact.sum()), abs=slack * float(exact.abs().sum()))
        assert tally.squares == pytest.approx(float(exact.square().sum()), rel=64 * slack)
    assert len(hashes) == 1


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("source", "target"),
    [(a, b) for a in ("float32", "float64", "bfloat16", "float16") for b in ("float16", "bfloat16", "float32")],
)
def test_what_a_cast_loses_is_counted(tmp_path: Path, source: str, target: str) -> None:
    wide, narrow = getattr(torch, source), getattr(torch, target)
    values = torch.tensor([1e300, -1e38, 7e4, 1.0, 0.0, 1e-7, -1e-12, 1e-300, math.nan, -math.inf], dtype=torch.float64)
    values = values.to(wide).repeat(31)
    cast = values.to(narrow)
    entries = stored(tmp_path / "source", {"x": values})
    written = write_checkpoint(
        tmp_path, [Planned("x", narrow, (310,))], {"f": ["x"]}, entries.__getitem__, lambda done: None
    )
    tally = written.tallies["x"]
    assert torch.equal(load_file(tmp_path / "f")["x"].nan_to_num(), cast.nan_to_num())
    assert tally.nonfinite == int((~cast.isfinite()).sum()) >= 62
    if wide == narrow:
        assert (tally.overflow, tally.underflow) == (0, 0)
    else:
        assert tally.overflow == int((values.isfinite() & ~cast.isfinite()).sum())
        assert tally.underflow == int(((values != 0) & (cast == 0)).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_bits_tell_what_is_not_finite(dtype: torch.dtype) -> None:
    """Against torch; every pattern of 16 bits, and the neighbours of infinity."""
    code = {getattr(torch, name): code for code, (name, _) in DTYPES.items()}[dtype]
    if dtype.itemsize == 2:
        values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    else:
        largest = torch.finfo(dtype).max
        values = torch.tensor([math.nan, math.inf, -math.inf, largest, -largest, 0.0, 1e-320, 1.0], dtype=dtype)
    parts = torch.view_as_real(values) if dtype.is_complex else values
    raw = values.view(torch.uint8).numpy().data
    assert pieces.nonfinite(raw, code) == int((~parts.isfinite()).sum()) >= 3
    assert pieces.nonfinite(raw[:0], code) == 0


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_source_that_shrinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool, dtype: torch.dtype
) -> None:
    if not kernel:
        monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    entries = stored(tmp_path / "source", several())
    os.truncate(entries["b"].file, entries["b"].end - 4)
    wanted = [Planned("b", dtype, (1000,))]
    with pytest.raises(BadSource, match="changed while it was read"):
        write_checkpoint(tmp_path, wanted, {"f": ["b"]}, entries.__getitem__, lambda done: None)


def test_a_full_disk_ends_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "pwrite", full)
    before = threading.active_count()
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, several(), {"f": list(several())})
    assert threading.active_count() == before


def test_who_is_interrupted_waits_for_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is closed when nobody writes to it any more: its number may be another file's a moment later."""
    ended: list[OSError | None] = []
    write_all = vars(stream)["write_all"]

    def noted(*arguments: Any) -> None:
        try:
            write_all(*arguments)
        except OSError as error:
            ended.append(error)
        else:
            ended.append(None)

    def slow(start: int, stop: int) -> torch.Tensor:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(0.4)
        return torch.zeros(stop - start)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "write_all", noted)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(
                tmp_path, [Planned("a", torch.float32, (4,))], {"a": ["a"]}, lambda name: slow, lambda count: None
            )
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended == [None, None]  # the header and the tensor


def test_torch_has_its_threads_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        write(tmp_path, several(), {"f": list(several())})
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
