"""How far one update turns the residual stream of a fresh model: a candidate for a pre-flight that knows the rate.

    python examples/study/turn.py        # turns.csv beside this file: a row for each training of the study, 10 minutes

One step of the size of the learning rate against the sign of the gradient of one batch, as Adam's first are; then,
of each token, the cosine of its stream before and after at the entrance of each block:

    turn = min over blocks of ( mean over tokens of cos(x_before, x_after) )

1: nothing turns; below 0: the stream points elsewhere. The definition is that of earlier runs with other seeds, and
these numbers were committed before the trainings that they are compared with, so nothing is chosen on the study itself.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import spikepatch

sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples.study.study import COLUMNS, TURNS, Row, inputs, recipe, units


def turns(model: Any, ids: torch.Tensor, rates: Sequence[float]) -> Iterator[float]:
    """One for each learning rate. The model is as before afterwards.

    Args:
        model: float32, of transformers.
        ids: (sequences, tokens).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    signs = [torch.zeros_like(p) if p.grad is None else p.grad.sign() for p in parameters]
    kept = [p.detach().clone() for p in parameters]
    before = _stream(model, ids)
    for rate in rates:
        with torch.no_grad():
            for p, old, sign in zip(parameters, kept, signs, strict=True):
                p.copy_(old - rate * sign)
        yield float(torch.nn.functional.cosine_similarity(before, _stream(model, ids), dim=-1).mean((1, 2)).min())
    with torch.no_grad():
        for p, old in zip(parameters, kept, strict=True):
            p.copy_(old)


@torch.no_grad()
def _stream(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(blocks, sequences, tokens, width), at the entrance of each block; the last that there is, is behind the norm."""
    return torch.stack(model(ids, output_hidden_states=True, use_cache=False).hidden_states[:-1])


def measured(folder: Path) -> Iterator[Row]:
    """The rows of all units; units that differ in the rate alone are one model."""
    cells: dict[tuple[str, str, int, str], list[float]] = {}
    for unit in units():
        for name in unit.recipes:
            cells.setdefault((unit.regime, unit.architecture, unit.seed, name), []).append(unit.lr)
    for (regime, architecture, seed, name), rates in cells.items():
        config = AutoConfig.from_pretrained(folder / architecture)
        model = AutoModelForCausalLM.from_config(config)
        spikepatch.patch(model, spikepatch.plan(model, recipe(folder, name), reinit="all", seed=seed))
        text = (folder / f"{regime}.txt").read_bytes()[:128]
        ids = torch.tensor(list(text)).view(4, 32)  # as a step of the training has them
        for lr, turn in zip(rates, turns(model, ids, rates), strict=True):
            yield {
                "regime": regime, "architecture": architecture, "recipe": name, "lr": f"{lr:g}", "seed": str(seed),
                "turn": f"{turn:.4f}",
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/study"))
    arguments = parser.parse_args()
    inputs(arguments.work / "inputs")
    rows = list(measured(arguments.work / "inputs"))
    with TURNS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS[:5], "turn"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
