"""Figures of README and docs beside what they are here: ``python -m tests.claims``, in less than ten minutes.

Seconds, and ratios of them, are another machine's here; counts, losses and p are to be the same. What takes longer is
named at the end, with its command. A figure that a page does not say any more is an error of this file: `test_pages.py`
looks for each.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import starmap
from math import comb

import click

from tests import ROOT


@dataclass(frozen=True)
class Claim:
    """``said``: a pattern of the page, white space squeezed, a group for each figure. ``measure``: these figures."""

    page: str
    what: str
    said: str
    measure: Callable[[], Sequence[float]]

    def figures(self) -> list[str]:
        text = " ".join((ROOT / self.page).read_text(encoding="utf-8").split())
        found = re.search(self.said, text)
        if found is None:
            raise LookupError(f"{self.page} does not say {self.said}")
        return list(found.groups())


def fisher(a: int, n: int, b: int, m: int) -> float:
    """Two-sided: all tables that are no more likely than this one."""
    total = a + b

    def weight(k: int) -> int:
        return comb(n, k) * comb(m, total - k)

    return sum(weight(k) for k in range(total + 1) if weight(k) <= weight(a)) / comb(n + m, total)


@cache
def commands() -> dict[str, float]:
    from tests.benchmarks.bench_commands import measured

    times = measured(rounds=2)
    return {name: seconds / times["imports"] for name, seconds in times.items()}


def whole(*names: str) -> Callable[[], Sequence[float]]:
    return lambda: [commands()[name] for name in names]


def proven() -> Sequence[float]:
    from tests.residual.test_golden import golden

    verdicts = [(key.partition("/")[0], bool(value.get("proven"))) for key, value in golden().items()]
    return [
        count
        for task in ("causal", "seq2seq", "masked")
        for count in (verdicts.count((task, True)), sum(name == task for name, _ in verdicts))
    ]


def written() -> Sequence[float]:
    rows = [line.split("|") for line in (ROOT / "docs/loads.md").read_text().splitlines() if line.startswith("| ")]
    return [sum(row[5].strip() == "yes" for row in rows)]


def deep_map() -> Sequence[float]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_map", "deep"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return [float(x) for x in re.findall(r": ([\d.]+) s .* peak (\d+) MiB", printed)[0]]


def check_gpt2() -> Sequence[float]:
    import spikepatch

    spikepatch.check("arch:gpt2", tokens=2)  # imports
    start = time.process_time()
    spikepatch.check("arch:gpt2")
    return [time.process_time() - start]


def stream() -> Sequence[float]:
    """std of the stream at the first and at the last block of GPT-2, patched and as it is."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import spikepatch

    found = []
    for recipe in ("scaled-embed", None):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2")).eval()
        if recipe:
            spikepatch.patch(model, recipe, reinit="all", seed=0)
        with torch.no_grad():
            states = model(torch.arange(64)[None], output_hidden_states=True).hidden_states
        found += [float(states[i].std(-1).mean()) for i in (0, 11)]
    return found


def spiking() -> Sequence[float]:
    """GPT-2 on the plateau, in the study and in the demonstration: small embeddings, a large shortcut."""
    from examples.study.study import RESULTS, read

    found: list[float] = []
    for recipes, hit, all_of_them in ((("vanilla-2304",), 4, 5), (("scaled-embed", "embed-ln"), 0, 10)):
        rows = [
            row
            for row in read(RESULTS)
            if (row["regime"], row["architecture"]) == ("plateau", "gpt2") and row["recipe"] in recipes
        ]
        found += [hit + sum(int(row["loss_events"]) > 0 for row in rows), all_of_them + len(rows)]
    return found


CLAIMS = (
    Claim("README.md", "p of 4 of 5 and 0 of 5", r"0 of 5 \(p = ([\d.]+) each\)", lambda: [fisher(4, 5, 0, 5)]),
    Claim("docs/results.md", "p of 4 of 5 and 0 of 10", r"vanilla-2304: p = ([\d.]+)\.", lambda: [fisher(4, 5, 0, 10)]),
    Claim(
        "README.md",
        "trainings that spike",
        r"(\d+) of (\d+) trainings spike with embeddings as small as at width 2304, (\d+) of (\d+) with a large",
        spiking,
    ),
    Claim(
        "README.md",
        "proven maps of types",
        r"(\d+) of (\d+) causal types are proven, (\d+) of (\d+) sequence-to-sequence and (\d+) of (\d+) masked",
        proven,
    ),
    Claim("README.md", "classes that load", r"loads\*\*: (\d+) classes", written),
    Claim(
        "docs/check.md",
        "std of the stream",
        r"GPT-2's stream enters its blocks with a std of ([\d.]+) and the last of them with ([\d.]+), patched with"
        r" `scaled-embed`; by its own initialisation with ([\d.]+) and ([\d.]+)\.",
        stream,
    ),
    Claim(
        "docs/benchmarks.md",
        "whole commands over imports",
        r"`inspect arch:gpt2`, `convert arch:gpt2`, `check arch:gpt2` \| ([\d.]+), ([\d.]+), ([\d.]+) times",
        whole("inspect arch:gpt2", "convert arch:gpt2", "check arch:gpt2"),
    ),
    Claim("docs/benchmarks.md", "seconds of processor", r"`check arch:gpt2`, after imports \| ([\d.]+) s", check_gpt2),
    Claim(
        "docs/benchmarks.md",
        "seconds and MB of a map",
        r"80-layer Llama of width 8192 \| ([\d.]+) s, (\d+) MB",
        deep_map,
    ),
)

#: Figures that take longer, or another machine.
LONGER = {
    "spikes of the demonstration (README, docs/results.md)": "python examples/spikes_on_a_cpu.py",
    "the study (docs/study.md)": "python examples/study/study.py, then python examples/study/tables.py",
    "what loads (docs/loads.md)": "python -m tests.sweep",
    "drawn architectures (docs/architectures.md)": "python -m tests.residual.test_generated 2000 1000",
    "training against a bare loop (docs/benchmarks.md)": "python -m tests.benchmarks.bench_train small large bf16",
    "convert against cp (docs/benchmarks.md)": "python -m tests.benchmarks.bench_convert",
    "check of 5.9 and 71.9 billion parameters (docs/benchmarks.md)": "python -m tests.benchmarks.bench_check 7b 70b",
    "the audit's rates (docs/audit-measured.md)": "python -m tests.auditing.mutations;"
    " python -m tests.preflight.verdicts FILE; python -m tests.benchmarks.bench_audit",
    "every type (docs/architectures.md)": "python -m tests.architectures_page FILE",
    "models from PyPI (docs/foreign.md)": "python -m tests.packages",
}


def main() -> None:
    for claim in CLAIMS:
        said = claim.figures()
        pairs = starmap("{} ({:.3g} here)".format, zip(said, claim.measure(), strict=True))
        click.echo(f"{claim.page}, {claim.what}: {', '.join(pairs)}")
    click.echo("What takes longer:")
    for what, command in LONGER.items():
        click.echo(f"  {what}: {command}")


if __name__ == "__main__":
    main()
