"""What a patched model runs on: embeddings with a factor or a norm, and a recipe's stds for fresh weights.

A checkpoint that needs code carries a verbatim copy of this file beside its modelling file, for processes where
spikepatch is not installed. So it imports torch and transformers only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict, TypeVar, cast

import torch
from torch import nn
from transformers import initialization
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

AnyModel = TypeVar("AnyModel")


class EmbeddingEdit(TypedDict, total=False):
    """``{"factor": 7.35}``, ``{"factor": "sqrt(width)"}`` or ``{"norm": "layernorm", "eps": 1e-05}``."""

    factor: float | str
    norm: str
    eps: float


class Fill(TypedDict):
    """N(0, std^2) for the parameter of this name, or for every parameter with this ``pattern``; the name wins."""

    parameter: str
    std: float
    residual: bool


class Init(TypedDict):
    """The fills of a model of this width and sub-layer count; ``sublayers`` match one parameter of each sub-layer."""

    width: int
    sublayers: list[str]
    count: int
    fills: list[Fill]


class Record(TypedDict):
    """``config.spikepatch``. Modules and parameters are named as in the full model, with its head."""

    version: str
    recipe: str
    reinit: str
    seed: int
    embeddings: dict[str, EmbeddingEdit]
    init: Init | None


class PatchedEmbedding(nn.Embedding):
    """The mark of an embedding that was changed in place. The mark is an attribute: copies of this file share it."""

    is_spikepatched: ClassVar[bool] = True


class ScaledEmbedding(PatchedEmbedding):
    """``embed_scale * E[ids]``.

    The factor is a Python float: a buffer would be rounded to the model's dtype, or, if not persistent, hold garbage
    after ``from_pretrained``. PEFT looks for the name ``embed_scale``.
    """

    embed_scale: float

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs) * self.embed_scale


class RescaledEmbedding(PatchedEmbedding):
    """``extra_scale`` times the output of a class whose own forward already uses the name ``embed_scale``."""

    extra_scale: float

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs) * self.extra_scale


class NormedEmbedding(PatchedEmbedding):
    """``LayerNorm(E[ids])``, with gain and bias."""

    norm: nn.LayerNorm

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        normed: torch.Tensor = self.norm(super().forward(*args, **kwargs))
        return normed


def _become(module: Any, patch: type) -> None:
    module.__class__ = _patched_class(patch, type(module))  # type: ignore[arg-type]  # mypy: nn.Module.__hash__


@functools.cache
def _patched_class(patch: type, original: type) -> type:
    """``patch`` in front of ``original`` in the method resolution order, so that its ``super()`` is ``original``."""
    return patch if original is nn.Embedding else type(f"{patch.__name__}Of{original.__name__}", (patch, original), {})


def scale_output(module: nn.Embedding, factor: float) -> None:
    """Multiply what ``module`` returns by ``factor``; in place: parameters, hooks and identity stay.

    Raises:
        ValueError: see ``check_patchable``.
    """
    check_patchable(module)
    if hasattr(module, "embed_scale"):
        _become(module, RescaledEmbedding)
        module.extra_scale = float(factor)  # type: ignore[assignment]
    else:
        _become(module, ScaledEmbedding)
        module.embed_scale = float(factor)  # type: ignore[assignment]


def norm_output(module: nn.Embedding, eps: float) -> None:
    """Put a LayerNorm over what ``module`` returns, as its new child ``norm``; in place, as ``scale_output``.

    Raises:
        ValueError: see ``check_patchable``.
    """
    check_patchable(module)
    norm = nn.LayerNorm(module.embedding_dim, eps=eps, device=module.weight.device, dtype=module.weight.dtype)
    _become(module, NormedEmbedding)
    module.norm = norm


def check_patchable(module: nn.Module, name: str = "the module") -> None:
    """Raise ValueError where a patch would have no effect, or one that nobody asked for."""
    if not isinstance(module, nn.Embedding):
        raise ValueError(f"{name} is a {type(module).__name__}, not an nn.Embedding")
    if hasattr(module, "is_spikepatched"):
        raise ValueError(f"{name} is patched already; a second patch would multiply with the first")
    if "forward" in vars(module):
        raise ValueError(
            f"the forward of {name} was replaced on the instance, as accelerate's hooks do, so a patch would have no "
            "effect; patch before the model is dispatched"
        )
    if hasattr(module, "norm"):
        raise ValueError(f"{name} ({type(module).__name__}) has an attribute `norm` of its own")


def install(model: nn.Module, record: Mapping[str, object] | None) -> None:
    """Apply ``record["embeddings"]`` to a transformers model, with or without its head.

    Raises:
        ValueError: no record; an embedding is missing or cannot be patched. Nothing has been changed then.
    """
    edits = _checked(model, record)["embeddings"]
    prefix = _missing_prefix(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    targets: dict[nn.Embedding, EmbeddingEdit] = {}
    for full_name, edit in edits.items():
        name = full_name.removeprefix(prefix)
        if name not in modules:
            raise ValueError(f"{type(model).__name__} has no module {name}, which config.spikepatch wants to patch")
        check_patchable(modules[name], name)
        if edit.keys() not in ({"factor"}, {"norm", "eps"}) or edit.get("norm", "layernorm") != "layernorm":
            raise ValueError(f"config.spikepatch has an edit for {name} that this version does not know: {edit}")
        targets[modules[name]] = edit
    for module, edit in targets.items():
        if "factor" in edit:
            factor = edit["factor"]
            scale_output(module, math.sqrt(module.embedding_dim) if factor == "sqrt(width)" else float(factor))
        else:
            norm_output(module, edit["eps"])


@torch.no_grad()
def initialise(model: nn.Module, record: Mapping[str, object] | None) -> None:
    """Draw every parameter that the recipe fills and that holds no loaded value, from N(0, std_now^2).

        std_now = std * sqrt(width / width_now) * (sqrt(count / count_now) if residual else 1)

    ``width`` and ``count`` are the recorded ones; ``width_now`` and ``count_now`` are this model's, so a config with
    another number of layers or another width gets the stds that the recipe would give it. Parameters without a fill
    keep what the architecture's own initialiser gave them.

    Raises:
        ValueError: no record, or its patterns match nothing in ``model``.
    """
    init = _checked(model, record)["init"]
    if init is None:
        return
    prefix = _missing_prefix(model)
    sublayers = {name.removeprefix(prefix) for name in init["sublayers"]}
    fills = {fill["parameter"].removeprefix(prefix): fill for fill in init["fills"]}
    # Before the head is tied it has a tensor of its own, and after that two names.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if all(getattr(parameter, "_is_hf_initialized", False) for parameter in parameters.values()):
        return  # also where a quantiser has renamed them
    count_now = sum(pattern(name) in sublayers for name in parameters)
    if not count_now or not any(name in fills or pattern(name) in fills for name in parameters):
        raise ValueError(f"no parameter of {type(model).__name__} matches the patterns of config.spikepatch['init']")
    width_now = getattr(model.config.get_text_config(), "hidden_size", init["width"])  # type: ignore[operator, union-attr]
    for name, parameter in parameters.items():
        fill = fills.get(name, fills.get(pattern(name)))
        if fill is None:
            continue
        std = fill["std"] * math.sqrt(init["width"] / width_now)
        if fill["residual"]:
            std *= math.sqrt(init["count"] / count_now)
        initialization.normal_(parameter, mean=0.0, std=std)
        # transformers' own mark of a value that later initialisation must respect.
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def pattern(parameter: str) -> str:
    """The name with every all-digit component replaced: ``h.3.attn.weight`` -> ``h.*.attn.weight``."""
    return ".".join("*" if part.isdecimal() else part for part in parameter.split("."))


def convert_like_parent(model_class: type[AnyModel]) -> type[AnyModel]:
    """Class decorator: checkpoints of ``model_class`` are converted as those of the class that it derives from.

    transformers looks conversions up (experts fused on load, split on save) by class name and by model type, and for
    classes outside transformers by registered names only. Without them experts would be drawn at random on load.
    """
    config_class: Any = model_class.config_class  # type: ignore[attr-defined]
    original_model, original_config = cast(type, model_class.__base__), config_class.__base__
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


def _checked(model: nn.Module, record: Mapping[str, object] | None) -> Record:
    if not isinstance(record, Mapping):
        raise ValueError(f"{type(model).__name__} needs config.spikepatch, the record of what was patched")
    return cast(Record, record)


def _missing_prefix(model: nn.Module) -> str:
    """What precedes the names of a headless model's modules in the full model."""
    prefix: Any = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and not hasattr(model, prefix) else ""
