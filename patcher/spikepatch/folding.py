"""``fold(trained, out)``: a trained patched model becomes its plain architecture, which needs no custom code.

A factor or a token-wise norm f behind an embedding acts on single rows of its table, so it can be applied to the table:

    f(E[ids]) = E'[ids]    with    E' = f(E), row by row

A head that is tied to the table gets a matrix of its own, the E that it has read all along. E' is what the patched
embedding itself returns for every row, in the dtype of the weights; so in that dtype the folded model's logits are the
patched model's, bit for bit. Run in a narrower dtype, the two round differently once: E and the product, or E' alone.

That nothing else happens to the table is proven on the recorded forward passes; see ``residual/identity.py``. No code
of the trained folder is run: its config records what was patched, and its files are compared with those that this
version writes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from spikepatch.apply.kept import Match, match_source
from spikepatch.apply.original import original_of
from spikepatch.apply.shards import Progress, Shards, as_in, check_shards, write_folder
from spikepatch.apply.source_code import check_generated, stored_as_code
from spikepatch.apply.tensors import layout
from spikepatch.errors import BadSource, BadTarget, Refused
from spikepatch.meta import as_read
from spikepatch.meta import build_meta as build
from spikepatch.planning import check_weights
from spikepatch.residual.identity import Values, forward_of
from spikepatch.residual.ops import LOOKUPS, op
from spikepatch.residual.trace import Trace, skeleton
from spikepatch.runtime.embedding import change_output, install
from spikepatch.source import MODEL_CARD, Source, build_meta, open_source
from spikepatch.storage.header import DTYPES
from spikepatch.storage.manifest import MANIFEST, fingerprint, fold_card, fold_manifest, inherited_metadata
from spikepatch.storage.publish import check_target, publishing
from spikepatch.storage.read import TensorEntry, read_tensor
from spikepatch.storage.write import Planned, write_text

#: Rows of a table that are folded at a time.
_ROWS = 4096


@dataclass(frozen=True)
class Folded:
    """What was folded.

    Attributes:
        out: the folder.
        architecture, auto_class: the plain class, and the class of transformers that loads it.
        trust: it loads with ``trust_remote_code=True`` only: the model came with code of its own.
        tables: the embeddings that a factor or norm went into.
        untied: the head has a matrix of its own now.
        parameters, bytes: what was written.
        notes: what the user should know, one sentence each.
    """

    out: Path
    architecture: str
    auto_class: str
    trust: bool
    tables: tuple[str, ...]
    untied: bool
    parameters: int
    bytes: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"out": str(self.out)}


def fold(
    trained: str,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Folded:
    """Read a patched model, put its factor or norm into the embedding, and write the plain architecture to ``out``.

    Meant for after training. Training on is not the same: Adam's step, relative to the size of a row, changes by the
    factor. ``out`` appears whole or not at all; the weights are read and written a tensor at a time.

    Args:
        trained: a folder that ``convert`` or a patched model's ``save_pretrained`` wrote, or a hub id; only read.
        out: absent or empty, unless ``overwrite``.
        revision: of a hub id.
        trust_remote_code: for a model that came with code of its own; code that spikepatch wrote is never run.
        overwrite: replace a folder at ``out``.
        progress: told of long steps.

    Raises:
        Refused: the model is plain already, or what was patched cannot be folded exactly; with the reason.
        SpikepatchError: it cannot be read or written.
    """
    report: Progress = progress or (lambda step, done=0, total=0: None)
    folder, local = Path(out), Path(trained).expanduser()
    check_target(folder, local if local.is_dir() else None, overwrite=overwrite)
    report("reading the source")
    found = open_source(trained, revision=revision, trust_remote_code=trust_remote_code, weights=True)
    check_target(folder, found.folder, overwrite=overwrite)
    record = _record(found)
    check_weights(found, "none")

    report("proving that it folds")
    patched = build_meta(found)
    try:
        install(patched, record)
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # the record may have been edited by hand
        raise _bad_record(found, str(error)) from error
    plain, held = _plain(found, patched, record["embeddings"])
    match = match_source(found, patched)
    shards = _shards(found, plain, held, match, record["embeddings"])
    result = Folded(
        out=folder,
        architecture=type(plain).__name__,
        auto_class=found.auto_class,
        trust=found.needs_code,
        tables=tuple(name for name, value in held.items() if isinstance(value, _Rows)),
        untied=bool(found.config.tie_word_embeddings and not plain.config.tie_word_embeddings),
        parameters=shards.elements,
        bytes=shards.bytes,
        notes=tuple(_notes(shards, match, record["embeddings"])),
    )
    try:
        with publishing(folder) as scratch:
            texts = _texts(found, plain, result)
            hashes = write_folder(scratch, shards, texts, found.folder, found.copied_files, report)
            command = shlex.join(["spikepatch", "fold", trained, "OUT"])
            write_text(scratch / MANIFEST, fold_manifest(record, fingerprint(found), command, hashes))
            report("checking what was written")
            check_shards(scratch, shards)
    except OSError as error:
        raise BadTarget(
            "the output cannot be written",
            where=str(folder),
            why=str(error),
            remedy="check the disk's free space and the folder's permissions; nothing was left behind",
        ) from error
    return result


@dataclass(frozen=True)
class _Rows:
    """The table ``table`` of the patched model, with ``edit`` (JSON) applied to its rows.

    ``module`` is the embedding that was patched, where the edit has parameters of its own; equal edits without any
    give equal rows.
    """

    table: str
    edit: str
    module: str


#: What a tensor of the plain model holds: a tensor of the patched model, by its name, or its folded rows.
_Held = str | _Rows


def _record(source: Source) -> Mapping[str, Any]:
    if source.patched is None or not stored_as_code(source.patched):
        raise Refused(
            what="there is nothing to fold",
            where=source.name,
            why="it is a plain architecture, which loads without custom code"
            + (" (its factor is a setting of its config)" if source.patched and source.patched["embeddings"] else ""),
            remedy="use it as it is; fold takes what a patched model's save_pretrained wrote",
        )
    auto_map = getattr(source.config, "auto_map", None)
    assert source.folder is not None
    check_generated(source.folder, original_of(source.model_class, type(source.config), auto_map))
    if not isinstance(source.patched.get("embeddings"), dict):
        raise _bad_record(source, "it has no embeddings")
    return source.patched


def _bad_record(source: Source, why: str) -> BadSource:
    return BadSource(
        "config.json has no usable record of the patch",
        where=source.name,
        why=why,
        remedy="restore config.json as spikepatch or save_pretrained wrote it",
    )


def _plain(source: Source, patched: Any, edits: Mapping[str, Any]) -> tuple[Any, dict[str, _Held]]:
    """The plain model, and what each of its tensors holds; untied only where one tensor would have to hold two values.

    Raises:
        Refused: it is not the patched model then, or a table cannot be told from the head's.
    """
    for tied in dict.fromkeys((source.config.tie_word_embeddings, False)):
        config = as_read(source.config, {"tie_word_embeddings": tied})
        plain = build(source.model_class, config, where=source.name)
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


def _held(plain: nn.Module, patched: nn.Module, edits: Mapping[str, Any]) -> dict[str, _Held] | str:
    """Tensor of the plain model -> what it holds; or the name of one that would have to hold two things."""
    known = _first_names(patched)
    found: dict[str, _Held] = {}
    for name, first in _first_names(plain).items():
        module, _, _ = name.rpartition(".")
        value: _Held = known[name]
        if module in edits and edits[module].keys() != {"gradient"}:
            owns = any(other.startswith(f"{module}.norm.") for other in known)
            value = _Rows(known[name], json.dumps(edits[module], sort_keys=True), module if owns else "")
        if found.setdefault(first, value) != value:
            return first
    return found


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> the first one; a buffer's -> itself."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: name for name in model.state_dict()}
    return names | {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def _proven(plain: nn.Module, patched: nn.Module, held: Mapping[str, Hashable], edits: Mapping[str, Any]) -> bool:
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


def _step(module: nn.Module, edit: Any) -> tuple[Trace, Node]:
    """What ``edit`` does behind a lookup, recorded on a plain embedding of the same size; and the lookup itself."""
    table: Any = module.weight
    rows, width = table.shape
    alone = nn.Embedding(rows, width, device="meta", dtype=table.dtype)
    change_output(alone, edit)
    graph = forward_of(alone, {"input": torch.zeros(1, 1, dtype=torch.long)})
    return graph, next(node for node in graph.graph.nodes if op(node) in LOOKUPS)


def _shards(source: Source, plain: Any, held: Mapping[str, _Held], match: Match, edits: Mapping[str, Any]) -> Shards:
    assert source.checkpoint is not None
    targets = {target.name: target for target in layout(skeleton(plain))}
    entries: dict[str, TensorEntry] = {}
    folded: dict[str, _Rows] = {}
    for target in targets.values():
        value = held[target.owner]
        if isinstance(value, _Rows):
            folded[target.name] = value
        name = value.table if isinstance(value, _Rows) else value
        whole = match.owners.get(name)
        entries[target.name] = match.targets[target.name] if whole is None else whole
    tensors = tuple(Planned(name, _dtype(entries[name]), target.shape) for name, target in targets.items())

    def produce(name: str) -> torch.Tensor:
        table = read_tensor(entries[name])
        if name not in folded:
            return table
        rows = folded[name]
        return _folded(table, json.loads(rows.edit), lambda own: read_tensor(match.owners[f"{rows.module}.{own}"]))

    return Shards(
        tensors,
        as_in(source.checkpoint, tensors, entries),
        fills={},
        kept={name: entry for name, entry in entries.items() if name not in folded},
        produce=produce,
    )


def _dtype(entry: TensorEntry) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DTYPES[entry.dtype][0])
    return dtype


@torch.no_grad()
def _folded(table: torch.Tensor, edit: Any, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """What the patched embedding returns for each row, (rows, width), in the table's dtype.

    Args:
        read: name of a parameter of the added norm -> its value.
    """
    rows, width = table.shape
    module = nn.Embedding(rows, width, _weight=table, _freeze=True)
    change_output(module, edit)
    for name, parameter in module.named_parameters():
        if name != "weight":
            parameter.copy_(read(name))
    result = torch.empty_like(table)
    for ids in torch.split(torch.arange(rows), _ROWS):
        result[ids] = module(ids)
    return result


def _notes(shards: Shards, match: Match, edits: Mapping[str, Any]) -> Iterator[str]:
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in shards.tensors if t.dtype.is_floating_point})
    yield f"run in {' and '.join(dtypes)}, as stored, its logits are the patched model's; in a narrower dtype, rounded"
    if any(edit.keys() != {"gradient"} for edit in edits.values()):
        yield "for use, not for training on: Adam's step relative to the size of an embedding row is another one now"
    if match.unused:
        yield f"{len(match.unused)} tensors of the source are not part of the architecture and left out"


def _texts(source: Source, plain: Any, result: Folded) -> dict[str, str]:
    config: Any = copy.deepcopy(plain.config)
    config.dtype = source.config.dtype
    config.architectures = [result.architecture]
    card = source.folder / MODEL_CARD if source.folder else None
    inherited = inherited_metadata(card, source.name if source.kind == "hub" else None)
    return {
        "config.json": json.dumps(json.loads(config.to_json_string()), indent=2, sort_keys=True) + "\n",
        MODEL_CARD: fold_card(
            result.tables,
            trust=result.trust,
            auto_class=result.auto_class,
            title=source.short_name,
            inherited=inherited,
        ),
    }
