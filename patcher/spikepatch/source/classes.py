"""The classes that a patched model derives from: of transformers, or of the code that came with the model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikepatch.errors import Refused
from spikepatch.source.auto_classes import auto_classes, in_order

if TYPE_CHECKING:
    from spikepatch.source.open import Source

#: The package in which transformers imports the code that comes with a model.
_REMOTE = "transformers_modules."


@dataclass(frozen=True)
class Original:
    """The classes that a generated file derives from: of transformers, or of code that came with the model.

    Attributes:
        model: the class that is patched, with its head if it has one.
        base: the class that ``AutoModel`` gives for the same config; None where that is ``model`` itself.
        config: the config class.
        auto_class: the name of the auto class that loads ``model``.
    """

    model: type
    base: type | None
    config: type
    auto_class: str

    @property
    def model_type(self) -> str:
        model_type: str = self.config.model_type  # type: ignore[attr-defined]
        return model_type

    @property
    def classes(self) -> tuple[type, ...]:
        return tuple(cls for cls in (self.config, self.base, self.model) if cls is not None)


def original_of(
    model_class: type, config_class: type | None = None, auto_map: Mapping[str, Any] | None = None
) -> Original:
    """Look ``model_class`` up in transformers' auto classes, or in the ``auto_map`` of the code that it came with.

    Args:
        model_class: a model class of transformers, or one that it has imported from a model's own files.
        config_class: the config in use; by default, the one that the class declares.
        auto_map: of the config; for a model's own code.

    Raises:
        Refused: the class is patched already, is neither of the two, or no auto class loads it.
    """
    config_class = config_class or getattr(model_class, "config_class", None)
    if config_class is None or not all(map(_is_known, (model_class, config_class))) or _is_generated(model_class):
        raise _not_own(model_class)
    remote = is_remote(model_class)
    heads = _remote_heads(model_class, auto_map or {}) if remote else dict(auto_classes(config_class))
    auto_class = next((name for name, classes in heads.items() if model_class in classes), None)
    if auto_class is None:
        raise Refused(
            what="no auto class of transformers loads this model",
            where=model_class.__name__,
            why="a patched checkpoint that needs code is found through the auto classes",
            remedy="patch the model class that AutoModelForCausalLM or another auto class gives for this config",
        )
    bases = heads.get("AutoModel", ()) if auto_class != "AutoModel" else ()
    return Original(model_class, next((c for c in bases if c is not model_class), None), config_class, auto_class)


def original_in(source: Source) -> Original:
    """``original_of`` for the model of a source."""
    return original_of(source.model_class, type(source.config), getattr(source.config, "auto_map", None))


def carried_files(original: Original) -> list[Path]:
    """The Python files that the generated ones import: those that came with the model, and what they import in turn."""
    from transformers.dynamic_module_utils import get_relative_import_files

    found: dict[str, Path] = {}
    for cls in original.classes:
        if is_remote(cls):
            file = sys.modules[cls.__module__].__file__
            assert file is not None, cls
            found |= {path.name: path for path in map(Path, (file, *get_relative_import_files(file)))}
    return [found[name] for name in sorted(found)]


def stem(cls: type) -> str:
    """Name of the file, without its ending, that a class of a model's own code is in."""
    return cls.__module__.rpartition(".")[2]


def _remote_heads(model_class: type, auto_map: Mapping[str, Any]) -> dict[str, tuple[type, ...]]:
    """``auto_classes`` of code that came with the model: ``module.Class``, or ``repository--module.Class``."""
    package = model_class.__module__.rpartition(".")[0]
    heads: dict[str, tuple[type, ...]] = {}
    for auto_class in in_order(auto_map):
        module, _, name = str(auto_map[auto_class]).rpartition("--")[2].rpartition(".")
        if name == model_class.__name__:
            heads[auto_class] = (model_class,)
        elif auto_class == "AutoModel":
            heads[auto_class] = (getattr(importlib.import_module(f"{package}.{module}"), name),)
    return heads


def class_name(original: type) -> str:
    """The generated class that derives from ``original``."""
    return f"Spikepatch{original.__name__}"


def is_remote(cls: type) -> bool:
    """The class is of code that came with a model."""
    return cls.__module__.startswith(_REMOTE)


def _is_known(cls: type) -> bool:
    return cls.__module__.startswith("transformers.") or is_remote(cls)


def _is_generated(cls: type) -> bool:
    return cls.__name__.startswith("Spikepatch")


def _not_own(model_class: type) -> Refused:
    if _is_generated(model_class):
        return Refused(
            what="the model is patched already",
            where=model_class.__name__,
            why="a second factor or norm would multiply with the first",
            remedy="patch the source that it was made from",
        )
    return Refused(
        what="the model's code is not part of transformers, and did not come with the model",
        where=f"{model_class.__module__}.{model_class.__qualname__}",
        why="the patched checkpoint derives from the model's class: one of transformers, or of files beside its config",
        remedy="load the model with from_pretrained(..., trust_remote_code=True) from a folder whose auto_map names "
        "its code; re-initialisation alone (storage route `plain`) needs no class",
    )
