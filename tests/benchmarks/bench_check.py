"""Time and memory of ``check``, printed: ``python -m tests.benchmarks.bench_check [gpt2] [deep] [depth] [7b] [70b]``.

Targets, on two cores, after imports: ``arch:gpt2`` in at most 10 s, with ``--deep`` in at most 120 s; a model
of 7 billion parameters in under 4 GB of memory, one of 70 billion in under 12 GB, at float32 and 128 tokens; memory
that grows with the largest layer and not with depth. Each runs in a process of its own.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import click


def gpt2(**options: Any) -> None:
    import spikepatch

    spikepatch.check("arch:gpt2", tokens=2)  # imports, and nothing else worth the name
    start, cpu = time.perf_counter(), time.process_time()
    report = spikepatch.check("arch:gpt2", **options)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    click.echo(
        f"arch:gpt2 {options}: {seconds:.1f} s ({cpu:.1f} s of processor), peak {_peak():.2f} GB, {report.verdict},"
        f" gradient ratio {report.gradient_ratio:.3g}"
    )


def depth() -> None:
    """Width 1024, nothing kept: peak memory above the imports at 4, 8 and 16 layers."""
    for layers in (4, 8, 16):
        _alone("llama", "1024", "2816", str(layers), "8000")


def llama(width: int, hidden: int, layers: int, vocabulary: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import spikepatch.preflight.subject as subject
    from spikepatch.preflight.check import check
    from spikepatch.source.meta import build_meta

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=max(width // 512, 1),
        vocab_size=vocabulary,
    )
    model = build_meta(LlamaForCausalLM, config, where="llama")
    before, start = _peak(), time.perf_counter()
    with mock.patch.object(subject, "_KEPT", 0):
        report = check(model, tokens=128, batch=1)
    click.echo(
        f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters, width {width}, {layers} layers:"
        f" {time.perf_counter() - start:.0f} s, peak {_peak():.2f} GB ({_peak() - before:.2f} GB above the imports),"
        f" {report.verdict}, gradient ratio {report.gradient_ratio:.3g}"
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def _alone(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_check", "in-this-process", *words], check=True)


def main(words: list[str]) -> None:
    if words[:1] == ["in-this-process"]:
        name, *sizes = words[1:]
        if name == "llama":
            llama(*map(int, sizes))
        else:
            gpt2(**({"deep": True} if name == "deep" else {}))
        return
    click.echo(f"{os.cpu_count()} cores")
    for name in words or ["gpt2", "deep", "depth"]:
        match name:
            case "depth":
                depth()
            case "7b":
                _alone("llama", "4096", "11008", "32", "32000")
            case "70b":
                _alone("llama", "8192", "28672", "80", "128256")
            case _:
                _alone(name)


if __name__ == "__main__":
    main(sys.argv[1:])
