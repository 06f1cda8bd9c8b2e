"""The gradient's norm, layer by layer, of a model that may be sharded."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from spikepatch.residual.points import Points


def gradient_norms(model: nn.Module, points: Points) -> torch.Tensor:
    """(layers,): the norm of the gradient of all parameters of each layer; the same on every rank."""
    norms = [
        whole(get_total_norm([p.grad for p in model.get_submodule(path).parameters() if p.grad is not None]))
        for path in points.layers
    ]
    return torch.stack(norms)


def whole(value: torch.Tensor) -> torch.Tensor:
    """A plain tensor, the same on every rank."""
    return value.full_tensor() if isinstance(value, DTensor) else value
