"""Which tensor of a source checkpoint holds which tensor of the model: names differ where a folder is older than the
code (a missing prefix, renamed modules), and transformers' own loading rules say how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from spikepatch.apply.tensors import Target, layout
from spikepatch.errors import BadSource
from spikepatch.residual.trace import skeleton

if TYPE_CHECKING:
    from spikepatch.residual.map import ResidualMap
    from spikepatch.source import Source
    from spikepatch.storage.read import TensorEntry


@dataclass(frozen=True)
class Match:
    """The source's tensors, found.

    Attributes:
        targets: canonical name -> entry.
        owners: in-memory name -> entry, for tensors stored whole.
        unused: names in the checkpoint that the architecture does not have; transformers ignores them too.
    """

    targets: Mapping[str, TensorEntry]
    owners: Mapping[str, TensorEntry]
    unused: tuple[str, ...]


def match_source(source: Source, model: nn.Module) -> Match:
    """Find every tensor of ``model``, the source's architecture, in its checkpoint.

    Raises:
        BadSource: tensors are missing, have another shape, or tied tensors are stored with different values.
    """
    assert source.checkpoint is not None
    model = skeleton(model)
    entries = source.checkpoint.tensors
    targets = layout(model)
    renamed = _in_memory_names(model, entries)
    by_owner: dict[str, TensorEntry] = {renamed[name]: entry for name, entry in entries.items() if name in renamed}
    found: dict[str, TensorEntry] = {}
    findings: list[str] = []
    for target in targets:
        entry = entries.get(target.name) or by_owner.get(target.owner)
        if entry is None:
            findings.append(f"{target.name} is missing")
        elif entry.shape != target.shape:
            findings.append(f"{target.name} has shape {entry.shape}, the architecture {target.shape}")
        else:
            found[target.name] = entry
    used = {entry.name for entry in found.values()}
    spare = [name for name in entries if name not in used]
    findings += _tied_apart(
        model, {t.owner: found[t.name] for t in targets if t.name in found}, spare, entries, renamed
    )
    if findings:
        raise BadSource(
            "the checkpoint does not fit the architecture",
            where=str(source.checkpoint.folder),
            why="; ".join(findings[:8]) + (f"; and {len(findings) - 8} more" if findings[8:] else ""),
            remedy="check that config.json belongs to these weights; --reinit all does not need them",
        )
    whole = {t.owner: found[t.name] for t in targets if _is_whole(t, model)}
    return Match(found, whole, tuple(spare))


def _is_whole(target: Target, model: Any) -> bool:
    tensor = model.state_dict()[target.owner]
    return target.shape == tuple(tensor.shape)


def _in_memory_names(model: Any, entries: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Checkpoint name -> in-memory name by transformers' renaming rules, where no weights are fused on the way."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    names = {}
    for name in entries:
        new, fused = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if fused is None and new in state:
            names[name] = new
    return names


def _tied_apart(
    model: Any,
    owners: Mapping[str, TensorEntry],
    spare: list[str],
    entries: Mapping[str, TensorEntry],
    renamed: Mapping[str, str],
) -> list[str]:
    """Second names of tied tensors: equal bytes are taken out of ``spare``, others are a finding."""
    import torch

    from spikepatch.storage.read import read_tensor

    first = {id(p): name for name, p in model.named_parameters()}
    alias = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    findings = []
    for name in list(spare):
        owner = alias.get(renamed.get(name, name))
        if owner is None or owner not in owners:
            continue
        if torch.equal(read_tensor(entries[name]), read_tensor(owners[owner])):
            spare.remove(name)
        else:
            findings.append(f"{name} and {owners[owner].name} are tied by the config but hold different values")
    return findings


def embedding_std(match: Match, residual: ResidualMap) -> float | None:
    """std of all elements of the learned token embedding, in float64; None where there is none."""
    from spikepatch.storage.read import read_tensor

    token = residual.token_embedding
    entry = match.owners.get(token.parameter) if token is not None else None
    return None if entry is None else float(read_tensor(entry).double().std())
