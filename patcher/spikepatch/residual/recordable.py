"""A copy of a model that can be recorded: it may write into itself, and nothing of the model changes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from spikepatch.quiet import quiet
from spikepatch.source.meta import skeleton
from spikepatch.source.private import own_buffers


def prepared(model: nn.Module) -> nn.Module:
    """A copy of ``model`` to be recorded: parameters on meta, buffers real, its kernels those that can be followed."""
    twin = skeleton(model)
    _prefer_traceable_kernels(twin)
    real: dict[int, torch.Tensor] = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        owner, _, own = name.rpartition(".")
        own_buffers(twin.get_submodule(owner))[own] = real.setdefault(id(buffer), on_cpu(buffer))
    return twin


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of its values on the CPU, which a forward pass may write into; one without values as it is."""
    return tensor.detach() if tensor.is_meta else tensor.detach().to("cpu", copy=True)


def _prefer_traceable_kernels(model: nn.Module) -> None:
    """On the meta twin only: no cache, fused attention, and no loop over the experts that data chose."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        parts: tuple[Any, ...] = (config, getattr(config, "text_config", None))
        for part in parts:
            if getattr(part, "use_cache", False):
                part.use_cache = False
    kernels = {"set_attn_implementation": ("sdpa", "eager"), "set_experts_implementation": ("batched_mm",)}
    with quiet():
        for method, choices in kernels.items():
            setter: Any = getattr(model, method, None)
            for choice in choices if setter is not None else ():
                with suppress(ValueError):
                    setter(choice)
                    break
