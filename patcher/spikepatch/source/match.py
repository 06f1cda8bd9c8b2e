"""Which tensor of a source checkpoint holds which tensor of the model: names differ where a folder is older than the
code (a missing prefix, renamed modules), and transformers' own loading rules say how.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from spikepatch.errors import BadSource
from spikepatch.source.apart import equal, renamed
from spikepatch.source.header import TensorEntry, torch_dtype
from spikepatch.source.layout import layout
from spikepatch.source.meta import skeleton
from spikepatch.source.tied import first_names

if TYPE_CHECKING:
    from spikepatch.source.open import Source


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
        BadSource: tensors are missing, have another shape, or are stored twice with different values; all are named.
    """
    assert source.checkpoint is not None
    model = skeleton(model)
    entries = source.checkpoint.tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    owners = _owners(model, entries)
    stored = {owners[name]: name for name in reversed(list(entries)) if name in owners}
    found: dict[str, TensorEntry] = {}
    whole: dict[str, TensorEntry] = {}
    findings: list[str] = []
    for target in layout(model):
        entry = entries.get(target.name) or entries.get(stored.get(target.owner, ""))
        if entry is None:
            findings.append(f"{target.name} is missing")
        elif entry.shape != target.shape:
            findings.append(f"{target.name} has shape {entry.shape}, the architecture {target.shape}")
        elif torch_dtype(entry.dtype).is_floating_point != target.dtype.is_floating_point:
            findings.append(f"{target.name} is {entry.dtype}, the architecture's is {target.dtype}")
        else:
            found[target.name] = entry
            if target.shape == shapes[target.owner]:
                whole[target.owner] = entry
    spare = entries.keys() - {entry.name for entry in found.values()}
    second_copies = {name: whole[owners[name]] for name in entries if name in spare and owners.get(name) in whole}
    findings += [
        f"{name} and {first.name} are one tensor of the model but hold different values"
        for name, first in second_copies.items()
        if not equal(entries[name], first)
    ]
    if findings:
        raise BadSource(
            "the checkpoint does not fit the architecture",
            where=str(source.checkpoint.folder),
            why="; ".join(findings[:8]) + (f"; and {len(findings) - 8} more" if findings[8:] else ""),
            remedy="check that config.json belongs to these weights; --reinit all does not need them",
        )
    return Match(found, whole, tuple(name for name in entries if name in spare and name not in second_copies))


def _owners(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Checkpoint name -> in-memory name; of tied tensors the first name, whichever of them the checkpoint stores."""
    aliases = first_names(model)
    return {name: aliases.get(own, own) for name, own in renamed(model, names).items()}
