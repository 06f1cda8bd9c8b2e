"""What the architecture's own code makes of each tensor: constants as they are, random values drawn by our seeds."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from spikepatch.apply.values.construction import constructed
from spikepatch.errors import Refused

#: A function from a tensor's name to its values, on the CPU; None where nothing tells them.
OwnValues = Callable[[str], torch.Tensor | None]


def own_values(model: nn.Module, seed: int) -> OwnValues:
    """What ``model``'s own code writes into its parameters and buffers when it is built; floats in float32.

    Nothing is run before the first value is asked for, and no more than one tensor is made at a time. Of a model in
    memory whose constructor cannot be run again, nothing tells the values of a tensor that is the same everywhere,
    where the code that was found would make it otherwise, nor of one whose values lie beyond all that it draws. Where
    an argument of the constructor is not known, a tensor that is computed (a table of angles, say) and is not as it
    would be made may have been made with another one.

    Args:
        model: in memory or on the meta device; it is not changed.
        seed: random values depend on it, on the tensor's name, and on nothing else.
    """
    run = functools.cache(lambda: constructed(model, seed))
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))

    def value(name: str) -> torch.Tensor | None:
        recording, known = run()
        now = tensors.get(name)
        if now is None or recording.shape(name) != tuple(now.shape):
            return None
        made = recording.value(name)
        origin = known[name]
        if made is None or (origin.sure and origin.alone):
            return made
        drawn = recording.is_drawn(name)
        if now.is_meta:
            return made if origin.alone and (drawn or _is_constant(made)) else None
        return made if _may_be(now.detach(), made, drawn=drawn, sure=origin.sure) else None

    return value


def check_explained(name: str, value: torch.Tensor | None, model: nn.Module) -> torch.Tensor:
    """The value, unless there is none.

    Raises:
        Refused: with what would tell it.
    """
    if value is None:
        raise Refused(
            what="nothing tells what the model's own code writes into a tensor",
            where=name,
            why=f"no code of {type(model).__name__} that can be run without its arguments writes it whole",
            remedy="keep the constructor's arguments as attributes of the same names, so that it can be run again; or"
            " patch the model where it has memory, which keeps such tensors (on a folder: --reinit none or residual)",
        )
    return value


def _may_be(now: torch.Tensor, made: torch.Tensor, *, drawn: bool, sure: bool) -> bool:
    """``now`` is ``made`` as it was once: learned since, or drawn by another seed."""
    if now.numel() < 2:
        return True
    made, now = made.to(now.dtype), now.cpu()
    if now.is_floating_point():
        made, now = made.float(), now.float()
    if drawn and now.numel() > 1 and not _is_constant(now):
        return bool(made.min() <= now.median() <= made.max())
    return torch.equal(now, made) or not (drawn or _is_constant(now) or not (sure or _is_constant(made)))


def _is_constant(values: torch.Tensor) -> bool:
    return values.numel() == 0 or bool((values == values.flatten()[0]).all())
