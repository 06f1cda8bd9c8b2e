"""Where a model comes from: a hub id, a local folder, or ``arch:TYPE``."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spikepatch.errors import BadSource
from spikepatch.progress import Progress
from spikepatch.source import hub
from spikepatch.source.checkpoint import Checkpoint, inside, read_checkpoint
from spikepatch.source.config import Architecture, Recorded, default_architecture, read_architecture
from spikepatch.source.formats import (
    INDEX_FILE,
    LFS_POINTER,
    PICKLES,
    SINGLE_FILE,
    check_names,
    foreign_weights,
    parse_json,
)
from spikepatch.source.header import MalformedError
from spikepatch.source.local import NO_UTF8, in_utf8, is_path, local_path, opened, read_file, without_place
from spikepatch.source.redirects import check_files, check_tokenizer, code_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Not copied: the output has a card of its own, which inherits from the source's.
MODEL_CARD = "README.md"

#: What goes into an output byte for byte. An allow-list: code and pickles have no way in.
_COPIED = (
    "tokenizer*.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model as it was found; nothing of it is loaded but the config.

    Attributes:
        name: as the user gave it.
        kind: which of the three it is; ``arch`` for ``arch:TYPE``.
        folder: the local folder, or the Hub snapshot; None for ``arch:TYPE``.
        config, model_class: the class takes the config.
        auto_class: name of the class in transformers whose ``from_pretrained`` gives a ``model_class``.
        revision: as the user gave it, for a hub id.
        commit: the Hub's commit hash that it stands for.
        checkpoint: the checked headers of the weights; None when they were not asked for or there are none.
        has_weights: there are learned weights, fetched or not; taken for granted for a Hub model out of the cache.
        copied_files: tokenizer, generation config, chat templates and licence, all below ``folder``; and the Python
            files, where the model is built from its own.
        needs_code: the model is built from Python files that came with it.
        patched: of a folder that spikepatch has written, what its config records. ``config`` and ``model_class`` are
            then those of the model that was patched, and the folder's own classes are not looked at.
    """

    name: str
    kind: Literal["hub", "folder", "arch"]
    folder: Path | None
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    auto_class: str
    revision: str | None = None
    commit: str | None = None
    checkpoint: Checkpoint | None = None
    has_weights: bool = False
    copied_files: tuple[Path, ...] = ()
    needs_code: bool = False
    patched: Recorded | None = None

    @property
    def short_name(self) -> str:
        """The name without the folders that lead to it."""
        return without_place(self.name) if self.kind == "folder" else self.name

    def arriving(self) -> contextlib.AbstractContextManager[None]:
        """Files of weights that are not there yet are fetched while the block runs; at its end all are there."""
        return contextlib.nullcontext() if self.checkpoint is None else self.checkpoint.arrivals.meanwhile()

    def fetch_weights(self) -> None:
        """Return once all files of weights are there; for what reads the whole folder."""
        with self.arriving():
            pass


def open_source(
    spec: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool,
    learned: bool = False,
    report: Progress | None = None,
) -> Source:
    """Find a model, and check all that can be checked without loading it.

    Args:
        spec: ``arch:TYPE``, a folder, or a hub id.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: the Python files that come with the model may be run.
        weights: check the headers of the weights. Of a hub id, the headers are all that is fetched of them; a file
            comes when a tensor of it is read, or by ``Source.arriving``. Without it no weight file is requested or
            opened.
        learned: only a trained model will do; the remedies offer no other.
        report: told (step, bytes done, bytes in all) while a file of weights is waited for.

    Raises:
        BadSource: the source is missing, malformed, out of reach, or of a kind that is never opened.
        Refused: it needs code that is not trusted, is quantised, or is no architecture that can be built.
    """
    if not spec:
        raise BadSource(
            "there is no source",
            where="SOURCE",
            why="it is empty, as a variable is that is not set",
            remedy="give a folder, a hub id such as org/name, or arch:TYPE",
        )
    is_arch, here = spec.startswith("arch:"), is_path(spec)
    if not in_utf8(spec):
        raise BadSource("cannot be opened", where=repr(spec), why=NO_UTF8, remedy="rename it, or give a link to it")
    if revision is not None and (is_arch or here):
        raise BadSource(
            f"has no revision {revision!r}",
            where=spec,
            why="only models on the Hub have revisions",
            remedy="leave out --revision, or give a hub id",
        )
    if is_arch:
        found = default_architecture(spec.removeprefix("arch:"), where=spec)
        return Source(spec, "arch", None, found.config, found.model_class, found.auto_class)
    if here or not hub.may_be_id(spec):
        return _local_folder(spec, local_path(spec), trust_remote_code, weights, learned)
    return _hub_model(spec, revision, trust_remote_code, weights, learned, report)


def with_weights(source: Source) -> Source:
    """The same source, the headers of its weights checked as well; see ``open_source``."""
    if source.checkpoint is not None or not source.has_weights:
        return source
    if source.kind == "folder" and source.folder is not None:
        return dataclasses.replace(source, checkpoint=read_checkpoint(source.folder))
    opened = open_source(source.name, revision=source.commit, trust_remote_code=source.needs_code, weights=True)
    return dataclasses.replace(source, checkpoint=opened.checkpoint)


