"""What each tensor of a folded model holds of the patched one, the proof that nothing else changes, and the values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Node

from spikepatch.apply.disk.write import Planned
from spikepatch.apply.folder.shards import Shards, as_in
from spikepatch.apply.values.loading import stable_settings
from spikepatch.errors import BadSource, Refused
from spikepatch.plans.plan import DetachEmbedding, EmbeddingEdit
from spikepatch.residual.identity import Values, forward_of
from spikepatch.residual.ops import LOOKUPS, op
from spikepatch.residual.trace import Trace
from spikepatch.runtime.embedding import change_output
from spikepatch.source.apart import untie_stored
from spikepatch.source.checkpoint import read_tensor
from spikepatch.source.header import TensorEntry, torch_dtype
from spikepatch.source.layout import layout
from spikepatch.source.match import Match
from spikepatch.source.meta import as_read, build_meta, skeleton
from spikepatch.source.open import Source
from spikepatch.source.tied import first_names

if TYPE_CHECKING:
    from spikepatch.apply.disk.pipeline import Content

#: Rows of a table that are folded at a time.
_ROWS = 4096


@dataclass(frozen=True)
class Rows:
    """The table ``table`` of the patched model, with ``edit`` (which names no module) applied to its rows.

    ``module`` is the embedding that was patched, where the edit has parameters of its own; equal edits without any
    give equal rows.
    """

    table: str
    edit: EmbeddingEdit
    module: str


#: What a tensor of the plain model holds: a tensor of the patched model, by its name, or its folded rows.
Holds = str | Rows


def plain_model(source: Source, patched: Any, edits: Mapping[str, EmbeddingEdit]) -> tuple[Any, dict[str, Holds]]:
    """The plain model, and what each of its tensors holds; untied only where one tensor would have to hold two values.

    Raises:
        Refused: it is not the patched model then, or a table cannot be told from the head's.
    """
    says = {} if not hasattr(source.config, "tie_word_embeddings") else {"tie_word_embeddings": False}
    for changes in ({}, says):
        config = as_read(source.config, changes)
        plain: Any = build_meta(source.model_class, config, where=source.name)
        if settings := stable_settings(plain, None):
            plain = build_meta(source.model_class, as_read(config, settings), where=source.name)
        if source.checkpoint is not None:
            untie_stored(plain, source.checkpoint)
        held = _held(plain, patched, edits)
        if isinstance(held, dict):
            break
    else:
        raise Refused(
            what="the embedding cannot be told from what shares its matrix",
            where=source.name,
            why=f"{held} would have to hold two values, also with tie_word_embeddings set to false",
            remedy="keep the patched model, which computes the same",
        )
    if not _proven(plain, patched, held, edits):
        raise Refused(
            what="folding is not proven exact for this model",
            where=source.name,
            why="with the tables folded, the plain model's operations are not those of the patched one: what was"
            " patched acts on more than single rows of its table, such as on a sum",
            remedy="keep the patched model",
        )
    return plain, held


def _held(plain: nn.Module, patched: nn.Module, edits: Mapping[str, EmbeddingEdit]) -> dict[str, Holds] | str:
    """Tensor of the plain model -> what it holds; or the name of one that would have to hold two things."""
    known = _first_names(patched)
    found: dict[str, Holds] = {}
    names = _first_names(plain)
    folded = {names[f"{module}.weight"] for module, edit in edits.items() if _folds(edit)}
    for name, first in names.items():
        module, _, _ = name.rpartition(".")
        value: Holds = known[name]
        if module in edits and _folds(edits[module]):
            owns = any(other.startswith(f"{module}.norm.") for other in known)
            value = Rows(known[name], dataclasses.replace(edits[module], module=""), module if owns else "")
        elif first in folded and isinstance(plain.get_submodule(module), nn.Embedding):
            continue  # a table by another name, such as T5's `shared`: whether it is looked up in is seen by the proof
        if found.setdefault(first, value) != value:
            return first
    return found


def _folds(edit: EmbeddingEdit) -> bool:
    """It changes what is looked up, not its gradient alone."""
    return not isinstance(edit, DetachEmbedding)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> the first one; a buffer's -> itself."""
    return {name: name for name in model.state_dict()} | first_names(model)


