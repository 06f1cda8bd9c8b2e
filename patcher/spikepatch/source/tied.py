"""Names of one tensor: parameters that a model has more than once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def firsts(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Every name of a tensor -> the first of those that it has. Tensors are the same if they are one object."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> the first one, which ``named_parameters()`` gives."""
    return firsts(model.named_parameters(remove_duplicate=False))


def tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of names that are one parameter; the first name first."""
    groups: dict[str, list[str]] = {}
    for name, first in first_names(model).items():
        groups.setdefault(first, []).append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
