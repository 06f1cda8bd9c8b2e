"""A live transformers model becomes an instance of the generated class, so that whatever it saves loads patched."""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikepatch.apply.disk.atomic import locked
from spikepatch.apply.generated.render import completed, config_entries, module_name, original_entries, render
from spikepatch.runtime.embedding import install
from spikepatch.source.classes import Original, carried_files, class_name, original_of
from spikepatch.source.private import mark_initialised


@dataclass(frozen=True)
class Generated:
    """The classes of a generated file, imported; ``base`` is None where the architecture has none."""

    model: type
    base: type | None
    config: type


@functools.cache
def generated_classes(original: Original) -> Generated:
    """Import the rendered files as transformers imports remote code: from real files, which are copied on save.

    Raises:
        Refused: see ``render``.
    """
    from transformers.dynamic_module_utils import HF_MODULES_CACHE, get_class_from_dynamic_module

    module = module_name(original)
    originals = {
        "AutoConfig": original.config,
        "AutoModel": original.base,
        original.auto_class: original.model,
    }
    classes: dict[str, type] = {}
    cache = Path(HF_MODULES_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    # The ranks of a distributed run write the same files at the same time, and transformers does not lock.
    with locked(cache / "spikepatch.lock", wait=True), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / module
        folder.mkdir()
        for name, text in render(original).items():
            (folder / name).write_text(text, encoding="utf-8")
        for file in carried_files(original):
            shutil.copyfile(file, folder / file.name)
        for auto_class, parent in originals.items():
            if parent is not None:
                cls: Any = get_class_from_dynamic_module(f"{module}.{class_name(parent)}", folder)
                cls.register_for_auto_class(auto_class)
                classes[auto_class] = cls
    return Generated(classes[original.auto_class], classes.get("AutoModel"), classes["AutoConfig"])


def adopt(model: Any, record: Mapping[str, Any]) -> None:
    """Patch the embeddings of ``model`` as ``record`` says, and make it an instance of the generated class, in place.

    Parameters keep their identity, tied heads stay tied, and no weight is changed. From here on ``save_pretrained``,
    also when a Trainer calls it, writes the code beside the weights.

    Args:
        model: a model of transformers, with weights that nothing needs to initialise again.
        record: plain JSON, as ``spikepatch.runtime.embedding.PatchRecord`` describes it.

    Raises:
        Refused: see ``original_of``.
        ValueError: see ``install``. In both cases the model is as it was.
    """
    config_class = type(model.config)
    original = original_of(type(model), config_class, getattr(model.config, "auto_map", None))
    generated = generated_classes(original)
    entries = config_entries(original)
    replaced = original_entries(original, model.config)
    install(model, record)

    model.__class__ = generated.model
    # Submodules share the config or, in encoder-decoders, hold copies of it.
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if type(config) is not config_class:
            continue
        config.__class__ = generated.config
        config.spikepatch = completed(copy.deepcopy(record), original, replaced)
        config.auto_map = dict(entries["auto_map"])
        config.architectures = list(entries["architectures"])
        if getattr(config, "tokenizer_class", None) is None:
            config.tokenizer_class = entries["tokenizer_class"]
    for parameter in model.parameters():
        mark_initialised(parameter)
