"""What the classes of a generated file have in common.

A checkpoint that needs code carries a copy of this file, as of ``embedding.py``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .embedding import install, lookups, lost_embeddings, replace_lookups
from .fresh import initialise, initialise_added

AnyModel = TypeVar("AnyModel")


class Patched:
    """In front of the original class in the method resolution order: the original, with patched embeddings."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        with _as_original(config):
            parent.__init__(config, *args, **kwargs)
        _name_copies(_model(self), config)
        install(_model(self), config.spikepatch)
        _model(self).post_init()

    def initialize_weights(self) -> None:
        parent: Any = super()
        model, loads = _model(self), _is_loaded(self)
        if loads and not _is_of_transformers(self):
            _copy_constructed_buffers(model)
        parent.initialize_weights()
        if loads and _is_of_transformers(self):
            _initialise_containers(model, model)
        initialise(_model(self), self.config.spikepatch)

    def get_input_embeddings(self) -> Any:
        parent: Any = super()
        return lookups(_model(self), parent.get_input_embeddings())

    def set_input_embeddings(self, value: Any) -> None:
        parent: Any = super()
        replace_lookups(_model(self), value, parent.set_input_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it; rows that are added to fresh weights get the recipe's std, unless ``mean_resizing``
        is asked for.
        """
        parent: Any = super()
        before = {name: len(p) for name, p in _model(self).named_parameters(remove_duplicate=False) if p.ndim}
        result = parent.resize_token_embeddings(*args, **kwargs)
        if not kwargs.get("mean_resizing", (*args, False, False, False)[2]):
            initialise_added(_model(self), self.config.spikepatch, before)
        return result

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it.

        Raises:
            ValueError: an embedding was put in the place of a patched one: the folder would claim what it lacks.
        """
        if lost := lost_embeddings(_model(self), self.config.spikepatch):
            raise ValueError(f"the embedding at {', '.join(lost)} is not what config.spikepatch says of it any more")
        parent: Any = super()
        return parent.save_pretrained(*args, **kwargs)


class PatchedSettings:
    """In front of the original config class. It has a constructor of its own: without one transformers makes one, which
    sets the declared fields and leaves the original's constructor out.
    """

    spikepatch: dict[str, Any] | None

    def __init__(self, *args: Any, spikepatch: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spikepatch = spikepatch


def _model(patched: Any) -> Any:
    return patched


def original_class(model_class: type) -> type:
    """The class that a generated one derives from, also through one that torch has derived from that at run time."""
    return next(c for c in model_class.__mro__ if issubclass(c, PreTrainedModel) and not issubclass(c, Patched))


def original_config_class(config_class: type) -> type:
    """The same of a generated config class."""
    return config_class.__mro__[config_class.__mro__.index(PatchedSettings) + 1]


@contextlib.contextmanager
def _as_original(config: Any) -> Iterator[None]:
    """``config`` is one of the original class meanwhile.

    A model that asks an auto class for a part of itself, as transformers' general heads do, gets the original's part,
    and is not asked whether it trusts the generated file that it comes from.
    """
    patched, auto_map = type(config), vars(config).pop("auto_map", None)
    original = (config.spikepatch or {}).get("original", {}).get("auto_map")
    config.__class__ = original_config_class(patched)
    if original is not None:
        config.auto_map = original
    try:
        yield
    finally:
        config.__class__ = patched
        vars(config).pop("auto_map", None)
        if auto_map is not None:
            config.auto_map = auto_map


def _name_copies(model: Any, config: Any) -> None:
    """Copies of the config, which a constructor may keep in its place, are of its class too."""
    original: type = original_config_class(type(config))
    for module in model.modules():
        kept: Any = getattr(module, "config", None)
        kind = type(kept)
        if kind is original:
            kept.__class__, kept.auto_map = type(config), dict(getattr(config, "auto_map", None) or {})


def _is_loaded(model: Any) -> bool:
    """A checkpoint is being loaded: some values are there, and buffers that no checkpoint has are without values."""
    return any(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters())


def _is_of_transformers(model: Any) -> bool:
    return original_class(type(model)).__module__.startswith("transformers.")


def _initialise_containers(module: Any, owner: Any) -> None:
    """Let modules without tensors of their own initialise those below them; values that are loaded stay.

    Of code that is not its own transformers leaves such modules out, though some fill buffers of others.
    """
    for child in module.children():
        _initialise_containers(child, child if isinstance(child, PreTrainedModel) else owner)
    if not [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        owner._init_weights(module)


class _ParametersWithoutMemory(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty:
            options.setdefault("device", "meta")
        return func(*args, **options)


@torch.no_grad()
def _copy_constructed_buffers(model: Any) -> None:
    """Give buffers that no checkpoint has the values that the constructor makes, which ran on the meta device.

    Code from before transformers 5 relies on its constructor for them.
    """
    stored = model.state_dict()
    missing = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    if not missing:
        return
    config, default = copy.deepcopy(model.config), torch.get_default_dtype()
    torch.set_default_dtype(config.dtype or default)
    try:
        with _as_original(config), torch.device("cpu"), _ParametersWithoutMemory(), torch.random.fork_rng(devices=[]):
            constructed = dict(original_class(type(model))(config).named_buffers())
    finally:
        torch.set_default_dtype(default)
    for name, buffer in missing.items():
        if not constructed[name].is_meta:
            buffer.copy_(constructed[name])


def convert_like_parent(model_class: type[AnyModel]) -> type[AnyModel]:
    """Class decorator: checkpoints of ``model_class`` are converted as those of the class that it derives from.

    transformers looks conversions up (experts fused on load, split on save) by class name and by model type, and for
    classes outside transformers by registered names only. Without them experts would be drawn at random on load.
    """
    config_class: Any = model_class.config_class  # type: ignore[attr-defined]
    original_model: Any = original_class(model_class)
    original_config: Any = original_config_class(config_class)
    for name, original_name in (
        (model_class.__name__, original_model.__name__),
        (config_class.model_type, original_config.model_type),
    ):
        mapping = get_checkpoint_conversion_mapping(original_name)
        if mapping is not None:
            register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
    _keep_identity(model_class)
    return model_class


def _keep_identity(model_class: Any) -> None:
    """Classes that torch derives at run time, as ``fully_shard`` does, are saved as ``model_class``.

    ``save_pretrained`` copies the file of ``type(model)`` and writes the class's name into ``auto_map``: those of FSDP.
    """

    def derived(cls: type, /, **arguments: Any) -> None:
        super(model_class, cls).__init_subclass__(**arguments)
        if cls.__module__.partition(".")[0] == "torch":
            cls.__module__, cls.__name__ = model_class.__module__, model_class.__name__

    model_class.__init_subclass__ = classmethod(derived)
