"""What a plan writes into each stored tensor: shared by the live and the on-disk applier."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from spikepatch.apply.values.draw import draw
from spikepatch.apply.values.initialiser import check_explained, own_values
from spikepatch.plans.plan import NormEmbedding, Plan, ValueEdit
from spikepatch.runtime.embedding import first_value
from spikepatch.source.layout import Target
from spikepatch.source.private import is_transformers_model


def values(
    plan: Plan, twin: nn.Module, model: nn.Module, buffers: Mapping[str, torch.Tensor]
) -> Callable[[Target], torch.Tensor | None]:
    """A function from a target to its new value in float32 (buffers: in their own dtype), or None where it is kept.

    With ``reinit="all"`` what the plan neither draws nor keeps is what the model's own code makes of it. What no code
    explains is kept in a model that is in memory; of structure alone the function raises Refused.

    Args:
        plan: what to write.
        twin: the patched structure on the meta device.
        model: the same without the patch, in memory or on the meta device.
        buffers: persistent buffers as the constructor makes them; of a plain module, as they are.
    """
    edits: dict[str, ValueEdit] = {edit.parameter: edit for edit in plan.select(ValueEdit)}
    norms = tuple(f"{edit.module}.norm." for edit in plan.select(NormEmbedding))
    rebuilt = is_transformers_model(twin)  # from its config, which says whether the head is tied
    made = own_values(twin if rebuilt else model, plan.seed)
    learned = not any(parameter.is_meta for parameter in model.parameters())
    last: dict[str, torch.Tensor | None] = {}
    kept = frozenset(plan.kept)

    def own(name: str) -> torch.Tensor | None:
        value = buffers.get(name) if rebuilt else None
        value = made(name) if value is None else value
        value = buffers.get(name) if value is None else value
        return value if learned else check_explained(name, value, model)

    def value(target: Target) -> torch.Tensor | None:
        edit = edits.get(target.owner)
        if edit is not None:
            return draw(edit, plan.seed, target.name, 0, target.elements).view(target.shape)
        if target.owner.startswith(norms):  # new with this plan, so there is no learned value to keep
            return torch.full(target.shape, first_value(target.owner.rpartition(".")[2]))
        if plan.reinit != "all" or target.owner in kept:
            return None
        if target.owner not in last:  # several targets may be parts of one tensor
            last.clear()
            last[target.owner] = own(target.owner)
        whole = last[target.owner]
        return None if whole is None else target.view(whole)

    return value
