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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikepatch.apply.disk.manifest import MANIFEST, command_line, fold_card, fold_manifest, inherited_metadata
from spikepatch.apply.disk.publish import check_local_target, check_space, check_target, publishing, unwritable
from spikepatch.apply.disk.write import write_text
from spikepatch.apply.folder import notes
from spikepatch.apply.folder.load_test import Wanted, check_loads, outcome
from spikepatch.apply.folder.loader import loader
from spikepatch.apply.folder.plain_model import Holds, Rows, fold_shards, plain_model
from spikepatch.apply.folder.shards import Shards, write_folder
from spikepatch.apply.generated.patched_source import build_as_it_is
from spikepatch.apply.generated.render import check_generated
from spikepatch.errors import Refused
from spikepatch.plans.plan import DetachEmbedding, EmbeddingEdit, recorded_edit
from spikepatch.progress import Progress, silent
from spikepatch.recipes.plan_of import check_weights
from spikepatch.source.classes import original_in
from spikepatch.source.config import Recorded
from spikepatch.source.local import target_path, without_place
from spikepatch.source.match import Match, match_source
from spikepatch.source.open import MODEL_CARD, Source, open_source
from spikepatch.source.tokenizer import has_tokenizer


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
        """Plain data, as ``--json`` prints it."""
        return dataclasses.asdict(self) | {"out": str(self.out)}


def fold(
    trained: str,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    load_test: bool = True,
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
        allow_nonfinite: keep weights that are NaN or infinite, instead of refusing them; not in a table that is folded.
        overwrite: replace a folder at ``out``.
        load_test: before the folder appears, let a fresh process load it, and compare; as ``convert`` does.
        progress: told of long steps.

    Raises:
        Refused: the model is plain already, or what was patched cannot be folded exactly; with the reason.
        SpikepatchError: it cannot be read or written.
    """
    report: Progress = progress or silent
    folder = target_path(out)
    check_local_target(folder, trained, overwrite=overwrite)
    with loader(load_test) as process:
        report("reading the source")
        found = open_source(
            trained, revision=revision, trust_remote_code=trust_remote_code, weights=True, learned=True, report=report
        )
        check_target(folder, found.folder, overwrite=overwrite)
        record = _record(found)
        check_weights(found, "none")

        report("proving that it folds")
        patched = build_as_it_is(found)
        edits = {
            name: recorded_edit(name, entry, patched.get_submodule(name).embedding_dim)
            for name, entry in record.embeddings.items()
        }
        plain, held = plain_model(found, patched, edits)
        match = match_source(found, patched)
        shards = fold_shards(found, plain, held, match)
        result = Folded(
            out=folder,
            architecture=type(plain).__name__,
            auto_class=found.auto_class,
            trust=found.needs_code,
            tables=tuple(name for name, value in held.items() if isinstance(value, Rows)),
            untied=_ties(found.config) and not _ties(plain.config),
            parameters=shards.elements,
            bytes=shards.bytes,
            notes=(*_notes(shards, match, edits.values()), *_folded_tables(held)),
        )
        wanted = Wanted(plain, type(plain).__name__, found.auto_class, found.needs_code, unsound=allow_nonfinite)
        try:
            with publishing(folder, overwrite=overwrite) as scratch:
                check_space(folder, shards.bytes, found.checkpoint)
                texts = _texts(found, plain, result)
                written, origin = write_folder(scratch, shards, texts, found, report, allow_nonfinite=allow_nonfinite)
                command = command_line(
                    ("fold", without_place(trained), "OUT"),
                    revision=revision,
                    trust_remote_code=trust_remote_code,
                    allow_nonfinite=allow_nonfinite,
                    no_load_test=not load_test,
                )
                if process is not None:
                    report("loading what was written")
                    check_loads(process, scratch, wanted, tokenizer=has_tokenizer(found.copied_files), out=folder)
                test = outcome(process, wanted)
                write_text(scratch / MANIFEST, fold_manifest(record.entries, origin, command, written.hashes, test))
        except OSError as error:
            raise unwritable(folder, error) from error
        unsound = notes.unsound_values(written.tallies, str(found.config.dtype).removeprefix("torch."))
        return dataclasses.replace(
            result, notes=(*result.notes, *unsound, *written.notes, *notes.load_test(test, asked=load_test))
        )


def _ties(config: Any) -> bool:
    """A config of several parts may say nothing of it."""
    return bool(getattr(config, "tie_word_embeddings", False))


def _record(source: Source) -> Recorded:
    if source.patched is None or not source.patched.as_code:
        raise Refused(
            what="there is nothing to fold",
            where=source.name,
            why="it is a plain architecture, which loads without custom code"
            + (" (its factor is a setting of its config)" if source.patched and source.patched.embeddings else ""),
            remedy="use it as it is; fold takes what a patched model's save_pretrained wrote",
        )
    assert source.folder is not None
    check_generated(source.folder, original_in(source))
    return source.patched


def _notes(shards: Shards, match: Match, edits: Iterable[EmbeddingEdit]) -> Iterator[str]:
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in shards.tensors if t.dtype.is_floating_point})
    yield f"run in {' and '.join(dtypes)}, as stored, its logits are the patched model's; in a narrower dtype, rounded"
    if not all(isinstance(edit, DetachEmbedding) for edit in edits):
        yield "for use, not for training on: Adam's step relative to the size of an embedding row is another one now"
    if match.unused:
        yield f"{len(match.unused)} tensors of the source are not part of the architecture and left out"


def _folded_tables(held: Mapping[str, Holds]) -> Iterator[str]:
    """What has become of the rows of each table that is not as it was."""
    for name, rows in held.items():
        if isinstance(rows, Rows):
            yield f"{name}: its rows are the embedding's {rows.edit.words} now"


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
            tokenizer=has_tokenizer(source.copied_files),
            title=source.short_name,
            inherited=inherited,
        ),
    }
