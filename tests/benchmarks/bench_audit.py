"""``audit`` of a checkpoint against reading its bytes once, from the page cache, in seconds of processor.

python -m tests.benchmarks.bench_audit          0.7 billion parameters in bfloat16
python -m tests.benchmarks.bench_audit 3072 4   width and layers
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from spikepatch.preflight.audit import audit
from spikepatch.source.checkpoint import read_checkpoint
from spikepatch.source.layout import layout
from spikepatch.source.meta import build_meta
from spikepatch.source.pieces import raw_pieces


def main(width: int = 1536, layers: int = 16) -> None:
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, vocab_size=32_000, dtype="bfloat16",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        tensors = {
            target.name: torch.ones(target.shape, dtype=torch.bfloat16)
            if len(target.shape) == 1
            else torch.randn(target.shape, generator=generator).mul_(0.02).bfloat16()
            for target in layout(build_meta(LlamaForCausalLM, config, where="bench"))
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        del tensors
        audit(str(folder))  # imports, and the pages of the file
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        for entry in read_checkpoint(folder).tensors.values():
            for _ in raw_pieces(entry):
                pass
        read = time.process_time() - start
        steps: list[tuple[str, float]] = []
        found = audit(str(folder), progress=lambda step, *_: steps.append((step, time.process_time())))
        ends = [t for step, t in steps if step == "auditing the weights"]
        whole, rules = ends[-1] - ends[0], time.process_time() - ends[-1]
        assert not found.at_least("at-risk")
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    click.echo(
        f"{size / 1e9:.2f} GB: read {read:.2f} s, audited {whole:.2f} s, {whole / read:.2f} times; rules {rules:.2f} s"
    )
    click.echo(f"peak memory {before / 1024:.0f} MiB before the second audit, {after / 1024:.0f} MiB after it")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
