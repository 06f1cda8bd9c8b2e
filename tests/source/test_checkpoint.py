"""Headers and indexes: what is read as safetensors reads it, and what is refused, with the file and the remedy."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikepatch.errors import BadSource
from spikepatch.source.checkpoint import Checkpoint, check_unchanged, read_checkpoint, read_tensor
from spikepatch.source.header import DTYPES, MAX_HEADER_BYTES, read_header

TINY = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}


def encode(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_shards(folder: Path, shards: dict[str, list[str]], weight_map: dict[str, Any]) -> None:
    for file, names in shards.items():
        save_file({name: torch.ones(2) for name in names}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(folder: Path) -> BadSource:
    with pytest.raises(BadSource) as caught:
        read_checkpoint(folder)
    assert caught.value.where == str(folder)
    return caught.value


def assert_reads_like_safetensors(checkpoint: Checkpoint) -> None:
    expected: dict[str, torch.Tensor] = {}
    for shard in checkpoint.shards:
        expected |= load_file(checkpoint.folder / shard)
    assert expected
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        target = torch.empty_like(tensor)
        assert read_tensor(checkpoint.tensors[name], target) is target
        for actual in (read_tensor(checkpoint.tensors[name]), target):
            assert (actual.dtype, actual.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(actual.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_every_dtype_is_read_bit_for_bit(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), 'quo"te\n': torch.ones(1)}
    for code, (name, itemsize) in DTYPES.items():
        data = torch.randint(0, 2 if code == "BOOL" else 256, (15 * itemsize,), dtype=torch.uint8, generator=random)
        tensors[f"x.{code}"] = data.view(getattr(torch, name)).reshape(3, 5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    checkpoint = read_checkpoint(tmp_path)

    assert checkpoint.shards == ("model.safetensors",)
    assert {e.dtype for e in checkpoint.tensors.values()} == set(DTYPES)
    assert_reads_like_safetensors(checkpoint)


def test_shards_as_transformers_writes_them(save_tiny: Callable[..., Path]) -> None:
    checkpoint = read_checkpoint(save_tiny("llama", max_shard_size="2KB", **TINY))

    assert len(checkpoint.shards) > 2
    assert_reads_like_safetensors(checkpoint)


@pytest.mark.slow
def test_a_real_checkpoint_with_mixed_dtypes(minilm: Path) -> None:
    checkpoint = read_checkpoint(minilm)

    assert {e.dtype for e in checkpoint.tensors.values()} == {"F32", "I64"}
    assert_reads_like_safetensors(checkpoint)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {"late": entry(8, 16), "early": entry(0, 8)}
    (tmp_path / "model.safetensors").write_bytes(encode(header, bytes(16)))

    assert list(read_checkpoint(tmp_path).tensors) == ["early", "late"]


@pytest.mark.parametrize("padding", [0, 200_000])
def test_of_a_file_that_is_elsewhere_the_first_bytes_are_enough(tmp_path: Path, padding: int) -> None:
    data = encode({"__metadata__": {"x": "x" * padding}, "a": entry(0, 400_000)}, bytes(400_000))
    (tmp_path / "here").write_bytes(data)
    asked = []

    def first_bytes(count: int) -> tuple[bytes, int]:
        asked.append(count)
        return data[:count], len(data)

    entries, metadata = read_header(tmp_path / "elsewhere", first_bytes)

    assert sum(asked) < 400_000
    assert len(asked) == (2 if padding else 1)
    (found,), (local,) = entries.values(), read_header(tmp_path / "here")[0].values()
    assert found == dataclasses.replace(local, file=tmp_path / "elsewhere")
    assert len(metadata["x"]) == padding


TWO = {"a": entry(0, 8), "b": entry(8, 16)}

BAD_FILES: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "is truncated: 0 bytes", "download the file again"),
    "short": (b"\1\0\0", "is truncated: 3 bytes", "download the file again"),
    "header cut": (encode(TWO)[:40], "is truncated: the header has", "download the file again"),
    "data cut": (encode(TWO, bytes(15)), "its tensors end at byte", "download the file again"),
    "oversized": (struct.pack("<Q", MAX_HEADER_BYTES + 1), "no safetensors file", "download"),
    "not JSON": (encode(b"{nonsense"), "the header is not JSON", "download"),
    "not UTF-8": (encode(b'{"\xff": 1}'), "the header is not JSON", "download"),
    "deep": (encode(b'{"a":' * 100_000), "the header is not JSON: nested too deeply", "download"),
    "long number": (encode(b'{"a":' + b"9" * 5000 + b"}"), "the header is not JSON", "download"),
    "not an object": (encode([1]), "the header is not a JSON object", "download"),
    "duplicate": (encode(b'{"a": {}, "a": {}}'), "a key occurs twice", "download"),
    "no fields": (encode({"a": {}}), "'a' does not have dtype, shape and data_offsets", "download"),
    "fields not an object": (encode({"a": 3}), "'a' does not have dtype", "download"),
    "dtype": (encode({"a": entry(0, 8, dtype="Q9")}, bytes(8)), "unknown dtype 'Q9'", "download"),
    "dtype a list": (encode({"a": entry(0, 8, dtype=[])}, bytes(8)), "unknown dtype []", "download"),
    "negative": (encode({"a": entry(0, 8, [-2])}, bytes(8)), "not lists of natural numbers", "download"),
    "boolean shape": (encode({"a": entry(0, 4, [True])}, bytes(4)), "not lists of natural numbers", "download"),
    "three offsets": (encode({"a": {**TWO["a"], "data_offsets": [0, 4, 8]}}, bytes(8)), "natural numbers", "download"),
    "reversed": (encode({"a": entry(8, 0, [2])}, bytes(8)), "has -8 bytes", "download"),
    "size": (encode({"a": entry(0, 8, [3])}, bytes(8)), "has 8 bytes, which is not what F32 [3] takes", "download"),
    "overlap": (encode({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "'b' overlaps the tensor before", "download"),
    "gap": (encode({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "'b' leaves a gap", "download"),
    "late start": (encode({"a": entry(4, 12)}, bytes(12)), "'a' leaves a gap", "download"),
    "trailing": (encode(TWO, bytes(17)), "has 1 bytes after its last tensor", "download"),
    "metadata": (encode({"__metadata__": {"a": 1}}), "__metadata__ is not a map", "download"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer", "git lfs pull"),
    "pickle": (pickle.dumps(list(range(100))), "a pickle", "save_pretrained"),
    "zip": (b"PK\3\4" + bytes(99), "a pickle", "save_pretrained"),
    "HTML": (b"<!DOCTYPE html><html><body>Not found</body></html>", "an HTML or XML page", "download the file again"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(99), "a GGUF file", "safetensors original"),
    "fp8": (encode({"a": entry(0, 8, [8], "F8_E4M3")}, bytes(8)), "quantised weights: 'a' (F8_E4M3)", "dequantise"),
    "fp4": (encode({"a": entry(0, 8, [16], "F4")}, bytes(8)), "quantised weights: 'a' (F4)", "dequantise"),
    "int8": (
        encode({"m.weight": entry(0, 8, [2, 4], "I8"), "m.weight_scale": entry(8, 16)}, bytes(16)),
        "quantised weights: 'm.weight' (I8)",
        "dequantise",
    ),
    "gptq": (
        encode(
            {"m.qweight": entry(0, 8, [1, 2], "I32"), "m.scales": entry(8, 16), "m.qzeros": entry(16, 24)}, bytes(24)
        ),
        "quantised weights: 'm.qweight' (I32)",
        "dequantise",
    ),
}


@pytest.mark.parametrize(("content", "why", "remedy"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused(tmp_path: Path, content: bytes, why: str, remedy: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)

    error = refusal(tmp_path)

    assert error.why.startswith("model.safetensors: ")
    assert why in error.why
    assert remedy in error.remedy


def test_integer_masks_and_counters_are_no_quantised_weights(tmp_path: Path) -> None:
    mask, scale = torch.ones(1, 1, 4, 4, dtype=torch.uint8), torch.ones(4)
    save_file({"attn.mask": mask, "norm.scale": scale}, tmp_path / "model.safetensors")

    assert len(read_checkpoint(tmp_path).tensors) == 2


BAD_INDEXES: dict[str, tuple[bytes, str, str]] = {
    "not JSON": (b"{", "is not JSON", "download"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer", "git lfs pull"),
    "list": (b"[]", "has no weight_map", "download"),
    "no map": (b'{"metadata": {}}', "has no weight_map", "download"),
    "numbers": (b'{"weight_map": {"a": 3}}', "has no weight_map", "download"),
    "empty": (b'{"weight_map": {}}', "lists no tensors", "download"),
    "duplicate": (b'{"weight_map": {"a": "x", "a": "y"}}', "a key occurs twice", "download"),
    "parent": (b'{"weight_map": {"a": "../x.safetensors"}}', "points outside the folder: '../x", "do not trust"),
    "absolute": (b'{"weight_map": {"a": "/etc/passwd"}}', "points outside the folder: '/etc/passwd'", "do not trust"),
    "backslash": (b'{"weight_map": {"a": "..\\\\x"}}', "points outside the folder", "do not trust"),
    "folder": (b'{"weight_map": {"a": ".."}}', "points outside the folder: '..'", "do not trust"),
    "no safetensors": (
        b'{"weight_map": {"a": "spikepatch.json"}}',
        "as pickles: 'spikepatch.json'",
        "end in .safetensors",
    ),
    "missing": (b'{"weight_map": {"a": "x.safetensors"}}', "x.safetensors: is missing", "download"),
}


@pytest.mark.parametrize(("content", "why", "remedy"), BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_a_bad_index_is_refused(tmp_path: Path, content: bytes, why: str, remedy: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)

    error = refusal(tmp_path)

    assert why in error.why
    assert remedy in error.remedy


def test_an_index_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, {"one.safetensors": ["a"]}, {"a": "one.safetensors"})

    def denied(*args: object, **options: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    error = refusal(tmp_path)

    assert error.why == "model.safetensors.index.json: cannot be read: Permission denied"
    assert "permissions" in error.remedy


def test_all_findings_of_a_folder_come_at_once(tmp_path: Path) -> None:
    write_shards(
        tmp_path,
        {"one.safetensors": ["a", "b"], "two.safetensors": ["b", "c"], "cut.safetensors": ["z"]},
        {"a": "one.safetensors", "b": "one.safetensors", "gone": "two.safetensors", "c": "two.safetensors"}
        | {"z": "cut.safetensors", "y": "missing.safetensors", "x": "../out.safetensors"},
    )
    with open(tmp_path / "cut.safetensors", "r+b") as file:
        file.truncate((tmp_path / "cut.safetensors").stat().st_size - 1)

    error = refusal(tmp_path)

    assert error.what == "6 things are wrong with it"
    for finding in (
        "model.safetensors.index.json: points outside the folder: '../out.safetensors'",
        "two.safetensors: lacks tensors that the index places in it: 'gone'",
        "two.safetensors: holds tensors that the index does not place in it: 'b'",
        "two.safetensors: holds tensors of another shard: 'b' (in one.safetensors too)",
        "cut.safetensors: is truncated",
        "missing.safetensors: is missing",
    ):
        assert finding in error.why


def test_an_index_without_metadata_is_fine(tmp_path: Path) -> None:
    write_shards(tmp_path, {"one.safetensors": ["a"]}, {"a": "one.safetensors"})

    assert_reads_like_safetensors(read_checkpoint(tmp_path))


def test_single_file_and_index_together_are_ambiguous(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model.safetensors": ["a"]}, {"a": "model.safetensors"})

    error = refusal(tmp_path)

    assert error.what == "both model.safetensors and model.safetensors.index.json are present"
    assert "delete" in error.remedy


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "elsewhere")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("../elsewhere")

    error = refusal(folder)

    assert "model.safetensors: is a link that leads out of the folder" in error.why
    assert "replace the link" in error.remedy


def test_links_into_the_blobs_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blobs" / "0123")
    folder = tmp_path / "snapshots" / "abcdef"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to("../../blobs/0123")

    assert_reads_like_safetensors(read_checkpoint(folder))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "fifo"])
def test_something_else_in_place_of_a_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "model.safetensors")

    assert "model.safetensors: is not a file" in refusal(tmp_path).why


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pytorch_model.bin", "PyTorch pickles"),
        ("pytorch_model-00001-of-00002.bin", "PyTorch pickles"),
        ("model.Q4_1.gguf", "GGUF"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"),
        ("__0_0.distcp", "DCP"),
        ("adapter_model.safetensors", "an adapter without its base model"),
        ("consolidated.safetensors", "a name that transformers does not load"),
    ],
)
def test_other_formats_are_named_and_not_opened(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).mkdir()  # opening it would raise

    error = refusal(tmp_path)

    assert error.what.startswith("no weights in model.safetensors")
    assert f"found {name}" in error.why
    assert kind in error.why
    assert "save_pretrained" in error.remedy


def test_a_file_that_shrinks_after_the_check(tmp_path: Path) -> None:
    save_file({"a": torch.ones(64)}, tmp_path / "model.safetensors")
    found = read_checkpoint(tmp_path).tensors["a"]
    os.truncate(found.file, found.end - 4)

    with pytest.raises(BadSource, match="has changed while it was read") as caught:
        read_tensor(found)

    assert "it ends at byte" in caught.value.why


def test_a_checkpoint_that_changes_after_the_check(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(64)}, path)
    checkpoint = read_checkpoint(tmp_path)
    check_unchanged(checkpoint)

    os.utime(path, (1, 1))
    with pytest.raises(BadSource, match="has changed while it was read") as caught:
        check_unchanged(checkpoint)
    assert caught.value.where == str(path)
    checkpoint = read_checkpoint(tmp_path)
    (tmp_path / "other").write_bytes(path.read_bytes())
    os.utime(tmp_path / "other", (1, 1))
    os.replace(tmp_path / "other", path)  # same size and time
    with pytest.raises(BadSource, match="has changed while it was read"):
        check_unchanged(checkpoint)
    path.unlink()
    with pytest.raises(BadSource, match="has changed while it was read"):
        check_unchanged(checkpoint)
    with pytest.raises(BadSource, match="cannot be read"):
        read_tensor(checkpoint.tensors["a"])


def test_more_tensors_than_any_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one file, and in all."""
    monkeypatch.setattr("spikepatch.source.header.MAX_TENSORS", 3)
    monkeypatch.setattr("spikepatch.source.checkpoint.MAX_TENSORS", 3)
    (tmp_path / "one").mkdir()
    write_shards(tmp_path / "one", {"one.safetensors": list("abcd")}, dict.fromkeys("abcd", "one.safetensors"))
    assert "has 4 tensors, and no model has over 3" in refusal(tmp_path / "one").why
    (tmp_path / "two").mkdir()
    shards = {"one.safetensors": ["a", "b"], "two.safetensors": ["c", "d"]}
    write_shards(tmp_path / "two", shards, {name: file for file, names in shards.items() for name in names})
    assert "two.safetensors: is one of shards with over 3 tensors" in refusal(tmp_path / "two").why
