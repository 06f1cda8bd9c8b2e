"""Which tensors a model is stored as.

The canonical form of a model is what ``save_pretrained`` writes: names, order and shapes on disk differ from those in
memory where transformers fuses weights (one 3-D parameter for all experts in memory, a matrix each on disk). Every
random fill is keyed by the canonical name, so all appliers draw the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from spikepatch.errors import Refused
from spikepatch.source.private import forget_tied_lists, memory, names_not_saved
from spikepatch.source.tied import first_names


@dataclass(frozen=True)
class Target:
    """One stored tensor: ``shape``, ``stride`` and ``offset`` place it inside the in-memory tensor ``owner``.

    Of tied parameters ``owner`` is the first name.
    """

    name: str
    owner: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return int(torch.Size(self.shape).numel())

    def view(self, owner: torch.Tensor) -> torch.Tensor:
        """The part of ``owner``'s memory that is stored under this name."""
        return owner.as_strided(self.shape, self.stride, owner.storage_offset() + self.offset)


def layout(skeleton: nn.Module) -> tuple[Target, ...]:
    """The tensors that ``save_pretrained`` would write for the model, in its order; on the meta device, no data moves.

    Raises:
        Refused: a stored tensor is not a part of one in-memory tensor (a permutation that needs a copy).
    """
    state = {name: tensor.detach() for name, tensor in skeleton.state_dict(keep_vars=True).items()}
    owners = {memory(tensor): name for name, tensor in reversed(list(state.items()))}
    parameters = {name: parameter.detach() for name, parameter in skeleton.named_parameters()}
    owners |= {memory(p): name for name, p in parameters.items()}
    if hasattr(skeleton, "save_pretrained"):
        stored = _as_saved(skeleton, state)
    else:  # a hook may save a parameter in parts, under other names
        parts = {name for name, tensor in state.items() if owners[memory(tensor)] not in state}
        stored = {name: t for name, t in state.items() if name in parts or owners[memory(t)] == name}
    state |= parameters
    targets = []
    for name, tensor in stored.items():
        owner = owners.get(memory(tensor))
        if owner is None:
            raise Refused(
                what="this model's checkpoint layout is not supported yet",
                where=name,
                why="transformers stores this tensor as a permuted copy of what it keeps in memory",
                remedy="use --reinit none on a folder that transformers wrote, or report the architecture",
            )
        whole = state[owner]
        offset = tensor.storage_offset() - whole.storage_offset()
        targets.append(Target(name, owner, tuple(tensor.shape), tuple(tensor.stride()), offset, tensor.dtype))
    return tuple(targets)


class _NoCopies(TorchFunctionMode):
    """``contiguous`` returns the view itself, so that what conversions return still lies in the parameter's storage."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def _as_saved(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The steps of transformers' ``save_pretrained`` between the state dict and the file."""
    forget_tied_lists(model)
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = names_not_saved(model)
    kept = {name: tensor for name, tensor in state.items() if name not in ignored}
    # On meta it looks each name up among the parameters: older versions know no buffers, and none the names of hooks.
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    untied = remove_tied_weights_from_state_dict({n: t for n, t in kept.items() if n in parameters}, model)
    kept = {name: tensor for name, tensor in kept.items() if name in untied or name not in parameters}
    with _NoCopies():
        converted: dict[str, torch.Tensor] = revert_weight_conversion(model, kept)
    return converted


def check_covered(
    parameters: Iterable[str], model: nn.Module, targets: Iterable[Target], *, every: bool = False
) -> None:
    """Refuse to write ``parameters`` that are not, each whole and once, among what ``model`` is stored as.

    What is drawn is keyed by the stored names, so what is stored under none would stay as it is, and what is stored
    twice would be written twice.

    Args:
        every: all that is stored is to be written.

    Raises:
        Refused: with their names.
    """
    elements: dict[str, int] = {}
    for target in targets:
        elements[target.owner] = elements.get(target.owner, 0) + target.elements
    owners = first_names(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    wrong = [
        name for name in sorted(parameters) if name in named and elements.get(owners[name], 0) != named[name].numel()
    ]
    if every:
        wrong += sorted(elements.keys() - {*named, *(name for name, _ in model.named_buffers(remove_duplicate=False))})
    if wrong:
        raise Refused(
            what="parameters are stored as something else than they are",
            where=", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if wrong[3:] else ""),
            why="the model's state_dict has copies of parts of them, under other names, so what they are to hold cannot"
            " be written to them",
            remedy="remove the hook of state_dict that renames them while the model is patched",
        )


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter and persistent buffer, tied ones once, by its first name."""
    everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors = dict(model.named_parameters())
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if name not in everything}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def persistent(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of ``buffers`` that the model's state dict has."""
    state = model.state_dict()
    return {name: buffer for name, buffer in buffers.items() if name in state}
