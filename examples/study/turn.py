"""How far one update turns the residual stream of a fresh model: candidates for a pre-flight that knows the rate.

    python examples/study/turn.py        # turns.csv beside this file: a row for each training of the study, 10 minutes

One step of the size of the learning rate against the sign of the gradient of one batch, as Adam's first are; then,
of each token, the cosine of its stream before and after at the entrance of each block:

    turn = min over blocks of ( mean over tokens of cos(x_before, x_after) )

1: nothing turns; below 0: the stream points elsewhere. ``random_turn`` is the same of a step of random signs. Without a
rate, ``growth`` is by how much the first five blocks together enlarge a small change of the embeddings, relative to the
stream: Eq. 7's product, seen forwards. The definitions are those of earlier runs with other seeds, and turns were
committed before the trainings that they are compared with, so nothing is chosen on the study itself.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples.study.study import COLUMNS, SEEDS, TURNS, UNITS, Row, built, inputs, windows

#: What a row of turns.csv has beside the training it is of.
MEASURED = ("turn", "random_turn", "growth")

#: Blocks whose growth is measured, and the size of the change that grows, of the stream's.
_SHALLOW, _SMALL = 5, 1e-3


def turns(model: Any, ids: torch.Tensor, rates: Sequence[float], seed: int | None = None) -> Iterator[float]:
    """One for each learning rate. The model is as before afterwards.

    Args:
        model: float32, of transformers.
        ids: (sequences, tokens).
        seed: of random signs; None for those of the gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if seed is None:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        signs = [torch.zeros_like(p) if p.grad is None else p.grad.sign() for p in parameters]
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = [torch.randint(2, p.shape, generator=generator) * 2.0 - 1 for p in parameters]
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
def growth(model: Any, ids: torch.Tensor, seed: int) -> float:
    """Relative change of the stream that enters block 5, for one at the first block; both in the norm."""
    embedded = model.get_input_embeddings()(ids)
    noise = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(seed))
    before, after = (
        torch.stack(model(inputs_embeds=e, output_hidden_states=True, use_cache=False).hidden_states[: _SHALLOW + 1])
        for e in (embedded, embedded + _SMALL * embedded.std() * noise)
    )
    changed = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    return float(changed[-1] / changed[0])


@torch.no_grad()
def _stream(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(blocks, sequences, tokens, width), at the entrance of each block; the last that there is, is behind the norm."""
    return torch.stack(model(ids, output_hidden_states=True, use_cache=False).hidden_states[:-1])


def measured(folder: Path) -> Iterator[Row]:
    """The rows of all trainings; those that differ in the rate alone begin with one model."""
    for unit in UNITS:
        ids = windows(folder / f"{unit.regime}.txt")[:4, :-1]
        for name in unit.recipes:
            for seed in SEEDS:
                model: Any = built(folder, unit.architecture, name, seed)
                grown = growth(model, ids, seed)
                found = zip(turns(model, ids, unit.rates), turns(model, ids, unit.rates, seed), strict=True)
                for lr, own in zip(unit.rates, found, strict=True):
                    cell = (unit.regime, unit.architecture, name, f"{lr:g}", str(seed))
                    values = (f"{value:.4f}" for value in (*own, grown))
                    yield dict(zip((*COLUMNS[:5], *MEASURED), (*cell, *values), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/study"))
    arguments = parser.parse_args()
    inputs(arguments.work / "inputs")
    rows = list(measured(arguments.work / "inputs"))
    with TURNS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS[:5], *MEASURED], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
