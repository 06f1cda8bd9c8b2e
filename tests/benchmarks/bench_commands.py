"""Whole commands against their imports, printed: ``python -m tests.benchmarks.bench_commands``.

Processor time of fresh processes, medians of three rounds in which each is run once. They are compared with a process
that imports torch, transformers and GPT-2's classes, and does nothing. Targets: ``convert`` within 1.3 times the
imports (its load test, a process of its own, is left out), ``check`` within 1.7.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

import click

ROUNDS = 3
_IMPORTS = "import torch, transformers; transformers.AutoTokenizer, transformers.GPT2LMHeadModel"
_PROGRAM = (sys.executable, "-m", "spikepatch")
COMMANDS = {
    "imports": (sys.executable, "-c", _IMPORTS),
    "inspect arch:gpt2": (*_PROGRAM, "inspect", "arch:gpt2"),
    "convert arch:gpt2": (*_PROGRAM, "convert", "arch:gpt2", "out", "--overwrite"),
    "check arch:gpt2": (*_PROGRAM, "check", "arch:gpt2"),
    "check arch:gpt2 --recipe scaled-embed": (*_PROGRAM, "check", "arch:gpt2", "--recipe", "scaled-embed"),
    "audit out": (*_PROGRAM, "audit", "out", "--expect", "scaled-embed"),
    "fold out": (*_PROGRAM, "fold", "out", "plain", "--overwrite"),
}


def processor_time(words: tuple[str, ...], folder: str) -> float:
    """Seconds of processor of one process and those that it waited for."""
    before = os.times()
    environment = {**os.environ, "SPIKEPATCH_LOAD_TEST": "0"}
    subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def measured(rounds: int = ROUNDS) -> dict[str, float]:
    """Command -> median of its processor time."""
    with tempfile.TemporaryDirectory() as folder:
        times = [{name: processor_time(words, folder) for name, words in COMMANDS.items()} for _ in range(rounds)]
    return {name: statistics.median(each[name] for each in times) for name in COMMANDS}


def main() -> None:
    times = measured()
    for name, seconds in times.items():
        click.echo(f"{name:40s} {seconds:6.2f} s of processor, {seconds / times['imports']:.2f} times the imports")


if __name__ == "__main__":
    main()
