"""What a model and a run of a training are called, in its folder, its logs, its verdict and its report."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spikepatch.source.typed import parsed


@dataclass(frozen=True)
class TrainedModel:
    """A model that is trained.

    Attributes:
        name: of its folder, and in the report.
        source: a hub id, a folder, or ``arch:TYPE``, as given.
        recipe: applied in memory, as given.
        patched: by ``recipe``, or it is a folder that spikepatch has patched; with a recipe that is to satisfy both of
            the paper's conditions, or the user's own. One that leaves a condition out, as ``vanilla``, is a baseline.
    """

    name: str
    source: str
    recipe: str | None
    patched: bool


@dataclass(frozen=True)
class Run(TrainedModel):
    """One model at one learning rate, which is ``multiplier`` times that of the command, and one seed."""

    lr: float
    multiplier: float
    seed: int

    @property
    def folder(self) -> str:
        """Under OUT."""
        return run_folder(self.name, self.lr, self.seed)


def identity(found: TrainedModel, kind: type[TrainedModel] = Run) -> dict[str, Any]:
    """The fields of ``kind`` of what is more than that."""
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(kind)}


def all_runs(record: Mapping[str, Any]) -> Iterator[Run]:
    """Every run of a training, in the order in which they are run: what ``run.json`` says, or is to say.

    Raises:
        KeyError, TypeError: it does not say it.
    """
    names = [field.name for field in dataclasses.fields(TrainedModel)]
    for multiplier in record["multipliers"]:
        for seed in record["seeds"]:
            for model in record["models"].values():
                about = {name: model[name] for name in names}
                rate = {"lr": record["lr"] * multiplier, "multiplier": multiplier, "seed": seed}
                yield parsed(Run, about | rate)


def run_folder(name: str, lr: float, seed: int) -> str:
    """``NAME/lr5e-4-seed0``: all digits of the rate that tell it from others, 15 of them, beyond which floats round."""
    if not math.isfinite(lr):
        raise ValueError(f"a learning rate of {lr}")
    digits, exponent = f"{lr:.14e}".split("e")
    short = seed if seed < 10**40 else hashlib.sha256(str(seed).encode()).hexdigest()[:40]  # names have 255 characters
    return f"{name}/lr{digits.rstrip('0').rstrip('.')}e{int(exponent)}-seed{short}"