def build_meta(source: Source) -> PreTrainedModel:
    """The source's model in eval mode: parameters on meta in the config's dtype, buffers real, tied weights tied, but
    for those that its checkpoint stores with different values.

    Raises:
        Refused: the model cannot be built from its config.
    """
    from spikepatch.source import meta

    model = meta.build_meta(source.model_class, source.config, where=source.name)
    if source.checkpoint is not None:
        from spikepatch.source.apart import untie_stored  # imports torch

        untie_stored(model, source.checkpoint)
    return model


def _local_folder(spec: str, folder: Path, trusted: bool, weights: bool, learned: bool) -> Source:
    if not os.path.isdir(folder):
        raise hub.no_folder(spec, learned=learned)
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise _unreadable(spec, error) from error
    names |= {path.relative_to(folder).as_posix() for path in folder.glob("*/*.jinja")}
    if "config.json" not in names:
        raise hub.no_config(names, spec)
    check_files(names, spec)
    check_tokenizer(folder, spec)
    found = read_architecture(folder, where=spec, trusted=trusted)
    has_weights = _has_weights(names)
    return Source(
        spec,
        "folder",
        folder,
        found.config,
        found.model_class,
        found.auto_class,
        checkpoint=read_checkpoint(folder) if weights and has_weights else None,
        has_weights=has_weights,
        copied_files=_copied_files(folder, names, found),
        needs_code=found.needs_code,
        patched=found.patched,
    )


def _hub_model(
    spec: str, revision: str | None, trusted: bool, weights: bool, learned: bool, report: Progress | None
) -> Source:
    snapshot = hub.locate(spec, revision, learned=learned)
    names = snapshot.files
    check_files(names, spec)
    code = [name for name in names if name.endswith(".py")]
    if trusted:
        hub.fetch(snapshot, code)
    found = read_architecture(snapshot.folder, where=spec, trusted=trusted)
    if found.patched is not None:
        hub.fetch(snapshot, code)  # to be compared, not to be run
    has_weights = _has_weights(names) or not snapshot.online
    if weights and has_weights:
        if not snapshot.online and not _has_weights(names):
            raise hub.not_reachable(spec, None, "its weights cannot be fetched, and are not")
        check_names(names, spec)
    hub.fetch(snapshot, [*_to_copy(names), *({MODEL_CARD} & names)])
    check_tokenizer(snapshot.folder, spec)
    checkpoint = None
    if weights and has_weights:
        if SINGLE_FILE not in names:
            hub.fetch(snapshot, [INDEX_FILE])
        checkpoint = read_checkpoint(snapshot.folder, snapshot if snapshot.online else None, report)
    return Source(
        spec,
        "hub",
        snapshot.folder,
        found.config,
        found.model_class,
        found.auto_class,
        revision,
        snapshot.commit,
        checkpoint=checkpoint,
        has_weights=has_weights,
        copied_files=_copied_files(snapshot.folder, names, found),
        needs_code=found.needs_code,
        patched=found.patched,
    )


def _has_weights(names: Iterable[str]) -> bool:
    top_level = {name for name in names if "/" not in name}
    return bool({SINGLE_FILE, INDEX_FILE} & top_level) or bool(foreign_weights(top_level))


def _to_copy(names: Iterable[str]) -> list[str]:
    def wanted(name: str) -> bool:
        return any(name.count("/") == p.count("/") and fnmatch.fnmatchcase(name, p) for p in _COPIED)

    return sorted(filter(wanted, names))


def _copied_files(folder: Path, names: Iterable[str], found: Architecture) -> tuple[Path, ...]:
    files = _code_files(folder, found.config) if found.needs_code else []
    pointers = []
    problems = []
    for path in (*files, *(folder / name for name in _to_copy(names))):
        try:
            if not os.path.lexists(path) or os.path.isdir(path):
                continue
            if inside(folder, path.relative_to(folder).as_posix()) in files:
                continue
        except MalformedError as error:
            problems.append(f"{path.name} {error.problem}")
            continue
        try:
            with opened(path) as file:
                head = file.read(len(LFS_POINTER))
        except OSError as error:
            raise _unreadable(str(path), error) from error
        if head == LFS_POINTER:
            pointers.append(path.name)
        elif not head.startswith(PICKLES):  # `*.model` is a sentencepiece vocabulary, and sometimes is not
            files.append(path)
    if problems:
        raise BadSource(
            "has files that lie elsewhere or are none",
            where=str(folder),
            why="; ".join(problems),
            remedy="replace the links by the files, if those are what the output is to hold; move away what is no file",
        )
    if pointers:
        raise BadSource(
            f"holds git-lfs pointers in place of files: {', '.join(pointers)}",
            where=str(folder),
            why="the repository was cloned without git-lfs",
            remedy="run `git lfs pull` in the folder",
        )
    return tuple(files)


def _code_files(folder: Path, config: Any) -> list[Path]:
    """The Python files that ``auto_map`` names, in config.json or tokenizer_config.json, and those that they import."""
    from transformers.dynamic_module_utils import get_relative_import_files

    names = code_files({"auto_map": getattr(config, "auto_map", {})})
    with contextlib.suppress(OSError, ValueError):  # a tokenizer without a usable config of its own
        names += code_files(parse_json(read_file(folder / "tokenizer_config.json", within=folder)))
    files = [folder / name for name in names if (folder / name).is_file()]
    return sorted({path for file in files for path in (file, *map(Path, get_relative_import_files(file)))})


def _unreadable(where: str, error: OSError) -> BadSource:
    return BadSource(
        "cannot be read",
        where=where,
        why=error.strerror or str(error),
        remedy="check what it is, who may read it, and the disk; or move it away",
    )
