"""What transformers does to weights while it loads them, and the config values that stop it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from spikepatch.errors import Refused
from spikepatch.plans.plan import Plan
from spikepatch.source.meta import skeleton
from spikepatch.source.private import mark_initialised, unmark_initialised, version


def stable_settings(model: nn.Module, plan: Plan | None) -> Mapping[str, bool]:
    """Config values with which ``from_pretrained`` leaves what ``plan`` drew or kept unchanged; usually none.

    Without a plan, all weights are kept.

    After loading, transformers runs ``_init_weights`` on every module and relies on each write to look at a mark on
    the tensor. Some writes do not, such as a division by the root of the number of layers, and change loaded weights.
    Which tensors are written is seen on the meta device: an in-place write counts a tensor's version up.

    Raises:
        Refused: no single flag of the config stops it.
    """

    drawn = frozenset() if plan is None else plan.written | {*plan.kept}

    def changed(settings: Mapping[str, bool]) -> list[str]:
        written = _written_on_load(model, settings)
        return [n for n in written if plan is None or plan.reinit != "all" or n in drawn]

    if not (written := changed({})):
        return {}
    config: Any = model.config
    flags = [name for name, value in config.to_dict().items() if value is True]
    for name in flags:
        if not changed({name: False}):
            return {name: False}
    raise Refused(
        what="transformers would change the written weights whenever it loads them",
        where=type(model).__name__,
        why=f"the architecture's initialiser writes {', '.join(written[:3])} even where a checkpoint gave the values",
        remedy="use --storage code, whose classes are loaded without that step",
    )


def _written_on_load(model: nn.Module, settings: Mapping[str, bool]) -> list[str]:
    twin: Any = skeleton(model)
    if not hasattr(twin, "initialize_weights"):
        return []
    for module in twin.modules():
        unmark_initialised(module)
        for name, value in settings.items():
            if hasattr(getattr(module, "config", None), name):
                setattr(module.config, name, value)
    state = twin.state_dict(keep_vars=True)
    for tensor in (*twin.parameters(), *twin.buffers()):
        mark_initialised(tensor)
    before = {name: version(tensor) for name, tensor in state.items()}
    twin.initialize_weights()
    return [name for name, tensor in state.items() if version(tensor) != before[name]]
