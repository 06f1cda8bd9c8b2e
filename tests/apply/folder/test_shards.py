"""What is written is compared with the plan: a difference is found, and is our own bug."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import spikepatch
from spikepatch.apply.disk.manifest import file_hash
from spikepatch.apply.disk.write import Planned
from spikepatch.apply.folder.shards import Shards, plan_shards, write_folder
from spikepatch.errors import BadSource
from spikepatch.source.header import TensorEntry
from spikepatch.source.open import Source, build_meta, open_source
from tests.architectures import tiny_config, tiny_model

DRAWN = "transformer.wte.weight"


@pytest.fixture
def fresh(tmp_path: Path) -> tuple[Source, Shards]:
    tiny_config("gpt2").save_pretrained(tmp_path / "source")
    (tmp_path / "source/LICENSE").write_text("free")
    source = open_source(str(tmp_path / "source"), weights=False)
    model = build_meta(source)
    shards = plan_shards(spikepatch.plan(str(tmp_path / "source"), "vanilla", reinit="all"), model)
    assert DRAWN in shards.fills
    assert shards.fresh
    return source, shards


def write(source: Source, shards: Shards, out: Path) -> tuple[Any, dict[str, Any]]:
    out.mkdir()
    return write_folder(out, shards, {"text": "é"}, source, lambda *_: None, allow_nonfinite=False)


def drawing(shards: Shards, change: Any) -> Shards:
    """``shards`` with other values in the token embedding."""

    def produce(name: str) -> Any:
        found = shards.produce(name)
        assert not isinstance(found, (torch.Tensor, TensorEntry)) or name != DRAWN
        return (lambda start, stop: change(found(start, stop))) if name == DRAWN else found  # type: ignore[operator]

    return dataclasses.replace(shards, produce=produce)


def test_what_is_planned_is_what_is_written(fresh: tuple[Source, Shards], tmp_path: Path) -> None:
    source, shards = fresh
    written, origin = write(source, shards, tmp_path / "out")

    assert written.hashes == {path.name: file_hash(path) for path in (tmp_path / "out").iterdir()}
    assert written.hashes.keys() == {"model.safetensors", "text", "LICENSE"}
    assert written.tallies.keys() == {tensor.name for tensor in shards.tensors}
    assert (origin["kind"], "weights" in origin) == ("folder", False)


@pytest.mark.parametrize("change", [lambda x: 1.1 * x, lambda x: x + 0.1 * x.std()], ids=["std", "mean"])
def test_a_draw_unlike_its_plan(fresh: tuple[Source, Shards], change: Any, tmp_path: Path) -> None:
    """Of 32,000 elements: the std by 0.1 of itself, where 0.04 is allowed; the mean by 0.1 of the std."""
    source, shards = fresh
    with pytest.raises(RuntimeError, match=rf"{DRAWN} was drawn with std .* planned were"):
        write(source, drawing(shards, change), tmp_path / "out")


def test_a_tensor_that_is_not_there(fresh: tuple[Source, Shards], tmp_path: Path) -> None:
    source, shards = fresh
    more = dataclasses.replace(shards, tensors=(*shards.tensors, Planned("forgotten", torch.float32, (2,))))
    with pytest.raises(RuntimeError, match="not written as planned: forgotten"):
        write(source, more, tmp_path / "out")


def test_a_draw_that_the_dtype_cannot_hold(fresh: tuple[Source, Shards], tmp_path: Path) -> None:
    source, shards = fresh
    with pytest.raises(BadSource, match=f"{DRAWN} holds NaN or infinite values") as caught:
        write(source, drawing(shards, lambda x: x * 1e39), tmp_path / "out")
    assert "32000 of 32000 in float32" in caught.value.why


def test_a_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """Found once all of it has been written."""
    tiny_model("gpt2").save_pretrained(tmp_path / "source")
    source = open_source(str(tmp_path / "source"), weights=True)
    assert source.checkpoint is not None
    entries = source.checkpoint.tensors
    planned = tuple(Planned(name, torch.float32, entry.shape) for name, entry in entries.items())
    shards = Shards(planned, {"model.safetensors": list(entries)}, {}, entries, entries.__getitem__)
    written, origin = write(source, shards, tmp_path / "out")
    assert origin["weights"] == {"model.safetensors": written.hashes["model.safetensors"]}
    assert list(written.copies) == [tmp_path / "source/model.safetensors"]

    os.utime(tmp_path / "source/model.safetensors", (1, 1))
    with pytest.raises(BadSource, match="has changed while it was read"):
        write(source, shards, tmp_path / "again")
