"""Trains several models of one structure at once, each on its own batches at its own rate: plain PyTorch, ``vmap``.

A narrow model leaves a core idle between its operations; twelve of them side by side take four times one's time. What
each of them does is what it would do by itself (``tests/test_examples.py`` holds it against ``torch.optim.AdamW``).

Legend: n models, P parameters of each, B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

import spikepatch

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.1


class Step(NamedTuple):
    """Of one step, before its update: loss in nats and norm of the gradient before clipping, of each model (n,)."""

    losses: torch.Tensor
    norms: torch.Tensor


class SideBySide:
    """Models that differ in their weights alone.

    Args:
        models: transformers' causal language models in float32, without dropout and ties. They are left as they are.
        rates: learning rate of each.
        clip: largest norm of a gradient; None for no clipping.
    """

    def __init__(self, models: Sequence[nn.Module], rates: Sequence[float], clip: float | None) -> None:
        self._model, self._clip = models[0], clip
        self._shapes = {name: p.shape for name, p in self._model.named_parameters()}
        self._weights = torch.stack([nn.utils.parameters_to_vector(m.parameters()).detach() for m in models])  # (n, P)
        self._rates = torch.tensor(rates)[:, None]
        decayed = {
            id(p) for g in spikepatch.param_groups(self._model, WEIGHT_DECAY) if g["weight_decay"] for p in g["params"]
        }
        decay = [torch.full((p.numel(),), WEIGHT_DECAY * (id(p) in decayed)) for p in self._model.parameters()]
        self._decay = torch.cat(decay)
        self._first, self._second = torch.zeros_like(self._weights), torch.zeros_like(self._weights)

    def losses(self, rows: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the next token: (n, B, T + 1) -> (n,)."""
        return vmap(self._loss)(self._weights, rows)

    def train(self, batches: Iterator[torch.Tensor], warmup: int) -> Iterator[Step]:
        """AdamW, the rate constant after a linear warm-up; a step for each batch (n, B, T + 1)."""
        b1, b2 = BETAS
        for step, rows in enumerate(batches, 1):
            weights = self._weights.requires_grad_()
            losses = self.losses(rows)
            (gradient,) = torch.autograd.grad(losses.sum(), weights)
            norms = gradient.norm(dim=1)
            with torch.no_grad():
                if self._clip is not None:
                    gradient *= (self._clip / (norms + 1e-6)).clamp(max=1)[:, None]
                rates = self._rates * min(1, step / warmup)
                self._first.lerp_(gradient, 1 - b1)
                self._second.lerp_(gradient.square(), 1 - b2)
                root = (self._second / (1 - b2**step)).sqrt() + EPS
                weights.mul_(1 - rates * self._decay).sub_(rates / (1 - b1**step) * self._first / root)
            yield Step(losses.detach(), norms)

    def _loss(self, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        parts = torch.split(weights, [shape.numel() for shape in self._shapes.values()])
        parameters = {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
        logits = functional_call(self._model, parameters, (), {"input_ids": rows[:, :-1], "use_cache": False}).logits
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
