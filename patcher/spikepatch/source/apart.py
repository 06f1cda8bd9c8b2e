"""Names of a checkpoint's tensors in the model; and tied tensors that it stores with different values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from spikepatch.source.arrivals import Arrivals
from spikepatch.source.checkpoint import Checkpoint
from spikepatch.source.header import TensorEntry
from spikepatch.source.pieces import pieces

#: Of a checkpoint, which tied names it stores apart; told once, since their values are read for it.
_apart: WeakKeyDictionary[Arrivals, frozenset[str]] = WeakKeyDictionary()


def untie_stored(model: Any, checkpoint: Checkpoint) -> None:
    """Give tied parameters that ``checkpoint`` stores with different values one each, as ``from_pretrained`` does,
    whatever the config says: the heads of T5 1.1, Flan-T5 and mT5.

    Args:
        model: as its config builds it; is changed.
    """
    found = _apart.get(checkpoint.arrivals)
    if found is None:
        found = _apart[checkpoint.arrivals] = frozenset(_stored_apart(model, checkpoint))
    for name in found & model.all_tied_weights_keys.keys():
        owner, _, own_name = name.rpartition(".")
        table = model.get_parameter(name)
        setattr(model.get_submodule(owner), own_name, nn.Parameter(table.detach().clone()))
        model.all_tied_weights_keys.pop(name)


def stored_apart(checkpoint: Checkpoint | None) -> frozenset[str]:
    """What ``untie_stored`` has found to be stored apart."""
    return frozenset() if checkpoint is None else _apart.get(checkpoint.arrivals, frozenset())


def _stored_apart(model: Any, checkpoint: Checkpoint) -> Iterator[str]:
    tied = getattr(model, "all_tied_weights_keys", {})
    if not tied:
        return
    stored = {own: checkpoint.tensors[name] for name, own in renamed(model, checkpoint.tensors).items()}
    for name, other in tied.items():
        if name in stored and other in stored and not equal(stored[name], stored[other]):
            yield name


def renamed(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Checkpoint name -> in-memory name by transformers' renaming rules, where no weights are fused on the way."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    found = {}
    for name in names:
        own, fused = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if fused is None and own in state:
            found[name] = own
    return found


def equal(a: TensorEntry, b: TensorEntry) -> bool:
    """They hold the same values."""
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in zip(pieces(a), pieces(b), strict=True))
