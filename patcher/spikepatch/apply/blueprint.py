"""What a model on the meta device is to become: found out when it is patched, written when its shards have memory.

Sharding replaces parameters and breaks ties, and ``to_empty`` loses the values of buffers, so all that is known of the
whole model is kept from before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spikepatch.apply.tensors import Target
from spikepatch.plans import Plan


@dataclass(frozen=True)
class Blueprint:
    """Kept on the model by ``patch``, for ``initialize``.

    Attributes:
        plan: what to write.
        skeleton: the patched structure, whole, on the meta device.
        targets: the tensors that it is stored as.
        buffers: all buffers, as the constructor makes them.
    """

    plan: Plan
    skeleton: nn.Module
    targets: tuple[Target, ...]
    buffers: Mapping[str, torch.Tensor]

    def is_of(self, plan: Plan) -> bool:
        """``plan`` writes the same; it may have been made from another description of the model."""
        return dataclasses.replace(plan, source=self.plan.source) == self.plan

    def __deepcopy__(self, memo: dict[int, Any]) -> Blueprint:
        return self  # nothing in it changes


def unfillable(blueprint: Blueprint) -> Iterator[str]:
    """Which tensors nothing would give a value to, one sentence per reason."""
    model, targets = blueprint.skeleton, blueprint.targets
    elements = dict.fromkeys((target.owner for target in targets), 0)
    for target in targets:
        elements[target.owner] += target.elements
    unstored = [name for name, p in model.named_parameters() if elements.get(name, 0) != p.numel()]
    if unstored:
        yield f"{', '.join(unstored[:3])} is not among what save_pretrained writes, so no value is defined for it"
    lost = [name for name, _ in model.named_buffers() if name not in blueprint.buffers]
    if lost:
        yield f"only the constructor knows the values of {', '.join(lost[:3])}, and it ran on the meta device"
    plain = [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.is_meta
    ]
    if plain:
        yield f"{', '.join(plain[:3])} is neither a parameter nor a buffer, and has no value on the meta device"
