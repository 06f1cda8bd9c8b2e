"""Which recipes spike where: 264 trainings of 32 layers of width 16, and what pre-flight had said of each.

    python examples/study/study.py      # goes on with what --work has; stop it at any time with Ctrl-C

GPT-2 and Llama x five recipes x three learning rates x four seeds, on digits (a plateau, clipped at 1) and on the
sources of Python's standard library (not clipped); then a parallel-block, a branch-norm and a Mamba type. Models of one
structure are trained side by side by a loop of plain PyTorch (``vmap`` over models, each with its own rate and its
seed's batches), so that all of it takes two hours of one CPU core; those of a seed see the same batches.
spikepatch draws the weights and judges the curves. results.csv beside this file gets the rows of an architecture in a
regime when all of its recipes are trained.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import spikepatch

sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples.spikes_on_a_cpu import VANILLA_2304, digits
from examples.study.side_by_side import SideBySide

#: Declared before the first training.
SEEDS = (301, 302, 303, 304)
RECIPES = ("vanilla-2304", "vanilla", "xavier", "scaled-embed", "embed-ln")
RATES = (3e-3, 1e-2, 1e-3)
STEPS, WARMUP, SEQUENCES, LENGTH = 1500, 20, 4, 32
RESULTS, TURNS = (Path(__file__).with_name(name) for name in ("results.csv", "turns.csv"))

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
Array = npt.NDArray[Any]


class Unit(NamedTuple):
    """The trainings of an architecture on one kind of text."""

    regime: str
    architecture: str
    recipes: tuple[str, ...] = RECIPES
    rates: tuple[float, ...] = RATES

    @property
    def cells(self) -> list[tuple[str, str, str, str, str]]:
        """What a row begins with."""
        return [
            (self.regime, self.architecture, name, f"{lr:g}", str(seed))
            for name, lr, seed in itertools.product(self.recipes, self.rates, SEEDS)
        ]


UNITS = (
    *(Unit(regime, architecture) for regime in ("plateau", "text") for architecture in ("gpt2", "llama")),
    *(Unit("plateau", name, ("vanilla-2304", "scaled-embed"), RATES[:1]) for name in ("gpt_neox", "olmo2", "mamba")),
)


class Curve(NamedTuple):
    """Of one training: losses and gradient norms (steps,), and the loss on the text that is held out."""

    losses: Array
    norms: Array
    held_out: float


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


def built(folder: Path, architecture: str, name: str, seed: int) -> nn.Module:
    """The model with fresh weights."""
    model: nn.Module = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder / architecture), attn_implementation="eager"
    )
    spikepatch.patch(model, spikepatch.plan(model, recipe(folder, name), reinit="all", seed=seed))
    return model


def windows(path: Path) -> torch.Tensor:
    """All of a text, (windows, T + 1): a token is a byte, and the last one of a window begins the next."""
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    return data.unfold(0, LENGTH + 1, LENGTH)


def batches(rows: torch.Tensor, seeds: Sequence[int], steps: int) -> Iterator[torch.Tensor]:
    """(n, B, T + 1): the windows in an order that hangs on the seed alone."""
    orders = np.stack([np.random.default_rng(seed).permutation(len(rows))[: steps * SEQUENCES] for seed in seeds])
    for step in range(steps):
        yield rows[torch.from_numpy(orders[:, step * SEQUENCES : (step + 1) * SEQUENCES])]


def trained(unit: Unit, name: str, folder: Path, steps: int = STEPS) -> list[Curve]:
    """A recipe at all rates with all seeds."""
    members = list(itertools.product(unit.rates, SEEDS))
    models = [built(folder, unit.architecture, name, seed) for _, seed in members]
    group = SideBySide(models, [lr for lr, _ in members], 1.0 if unit.regime == "plateau" else None)
    found = []
    for step in group.train(batches(windows(folder / f"{unit.regime}.txt"), [s for _, s in members], steps), WARMUP):
        found.append(step)
        if len(found) % 100 == 0:
            low, high = step.losses.min(), step.losses.max()
            print(f"  step {len(found)} of {steps}: losses {low:.3f} to {high:.3f}", file=sys.stderr)  # noqa: T201
    with torch.no_grad():
        held_out = group.losses(windows(folder / f"{unit.regime}-held-out.txt").expand(len(members), -1, -1))
    losses, norms = (torch.stack(values, dim=1).numpy() for values in zip(*found, strict=True))
    return [Curve(*curve) for curve in zip(losses, norms, held_out.tolist(), strict=True)]


def curves(unit: Unit, name: str, folder: Path, work: Path) -> list[Curve]:
    """As ``trained``; from ``work``, where they are there already."""
    path = work / f"{unit.regime}-{unit.architecture}-{name}.npz"
    if not path.exists():
        print(path.stem, file=sys.stderr)  # noqa: T201
        found = trained(unit, name, folder)
        new = path.with_name(f"new-{path.name}")
        losses, norms, held_out = (np.array(values) for values in zip(*found, strict=True))
        np.savez(new, losses=losses, norms=norms, held_out=held_out)
        new.replace(path)
    kept = np.load(path)
    return [Curve(*curve) for curve in zip(*(kept[key] for key in Curve._fields), strict=True)]


def judged(curve: Curve, others: Sequence[Curve]) -> dict[str, Any]:
    """What is seen in a curve. An event that at least half of the other recipes have at that batch is the data's."""
    log, *twins = [
        spikepatch.TrainingLog(
            tuple(range(1, len(c.losses) + 1)), tuple(map(float, c.losses)), tuple(map(float, c.norms))
        )
        for c in (curve, *others)
    ]
    report = spikepatch.judge(log)
    told = [spikepatch.judge(log, against=twin).events for twin in twins] if report.events else []
    loss = []
    for i, event in enumerate(report.events):
        origins = [own[i].origin for own in told if own[i].origin is not None]
        if event.kind != "gradient_norm" and not (origins and 2 * origins.count("data") >= len(origins)):
            loss.append(event)
    norms = [event for event in report.events if event.kind == "gradient_norm"]
    return {
        "verdict": report.verdict, "loss_events": len(loss), "gradient_events": len(norms),
        "largest_excess": report.conclusion.largest,
        "largest_gradient_ratio": max((e.value / e.baseline for e in norms if e.value and e.baseline), default=None),
        "final_loss": float(curve.losses[-50:].mean()), "held_out_loss": float(curve.held_out),
    }  # fmt: skip


