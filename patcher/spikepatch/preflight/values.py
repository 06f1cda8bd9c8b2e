"""Where a program's weights come from: a live model, a checkpoint, a plan, the architecture's own initialiser.

Each is a function from a parameter's name to its values, asked when they are needed: nothing is held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from spikepatch.apply.values.assign import values
from spikepatch.apply.values.initialiser import check_explained, own_values
from spikepatch.plans.plan import Plan, Untie
from spikepatch.preflight.program import Weights
from spikepatch.source.checkpoint import read_tensor
from spikepatch.source.layout import Target, layout, persistent
from spikepatch.source.meta import skeleton
from spikepatch.source.private import own_buffers

if TYPE_CHECKING:
    from spikepatch.source.match import Match


def live(model: nn.Module) -> Weights:
    """The parameters of ``model`` as they are."""
    return lambda name: model.get_parameter(name).detach()


def fresh(model: nn.Module, seed: int) -> Weights:
    """What the model's own code writes, where it is built afresh; ``model`` is in memory or on the meta device."""
    made = own_values(model, seed)
    return lambda name: check_explained(name, made(name), model)


def stored(structure: nn.Module, match: Match) -> Weights:
    """The tensors of a checkpoint."""
    return _assembled(skeleton(structure), structure, lambda target: read_tensor(match.targets[target.name]))


def planned(patched: nn.Module, plan: Plan, kept: Weights, model: nn.Module) -> Weights:
    """What ``plan`` writes; the rest from ``kept``. ``patched`` is ``model`` with the plan's changes of structure,
    without memory but for its buffers.
    """
    copies = {edit.head: edit.embedding for edit in plan.select(Untie)}
    twin = skeleton(patched)
    value = values(plan, twin, model, persistent(patched, dict(patched.named_buffers())))

    def of(target: Target) -> torch.Tensor:
        new = value(target)
        return new if new is not None else target.view(kept(copies.get(target.owner, target.owner)).contiguous())

    return _assembled(twin, patched, of)


def cached(weights: Weights) -> Weights:
    """The same weights, kept once asked for."""
    return functools.cache(weights)


def load_buffers(structure: nn.Module, match: Match) -> None:
    """Give persistent buffers of ``structure`` the checkpoint's values."""
    for target in layout(skeleton(structure)):
        owner, _, name = target.owner.rpartition(".")
        module = structure.get_submodule(owner)
        if name in own_buffers(module) and target.name in match.targets:
            own_buffers(module)[name] = read_tensor(match.targets[target.name])


def _assembled(twin: nn.Module, model: nn.Module, value: Callable[[Target], torch.Tensor]) -> Weights:
    """Parameters in memory from tensors as they are stored: several may lie in one (an expert each)."""
    targets: dict[str, list[Target]] = {}
    for target in layout(twin):
        targets.setdefault(target.owner, []).append(target)
    own = fresh(model, 0)  # what is never stored, such as a fixed table of positions

    def weight(name: str) -> torch.Tensor:
        if name not in targets:
            return own(name)
        first, *others = targets[name]
        shape = twin.get_parameter(name).shape
        if not others and first.shape == shape:
            return value(first)
        whole: torch.Tensor | None = None
        for target in targets[name]:
            part = value(target)
            whole = torch.zeros(shape, dtype=part.dtype) if whole is None else whole
            target.view(whole).copy_(part)
        assert whole is not None
        return whole

    return weight
