"""Arguments of ``check`` that make no sense are refused before anything is read."""

from __future__ import annotations

import math

import torch

from spikepatch.errors import Refused, first_line


def device_of(name: str) -> torch.device:
    """``auto`` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refused(
            what=f"no device {name!r}",
            where="--device",
            why=first_line(error),
            remedy="leave it out for a GPU where there is one, else the CPU",
        ) from error
    return device


def check_together(steps: int, layers: int | None) -> None:
    """Refuse what says nothing of the whole model."""
    if steps and layers is not None:
        raise Refused(
            what="optimiser steps of a model cut to fewer layers say nothing of the whole",
            where="--steps with --layers",
            why="sizes and gradients at the start are extrapolated; what training does to them is not",
            remedy="leave one of the two out",
        )


def check_numbers(**numbers: float) -> None:
    """Refuse what leaves nothing to measure."""
    least = {"tokens": 2, "batch": 1, "seed": 0, "steps": 0, "layers": 2}
    for name, value in numbers.items():
        if (name == "lr" and not 0 < value < math.inf) or value < least.get(name, 0):
            raise Refused(
                what=f"{name} cannot be {value if isinstance(value, int) else format(value, 'g')}",
                where=f"--{name}",
                why="there is nothing to measure",
                remedy=f"give {least.get(name, 'more than 0')} or more",
            )
