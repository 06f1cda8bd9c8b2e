"""``audit`` of a checkpoint against reading its bytes once, warm and cold, the best of several turns in one run.

python -m tests.benchmarks.bench_audit                      0.7 billion parameters in bfloat16
python -m tests.benchmarks.bench_audit 4096 2 bfloat16      width, layers, dtype
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from spikepatch.auditing.contents import of_entry
from spikepatch.preflight.audit import audit
from spikepatch.source.checkpoint import read_checkpoint
from spikepatch.source.layout import layout
from spikepatch.source.meta import build_meta

#: Of a buffer that begins with a page and is used again: the fastest way to read that was found.
_BLOCK, _PAGE = 1 << 22, 1 << 12
_TURNS = 5


def write(folder: Path, width: int, layers: int, dtype: str) -> int:
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, vocab_size=32_000, dtype=dtype,
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        target.name: torch.ones(target.shape)
        if len(target.shape) == 1
        else torch.randn(target.shape, generator=generator).mul_(0.02)
        for target in layout(build_meta(LlamaForCausalLM, config, where="bench"))
    }
    tensors = {name: t.to(getattr(torch, dtype)) for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(t.numel() * t.element_size() for t in tensors.values())


def read(file: Path, look: Callable[[NDArray[Any]], object] = lambda block: None) -> None:
    memory = np.empty(_BLOCK + _PAGE, np.uint8)
    block = memory[-memory.ctypes.data % _PAGE :][:_BLOCK]
    with open(file, "rb", buffering=0) as handle:
        while handle.readinto(block.data) == _BLOCK:
            look(block.view(np.int16))


def seconds(what: Callable[[], object]) -> tuple[float, float]:
    """Of the processor, all threads together, and by the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    what()
    return time.process_time() - cpu, time.perf_counter() - clock


def forgotten(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def main(width: int, layers: int, dtype: str = "bfloat16") -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "model.safetensors"
        size = write(folder, width, layers, dtype)
        entries = list(read_checkpoint(folder).tensors.values())
        ways: dict[str, Callable[[], object]] = {
            "read": lambda: read(file),
            "read, one pass over the bits": lambda: read(file, np.maximum.reduce),
            "contents of every tensor": lambda: [of_entry(entry) for entry in entries],
            "audit, with map and rules": lambda: audit(str(folder)),
        }
        assert not audit(str(folder)).at_least("at-risk")
        best = dict.fromkeys(ways, (np.inf, np.inf))
        for _ in range(_TURNS):
            for way, run in ways.items():
                cpu, clock = seconds(run)
                best[way] = min(best[way][0], cpu), min(best[way][1], clock)
        cold = {}
        for way in ("read", "audit, with map and rules"):
            forgotten(file)
            cold[way] = seconds(ways[way])[1]
    click.echo(f"{size / 1e9:.2f} GB of {dtype}, width {width}, {layers} layers; load {os.getloadavg()[0]:.1f}")
    cpu, clock = best["read"]
    for way, (a, b) in best.items():
        line = (
            f"{way:28} {a:6.3f} s of processor, {a / cpu:5.2f} times; {b:6.3f} s by the clock, {b / clock:5.2f} times"
        )
        click.echo(line + (f"; cold {cold[way]:.2f} s, {cold[way] / cold['read']:.2f} times" if way in cold else ""))


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["1536", "16"]
    main(int(wanted[0]), int(wanted[1]), *wanted[2:])
