"""Which recipes spike where: 264 trainings of 32 layers of width 16, and what pre-flight had said of each.

    python examples/study/study.py            # goes on with what results.csv has; stop it at any time with Ctrl-C
    python examples/study/study.py --units 1  # the next five trainings only

GPT-2 and Llama x five recipes x three learning rates x four seeds, on digits (a plateau, clipped at 1) and on the
sources of Python's standard library (not clipped); then a parallel-block, a branch-norm and a Mamba type. A unit is the
arms of one seed and rate, which see the same batches. results.csv beside this file gets a row for each training as soon
as its unit is done, and is the only thing that it needs to go on; what a stopped unit has trained is in --work. All of
it takes 5 hours of one CPU core.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

import spikepatch

sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples.spikes_on_a_cpu import VANILLA_2304, digits

#: Declared before the first training.
SEEDS = (301, 302, 303, 304)
RECIPES = ("vanilla-2304", "vanilla", "xavier", "scaled-embed", "embed-ln")
RATES = (3e-3, 1e-2, 1e-3)
RESULTS, TURNS = Path(__file__).with_name("results.csv"), Path(__file__).with_name("turns.csv")

_IDS = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "tie_word_embeddings": False}
_SIZE = {"hidden_size": 16, "num_hidden_layers": 32}
_HEADS = {"num_attention_heads": 1, "max_position_embeddings": 32}
_GATED = {**_SIZE, **_HEADS, "num_key_value_heads": 1, "intermediate_size": 48}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 32, "n_head": 1, "n_positions": 32,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "architectures": ["GPT2LMHeadModel"]},
    "llama": {**_GATED, "architectures": ["LlamaForCausalLM"]},
    "gpt_neox": {**_SIZE, **_HEADS, "intermediate_size": 64, "hidden_dropout": 0.0, "attention_dropout": 0.0,
                 "architectures": ["GPTNeoXForCausalLM"]},
    "olmo2": {**_GATED, "pad_token_id": None, "architectures": ["Olmo2ForCausalLM"]},
    "mamba": {**_SIZE, "state_size": 8, "architectures": ["MambaForCausalLM"]},
}  # fmt: skip

#: What pre-flight says of a model.
PREFLIGHT = ("sigma_start", "eq15_excess_layer1", "gradient_ratio")
COLUMNS = (
    "regime", "architecture", "recipe", "lr", "seed", "verdict", "loss_events", "gradient_events", "largest_excess",
    "largest_gradient_ratio", "final_loss", "held_out_loss", *PREFLIGHT,
)  # fmt: skip

Row = dict[str, str]


@dataclass(frozen=True)
class Unit:
    """Trainings on the same batches."""

    regime: str
    architecture: str
    seed: int
    lr: float
    recipes: tuple[str, ...] = RECIPES

    @property
    def name(self) -> str:
        return f"{self.regime}-{self.architecture}-{self.seed}-{self.lr:g}"


def units() -> Iterator[Unit]:
    """In the order in which they are run: what is done at any time is balanced over recipes."""
    for regime in ("plateau", "text"):
        for architecture in ("gpt2", "llama"):
            for seed in SEEDS:
                yield from (Unit(regime, architecture, seed, lr) for lr in RATES)
    for seed in SEEDS:
        for architecture in ("gpt_neox", "olmo2", "mamba"):
            yield Unit("plateau", architecture, seed, 3e-3, ("vanilla-2304", "scaled-embed"))


def undone(rows: Sequence[Row], wanted: Sequence[Unit]) -> list[Unit]:
    """The units that have a training without a row."""
    done = {tuple(row[key] for key in COLUMNS[:5]) for row in rows}
    return [
        u for u in wanted if any((u.regime, u.architecture, r, f"{u.lr:g}", str(u.seed)) not in done for r in u.recipes)
    ]


def inputs(folder: Path) -> None:
    """Configs, the recipe and the texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, settings in ARCHITECTURES.items():
        AutoConfig.for_model(name, **_IDS, **settings).save_pretrained(folder / name)
    (folder / "vanilla-2304.toml").write_text(VANILLA_2304)
    library = Path(sysconfig.get_path("stdlib"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py")))
    for name, train, held_out in (
        ("plateau", digits(1_000_000, 0), digits(4_000, 1)),
        ("text", text[:2_000_000], text[2_000_000:2_004_000]),
    ):
        (folder / f"{name}.txt").write_text(train, encoding="utf-8")
        (folder / f"{name}-held-out.txt").write_text(held_out, encoding="utf-8")


def recipe(folder: Path, name: str) -> str:
    return str(folder / f"{name}.toml") if name == "vanilla-2304" else name


def trained(unit: Unit, folder: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Recipe -> its run, by ``spikepatch train``."""
    out = work / unit.name
    command = [
        sys.executable, "-m", "spikepatch", "train",
        *(f"{name}={folder / unit.architecture}@{recipe(folder, name)}" for name in unit.recipes),
        "--data", str(folder / f"{unit.regime}.txt"), "--eval-data", str(folder / f"{unit.regime}-held-out.txt"),
        "--out", str(out), "--seeds", str(unit.seed), "--lr", f"{unit.lr:g}", "--steps", "1500", "--warmup", "20",
        "--schedule", "constant", "--seq-len", "32", "--batch-tokens", "128", "--watch-every", "0",
        "--checkpoint-every", "0", "--grad-clip", "1" if unit.regime == "plateau" else "0", "--json",
        *(["--resume"] if (out / "run.json").exists() else []),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode not in (0, 1):  # 1: something spiked
        raise SystemExit(done.returncode)
    return {run["name"]: run for run in json.loads(done.stdout)["runs"]}


def preflight(unit: Unit, folder: Path) -> dict[str, spikepatch.StabilityReport]:
    """Recipe -> what ``check`` says of the weights that are trained."""
    recipes = [recipe(folder, name) for name in unit.recipes]
    report = spikepatch.check(str(folder / unit.architecture), recipes=recipes, tokens=32, batch=4, seed=unit.seed)
    return dict(zip(unit.recipes, report.models, strict=True))


def row(unit: Unit, name: str, run: dict[str, Any], before: spikepatch.StabilityReport) -> Row:
    loss = [event for event in run["events"] if event["kind"] != "gradient_norm" and event["origin"] != "data"]
    norms = [event for event in run["events"] if event["kind"] == "gradient_norm"]
    ratios = [event["value"] / event["baseline"] for event in norms if event["value"] and event["baseline"]]
    values = {
        "regime": unit.regime, "architecture": unit.architecture, "recipe": name, "lr": unit.lr, "seed": unit.seed,
        "verdict": run["verdict"], "loss_events": len(loss), "gradient_events": len(norms),
        "largest_excess": run["largest_excess"], "largest_gradient_ratio": max(ratios, default=None),
        "final_loss": run["final_loss"], "held_out_loss": run["eval_loss"],
        **{field: getattr(before, field) for field in PREFLIGHT},
    }  # fmt: skip
    return {key: "" if v is None else f"{v:.5g}" if isinstance(v, float) else str(v) for key, v in values.items()}


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(rows: Sequence[Row], path: Path) -> None:
    """The old file or the new one, whenever the process is killed."""
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    new.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where trainings lie  [%(default)s]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table  [%(default)s]")
    parser.add_argument("--units", type=int, help="stop after so many")
    arguments = parser.parse_args()
    rows, every = read(arguments.results), list(units())
    left = undone(rows, every)
    folder = arguments.work / "inputs"
    inputs(folder)
    for unit in left[: arguments.units]:
        print(f"{unit.name}: {len(undone(rows, every))} of {len(every)} units are left", file=sys.stderr)  # noqa: T201
        runs, before = trained(unit, folder, arguments.work), preflight(unit, folder)
        new = [row(unit, name, runs[name], before[name]) for name in unit.recipes]
        kept = {tuple(r[key] for key in COLUMNS[:5]): r for r in (*rows, *new)}
        rows = list(kept.values())
        write(rows, arguments.results)


if __name__ == "__main__":
    main()
