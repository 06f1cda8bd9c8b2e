"""Time and memory of the residual map, printed: ``python -m tests.benchmarks.bench_map [deep] [linear] [all]``.

Targets, on one core: 80 layers of width 8192 in at most 15 s and 1.5 GB above ``import torch``; the analysis after
tracing under 2 s for 126 layers; every causal type in at most 8 minutes.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from unittest import mock

import click


def deep(layers: int = 80) -> None:
    """A Llama of the given depth, width 8192, from its config to its map. For a process of its own: peak memory."""
    import torch

    torch.set_num_threads(1)
    before = _peak_mib()
    start = time.perf_counter()
    from transformers import LlamaConfig, LlamaForCausalLM

    imported = time.perf_counter()
    from spikepatch.residual.inspect import inspect
    from spikepatch.source.meta import build_meta

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    residual = inspect(build_meta(LlamaForCausalLM, config, where="llama"))
    assert residual.proven
    assert residual.sublayers == 2 * layers
    now = time.perf_counter()
    click.echo(
        f"{layers} layers, width 8192: {now - imported:.1f} s (import of transformers {imported - start:.1f} s more),"
        f" peak {_peak_mib() - before:.0f} MiB above import torch"
    )


def linear() -> None:
    """The analysis alone, without tracing, at 21 to 126 layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import spikepatch.residual.inspect as module
    from spikepatch.residual.trace import trace
    from spikepatch.source.meta import build_meta

    torch.set_num_threads(1)
    for layers in (21, 42, 84, 126):
        model = build_meta(LlamaForCausalLM, LlamaConfig(num_hidden_layers=layers), where="llama")
        start = time.perf_counter()
        graph = trace(model)
        traced = time.perf_counter() - start
        start = time.perf_counter()
        with mock.patch.object(module, "trace", return_value=graph):
            module.inspect(model)
        click.echo(f"{layers} layers: tracing {traced:.2f} s, analysis {time.perf_counter() - start:.2f} s")


def all_types() -> None:
    """Every causal type's default config, with one layer of each kind, in one process."""
    import torch

    from spikepatch.residual.survey import survey

    torch.set_num_threads(1)
    start = time.perf_counter()
    rows = [row for row in survey() if row.task == "causal"]
    seconds = time.perf_counter() - start
    click.echo(f"{len(rows)} causal types: {seconds:.0f} s, {sum(row.proven for row in rows)} proven")


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(wanted: list[str]) -> None:
    for name in wanted or ["deep", "linear", "all"]:
        if name == "in-this-process":
            continue
        if name == "deep" and "in-this-process" not in wanted:
            subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_map", "deep", "in-this-process"], check=True)
        else:
            {"deep": deep, "linear": linear, "all": all_types}[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