@functools.cache
def preflight(folder: Path, architecture: str, recipes: tuple[str, ...], seed: int) -> dict[str, dict[str, Any]]:
    """Recipe -> what ``check`` says of the weights that are trained."""
    names = [recipe(folder, name) for name in recipes]
    report = spikepatch.check(str(folder / architecture), recipes=names, tokens=LENGTH, batch=SEQUENCES, seed=seed)
    models = zip(recipes, report.models, strict=True)
    return {name: {field: getattr(model, field) for field in PREFLIGHT} for name, model in models}


def rows(unit: Unit, folder: Path, work: Path) -> list[Row]:
    """Of all trainings of a unit."""
    found = {name: curves(unit, name, folder, work) for name in unit.recipes}
    members = len(unit.rates) * len(SEEDS)
    made = []
    for i, cell in enumerate(unit.cells):
        name, seed = cell[2], int(cell[4])
        others = [own[i % members] for other, own in found.items() if other != name]
        known = preflight(folder, unit.architecture, unit.recipes, seed)[name]
        values = dict(zip(COLUMNS[:5], cell, strict=True)) | judged(found[name][i % members], others) | known
        made.append({k: "" if v is None else f"{v:.5g}" if isinstance(v, float) else str(v) for k, v in values.items()})
    return made


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
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where curves lie  [%(default)s]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table  [%(default)s]")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the operations are small; and a sum over threads is another one
    folder = arguments.work / "inputs"
    inputs(folder)
    done: list[Row] = []
    for unit in UNITS:
        done += rows(unit, folder, arguments.work)
        write(done, arguments.results)


if __name__ == "__main__":
    main()