def _proven(
    plain: nn.Module, patched: nn.Module, held: Mapping[str, Hashable], edits: Mapping[str, EmbeddingEdit]
) -> bool:
    """The patched model computes what the plain one does, f(E[ids]) being E'[ids]."""
    values = Values()
    graph = forward_of(patched)
    names, holder = _first_names(patched), _first_names(plain)
    places: dict[str, list[str]] = {}
    for module in edits:
        places.setdefault(names[f"{module}.weight"], []).append(module)
    steps = {module: _step(patched.get_submodule(module), edit) for module, edit in edits.items()}

    def seen(node: Node, numbers: Mapping[Node, int]) -> None:
        table = node.args[0] if op(node) in LOOKUPS else None
        if not isinstance(table, Node):
            return
        for module in places.get(graph.parameters.get(table, ""), ()):
            step, lookup = steps[module]
            own = {name: f"{module}.{name}" for name in step.parameters.values()}
            after = values.output(step, own, start={lookup: numbers[node]})
            rows = values.tensor(held[holder[f"{module}.weight"]])
            values.equate(after, values.call(node, {**numbers, table: rows}))

    wanted = values.output(graph, seen=seen)
    return values.output(forward_of(plain), tensors=held) == wanted


def _step(module: nn.Module, edit: EmbeddingEdit) -> tuple[Trace, Node]:
    """What ``edit`` does behind a lookup, recorded on a plain embedding of the same size; and the lookup itself."""
    table: Any = module.weight
    rows, width = table.shape
    alone = nn.Embedding(rows, width, device="meta", dtype=table.dtype)
    change_output(alone, edit.record)
    graph = forward_of(alone, {"input": torch.zeros(1, 1, dtype=torch.long)})
    return graph, next(node for node in graph.graph.nodes if op(node) in LOOKUPS)


def fold_shards(source: Source, plain: nn.Module, held: Mapping[str, Holds], match: Match) -> Shards:
    """What is to be written: every tensor in the file and the dtype that it has in the source; a new head, in
    those of the table that it shared.

    Args:
        plain, held: see ``plain_model``.
        match: of the patched model's tensors in the source.

    Raises:
        BadSource: by ``produce``: a table to fold holds NaN or infinite values.
    """
    assert source.checkpoint is not None
    targets = {target.name: target for target in layout(skeleton(plain))}
    entries: dict[str, TensorEntry] = {}
    folded: dict[str, Rows] = {}
    for target in targets.values():
        value = held[target.owner]
        if isinstance(value, Rows):
            folded[target.name] = value
        name = value.table if isinstance(value, Rows) else value
        whole = match.owners.get(name)
        entries[target.name] = match.targets[target.name] if whole is None else whole
    tensors = tuple(Planned(name, torch_dtype(entries[name].dtype), target.shape) for name, target in targets.items())

    def produce(name: str) -> Content:
        if name not in folded:
            return entries[name]
        table, rows = read_tensor(entries[name]), folded[name]
        if not torch.isfinite(table).all():
            raise BadSource(
                f"{entries[name].name} holds NaN or infinite values",
                where=str(entries[name].file),
                why="the source's weights are not finite",
                remedy="use a sound checkpoint",
            )
        return _folded(table, rows.edit, lambda own: read_tensor(match.owners[f"{rows.module}.{own}"]))

    return Shards(
        tensors,
        as_in(source.checkpoint, tensors, entries),
        fills={},
        kept={name: entry for name, entry in entries.items() if name not in folded},
        produce=produce,
    )


@torch.no_grad()
def _folded(table: torch.Tensor, edit: EmbeddingEdit, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """What the patched embedding returns for each row, (rows, width), in the table's dtype.

    Args:
        read: name of a parameter of the added norm -> its value.
    """
    rows, width = table.shape
    module = nn.Embedding(rows, width, _weight=table, _freeze=True)
    change_output(module, edit.record)
    for name, parameter in module.named_parameters():
        if name != "weight":
            parameter.copy_(read(name))
    result = torch.empty_like(table)
    for ids in torch.split(torch.arange(rows), _ROWS):
        result[ids] = module(ids)
    return result
