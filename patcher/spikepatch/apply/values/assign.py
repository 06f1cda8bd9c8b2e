"""What a plan writes into each stored tensor: shared by the live and the on-disk applier."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from spikepatch.apply.values.draw import draw
from spikepatch.apply.values.initialiser import own_initialiser
from spikepatch.plans.plan import NormEmbedding, Plan, ValueEdit
from spikepatch.runtime.embedding import first_value
from spikepatch.source.layout import Target


def values(
    plan: Plan, skeleton: nn.Module, buffers: Mapping[str, torch.Tensor]
) -> Callable[[Target], torch.Tensor | None]:
    """A function from a target to its new value in float32 (buffers: in their own dtype), or None where it is kept.

    The function raises Refused where the architecture's own initialiser cannot give a value; an edit always can.

    Args:
        plan: what to write.
        skeleton: the patched structure on the meta device.
        buffers: persistent buffers as the constructor makes them.
    """
    edits: dict[str, ValueEdit] = {edit.parameter: edit for edit in plan.select(ValueEdit)}
    norms = tuple(f"{edit.module}.norm." for edit in plan.select(NormEmbedding))
    last: dict[str, dict[str, torch.Tensor]] = {}

    def value(target: Target) -> torch.Tensor | None:
        edit = edits.get(target.owner)
        if edit is not None:
            return draw(edit, plan.seed, target.name, 0, target.elements).view(target.shape)
        module, _, own_name = target.owner.rpartition(".")
        if target.owner.startswith(norms):  # new with this plan, so there is no learned value to keep
            return torch.full(target.shape, first_value(own_name))
        if plan.reinit != "all":
            return None
        if module not in last:
            last.clear()
            last[module] = own_initialiser(skeleton, module, plan.seed, buffers, edits)
        return target.view(last[module][target.owner])

    return value
