"""Time and memory of ``convert``: ``python -m tests.benchmarks.bench_convert [speed[=LAYERS]] [memory] [linear]
[load]``.

speed: a 1.1 B-parameter bfloat16 Llama in 5 shards (2.2 GB); in-process, after imports. Everything in one round after
the other, 7 rounds; ratios are of medians. Targets: ``--reinit none`` at most 2.0 times (cp + sync), ``--reinit all``
at most 1.3 times (values / rate of one generator + cp + sync), both at most 0.5 times transformers' load and save. The
generator is torch's, whose bits differ between kinds of processors; beside it numpy's, which fills are drawn by. With
``MERGEKIT=/path/to/mergekit-yaml`` (in an environment of its own) the whole command at most 0.5 times its passthrough.
"Less planning": without what comes before the first byte (finding and proving the stream, 0.6 s), which depends on
the number of layers, and not on their size.
memory: 20 GB of weights, and one tensor of 4 GB; the target is 256 MB and a piece above ``import torch``. It takes
20 GB of disk. linear: 0.1, 1 and 10 GB, beside cp + sync of the same. All of these without the load test, whose cost is
measured apart: load: the whole command on GPT-2 small and on the 1.1 B model, with it and without.

``TMPDIR`` says on which disk. On a machine that others use too, the seconds of the processors tell more than the clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

ROUNDS = 7

#: Of the 1.1 B-parameter model with 22 layers; 2.2 GB.
TINY_LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


def sparse_source(folder: Path, shards: int, **config: Any) -> int:
    """A Llama whose weights are zeros that take no disk, and its size in bytes; the index is as transformers has it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from spikepatch.apply.disk.write import Planned, _header
    from spikepatch.source.layout import layout
    from spikepatch.source.meta import build_meta, skeleton

    settings = LlamaConfig(**config, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    settings.save_pretrained(folder)
    targets = layout(skeleton(build_meta(LlamaForCausalLM, settings, where="llama")))
    tensors = [Planned(target.name, torch.bfloat16, target.shape) for target in targets]
    share = sum(tensor.bytes for tensor in tensors) / shards
    weight_map, done = {}, 0
    for tensor in tensors:
        weight_map[tensor.name] = f"model-{min(int(done / share), shards - 1) + 1:05}-of-{shards:05}.safetensors"
        done += tensor.bytes
    for file in set(weight_map.values()):
        head, places = _header([tensor for tensor in tensors if weight_map[tensor.name] == file])
        (folder / file).write_bytes(head)
        os.truncate(folder / file, max(begin + tensor.bytes for tensor, begin in places.items()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return done


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench-convert.") as folder:
        yield Path(folder)


def timed(work: Callable[[Path], object], out: Path) -> tuple[float, float]:
    """Seconds of the clock and of the processors; earlier writes are on the disk before, its own are deleted after."""
    os.sync()
    start, busy = time.perf_counter(), _busy()
    work(out)
    seconds = time.perf_counter() - start, _busy() - busy
    shutil.rmtree(out, ignore_errors=True)
    return seconds


def copy(source: Path, out: Path) -> None:
    """Of every byte, zeros too, until it is on the disk."""
    subprocess.run(["cp", "-r", "--reflink=never", "--sparse=never", str(source), str(out)], check=True)
    os.sync()


def _busy() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def speed(layers: int = 22) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    import spikepatch

    def generator(out: Path) -> None:
        values.normal_()

    def own_generator(out: Path) -> None:
        drawn.standard_normal(dtype=np.float32, out=values.numpy())

    def load_and_save(out: Path) -> None:
        AutoModelForCausalLM.from_pretrained(source).save_pretrained(out)
        os.sync()

    def mapping(out: Path) -> None:
        spikepatch.convert(str(source), out, reinit="all", dry_run=True)

    def command(reinit: str, out: Path) -> None:
        words = ("-W", "ignore", "-m", "spikepatch", "convert", str(source), str(out), "--reinit", reinit, "-q")
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)

    def passthrough(out: Path) -> None:
        merge = {"models": [{"model": str(source)}], "merge_method": "passthrough", "dtype": "bfloat16"}
        (folder / "merge.yml").write_text(json.dumps(merge))  # JSON is YAML
        words = (str(folder / "merge.yml"), str(out), "--lazy-unpickle", "--no-copy-tokenizer")
        subprocess.run([os.environ["MERGEKIT"], *words], check=True, stderr=subprocess.DEVNULL)
        os.sync()

    with scratch() as folder:
        source = folder / "source"
        whole = sparse_source(folder / "config", 1, num_hidden_layers=layers, **TINY_LLAMA)
        spikepatch.convert(
            str(folder / "config"), source, recipe="vanilla", dtype="bfloat16", max_shard_size=whole // 5 + (40 << 20)
        )
        (source / "spikepatch.json").unlink()
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        count = size // 2
        values = torch.empty(1 << 26)
        values.normal_()
        drawn = np.random.Generator(np.random.SFC64(0))
        jobs: dict[str, Callable[[Path], object]] = {
            "cp + sync": partial(copy, source),
            "--reinit none": lambda out: spikepatch.convert(str(source), out, reinit="none"),
            "--reinit all": lambda out: spikepatch.convert(str(source), out, reinit="all"),
            "one generator": generator,
            "one generator of numpy's": own_generator,
            "transformers load + save": load_and_save,
            "planning alone": mapping,
        }
        if "MERGEKIT" in os.environ:
            jobs |= {
                "command, --reinit none": partial(command, "none"),
                "command, --reinit all": partial(command, "all"),
                "mergekit passthrough": passthrough,
            }
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
        for done in range(ROUNDS):
            for name, work in jobs.items():
                measured[name].append(timed(work, folder / "out"))
            click.echo(f"round {done + 1}: " + ", ".join(f"{n} {s[-1][0]:.2f}" for n, s in measured.items()), err=True)
    click.echo(f"{size / 1e9:.2f} GB, {count / 1e9:.2f} B values, {ROUNDS} rounds, {os.cpu_count()} cores")
    click.echo("medians in seconds of the clock (from ... to), and of the processors")
    middle = {}
    for name, pairs in measured.items():
        walls = [wall for wall, _ in pairs]
        middle[name] = statistics.median(walls), statistics.median(busy for _, busy in pairs)
        spread = f"({min(walls):.2f} to {max(walls):.2f})"
        click.echo(f"  {name:26}{middle[name][0]:7.2f} {spread:18}{middle[name][1]:7.2f}")
    copied, scale = middle["cp + sync"], count / values.numel()
    theirs, ours = (
        tuple(copied[i] + scale * middle[name][i] for i in (0, 1))
        for name in ("one generator", "one generator of numpy's")
    )
    tools = middle["transformers load + save"]
    plan = middle["planning alone"]
    for name, base, of, target in (
        ("--reinit none", copied, "cp + sync", "2.0"),
        ("--reinit all", theirs, "one generator + cp + sync", "1.3"),
        ("--reinit all", ours, "one generator of numpy's + cp + sync", "1.3"),
        ("--reinit none", tools, "transformers load + save", "0.5"),
        ("--reinit all", tools, "transformers load + save", "0.5"),
    ):
        clock, busy = (middle[name][i] / base[i] for i in (0, 1))
        less = [(middle[name][i] - plan[i]) / base[i] for i in (0, 1)]
        click.echo(
            f"  {name} / ({of}): {clock:.2f} by the clock (target {target}), {busy:.2f} by work;"
            f" less planning {less[0]:.2f} and {less[1]:.2f}"
        )
    for reinit in ("none", "all") if "MERGEKIT" in os.environ else ():
        clock, busy = (middle[f"command, --reinit {reinit}"][i] / middle["mergekit passthrough"][i] for i in (0, 1))
        click.echo(
            f"  command, --reinit {reinit} / mergekit: {clock:.2f} by the clock (target 0.5), {busy:.2f} by work"
        )


def memory(name: str) -> None:
    """For a process of its own."""
    import torch

    del torch
    base = _peak()
    from transformers import LlamaForCausalLM

    import spikepatch.apply.folder.convert

    del LlamaForCausalLM
    imported = _peak()

    large = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
    with scratch() as folder:
        if name == "20 GB":
            size = sparse_source(folder / "source", 10, num_hidden_layers=45, vocab_size=32000, **large)
            options: dict[str, Any] = {"reinit": "none", "factor": 2.0}
        else:
            size = sparse_source(
                folder / "source", 1, num_hidden_layers=1, vocab_size=1 << 19, tie_word_embeddings=True, **large
            )
            options = {"reinit": "all", "dtype": "bfloat16"}
        planned: list[float] = []

        def progress(step: str, done: int = 0, total: int = 0) -> None:
            if step == "writing weights" and not planned:
                planned.append(_peak())
                Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here

        start = time.perf_counter()
        spikepatch.convert(str(folder / "source"), folder / "out", progress=progress, **options)
        seconds = time.perf_counter() - start
    click.echo(
        f"{name} ({size / 1e9:.1f} GB, --reinit {options['reinit']}): {seconds:.0f} s; above import torch"
        f" {imported - base:.0f} MB with all imports, {planned[0] - base:.0f} MB at the peak of planning,"
        f" {_peak() - base:.0f} MB at the peak of writing"
    )


def linear() -> None:
    import spikepatch

    wide = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 2048}
    for layers, intermediate in ((1, 1024), (5, 5000), (24, 14336)):
        with scratch() as folder:
            source = folder / "source"
            size = sparse_source(source, 2, num_hidden_layers=layers, intermediate_size=intermediate, **wide)
            rounds = 3 if size < 5e9 else 1
            copied = statistics.median(timed(partial(copy, source), folder / "out")[0] for _ in range(rounds))
            click.echo(f"{size / 1e9:.2f} GB, cp + sync: {copied:.2f} s; for each GB {copied / size * 1e9:.2f} s")
            for reinit in ("none", "all"):
                took = []
                for dry in (True, False):
                    convert = partial(spikepatch.convert, str(source), reinit=reinit, factor=2.0, dry_run=dry)
                    runs = [timed(convert, folder / "out") for _ in range(rounds)]
                    took.append([statistics.median(run[i] for run in runs) for i in (0, 1)])
                (plan, busy_plan), (whole, busy) = took
                clock, work = (whole - plan) / size * 1e9, (busy - busy_plan) / size * 1e9
                click.echo(
                    f"{size / 1e9:.2f} GB, --reinit {reinit}: {whole:.2f} s, of these planning {plan:.2f} s;"
                    f" for each GB {clock:.2f} s of the clock, {work:.2f} s of work"
                )


def load() -> None:
    for name in ("arch:gpt2", "1.1 B"):
        with scratch() as folder:
            source = name
            if name == "1.1 B":
                source = str(folder / "source")
                sparse_source(Path(source), 2, **TINY_LLAMA)
            words = [sys.executable, "-W", "ignore", "-m", "spikepatch", "convert", source, str(folder / "out"), "-q"]
            took: dict[str, list[tuple[float, float]]] = {"--load-test": [], "--no-load-test": []}
            for _ in range(3):
                for option, runs in took.items():
                    runs.append(_timed_command([*words, "--overwrite", option]))
            (clock, work), (clock_0, work_0) = (
                tuple(statistics.median(run[i] for run in runs) for i in (0, 1)) for runs in took.values()
            )
            click.echo(
                f"{name}: with the load test {clock:.1f} s of the clock and {work:.1f} s of work, without {clock_0:.1f}"
                f" and {work_0:.1f}; ratios {clock / clock_0:.2f} and {work / work_0:.2f}"
            )


def _timed_command(words: list[str]) -> tuple[float, float]:
    """Seconds of the clock, and of all processors."""
    environment = {name: value for name, value in os.environ.items() if name != "SPIKEPATCH_LOAD_TEST"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
    clock, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _peak() -> float:
    """Peak resident memory of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def main(wanted: list[str]) -> None:
    os.environ["SPIKEPATCH_LOAD_TEST"] = "0"
    for word in wanted or ["speed", "memory", "linear", "load"]:
        name, _, layers = word.partition("=")
        if name == "memory":
            for case in ("20 GB", "4 GB in one tensor"):
                code = f"from tests.benchmarks.bench_convert import memory; memory({case!r})"
                subprocess.run([sys.executable, "-c", code], check=True)
        elif name == "linear":
            linear()
        elif name == "load":
            load()
        else:
            speed(int(layers or 22))


if __name__ == "__main__":
    main(sys.argv[1:])
