"""What a patched model runs on: embeddings with a factor, a norm or a detached gradient, and the stds of fresh weights.

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
AnyEntry = TypeVar("AnyEntry")


class EmbeddingRecord(TypedDict, total=False):
    """``{"factor": 7.35}``, ``{"factor": "sqrt(width)"}``, ``{"norm": "rmsnorm", "eps": 1e-05, "affine": true}`` or
    ``{"gradient": 0.1}``.
    """

    factor: float | str
    norm: str
    eps: float
    affine: bool
    gradient: float


_KEYS = ({"factor"}, {"norm", "eps", "affine"}, {"gradient"})
_NORMS: dict[str, Any] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


class FillRecord(TypedDict):
    """How to draw the parameter of this name, or every parameter with this ``pattern``; the name wins.

    ``distribution`` is ``normal``, with ``size`` for its std; ``truncated``, the same cut off at ``cut`` sizes; or
    ``uniform``, up to ``size``. ``std`` is what comes out. Both go as fan^(-1/2) * S^depth, where ``fan`` is the width
    of the stream, or the sum of the parameter's lengths along ``axes`` where there are some; 0: they do not.
    """

    parameter: str
    distribution: str
    std: float
    size: float
    cut: float
    fan: int
    axes: list[int]
    depth: float
    stream: int


class ConstantRecord(TypedDict):
    """Every element is value + offset, with value ~ S^depth. ``parameter`` as in ``FillRecord``."""

    parameter: str
    value: float
    offset: float
    depth: float
    stream: int


class StreamRecord(TypedDict):
    """A residual stream at the time of planning. ``sublayers`` match one parameter of each of its ``count``
    sub-layers; those that match the first are ``width`` long along ``axis``.
    """

    width: int
    axis: int
    count: int
    sublayers: list[str]


class InitRecord(TypedDict):
    """The values of fresh parameters, and the streams by whose width and depth they go."""

    streams: list[StreamRecord]
    fills: list[FillRecord]
    constants: list[ConstantRecord]


class PatchRecord(TypedDict):
    """``config.spikepatch``. Modules and parameters are named as in the full model, with its head.

    ``original``: the entries of config.json that were replaced, as they were (None: absent). No model reads it.
    """

    version: str
    recipe: str
    reinit: str
    seed: int
    no_decay: list[str]
    embeddings: dict[str, EmbeddingRecord]
    init: InitRecord | None
    original: dict[str, Any]


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
    """``norm(E[ids])``."""

    norm: nn.LayerNorm | nn.RMSNorm

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        normed: torch.Tensor = self.norm(super().forward(*args, **kwargs))
        return normed


class DetachedEmbedding(PatchedEmbedding):
    """``E[ids]``, through which ``gradient_share`` of the gradient flows back; equal to it, but for the sign of zeros.

    A head that shares the matrix has its own, whole gradient on it.
    """

    gradient_share: float

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = super().forward(*args, **kwargs)
        still = rows.detach()
        return still + self.gradient_share * (rows - still)


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


def norm_output(module: nn.Embedding, eps: float, kind: str = "layernorm", affine: bool = True) -> None:
    """Put a norm over what ``module`` returns, as its new child ``norm``; in place, as ``scale_output``.

    Args:
        kind: ``layernorm`` or ``rmsnorm``.
        affine: with a gain and, for a LayerNorm, a bias.

    Raises:
        ValueError: see ``check_patchable``.
    """
    check_patchable(module)
    like = {"device": module.weight.device, "dtype": module.weight.dtype}
    norm = _NORMS[kind](module.embedding_dim, eps=eps, elementwise_affine=affine, **like)
    _become(module, NormedEmbedding)
    module.norm = norm


def detach_output(module: nn.Embedding, gradient: float) -> None:
    """Let ``gradient`` times the gradient through ``module``; in place, as ``scale_output``.

    Raises:
        ValueError: see ``check_patchable``.
    """
    check_patchable(module)
    _become(module, DetachedEmbedding)
    module.gradient_share = float(gradient)  # type: ignore[assignment]


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
    targets: dict[nn.Embedding, EmbeddingRecord] = {}
    for full_name, edit in edits.items():
        name = full_name.removeprefix(prefix)
        if name not in modules:
            raise ValueError(f"{type(model).__name__} has no module {name}, which config.spikepatch wants to patch")
        check_patchable(modules[name], name)
        if edit.keys() not in _KEYS or edit.get("norm", "layernorm") not in _NORMS:
            raise ValueError(f"config.spikepatch has an edit for {name} that this version does not know: {edit}")
        targets[modules[name]] = edit
    for module, edit in targets.items():
        change_output(module, edit)


def change_output(module: nn.Embedding, edit: EmbeddingRecord) -> None:
    """Apply one edit to one embedding; in place, as ``scale_output``."""
    if "factor" in edit:
        factor = edit["factor"]
        scale_output(module, math.sqrt(module.embedding_dim) if factor == "sqrt(width)" else float(factor))
    elif "norm" in edit:
        norm_output(module, edit["eps"], edit["norm"], edit["affine"])
    else:
        detach_output(module, edit["gradient"])


def patched_embeddings(model: nn.Module) -> dict[str, Any]:
    """Name -> module, of all that was changed in place."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "is_spikepatched")}


def keep_patched(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Put the modules of ``before`` back where others took their places that share the matrix and are not changed, as
    happens when the vocabulary of an encoder-decoder is resized.

    Raises:
        ValueError: an embedding with another matrix was put there; the old ones are back.
    """
    lost = []
    for name, module in before.items():
        place, _, attribute = name.rpartition(".")
        now: Any = model.get_submodule(name)
        if now is not module and not hasattr(now, "is_spikepatched"):
            if getattr(now, "weight", None) is not module.weight:
                lost.append(name)
            module.num_embeddings = len(module.weight)
            setattr(model.get_submodule(place), attribute, module)
    if lost:
        raise ValueError(f"a new embedding at {', '.join(lost)} would lose what config.spikepatch says of the old one")


@torch.no_grad()
def initialise(model: nn.Module, record: Mapping[str, object] | None) -> None:
    """Write every parameter that the recipe gives a value and that holds no loaded one; norms of embeddings as well.

        std_now = std * sqrt(fan / fan_now) * (S_now / S)^depth

    where ``fan`` and S are the recorded ones, ``fan_now`` and ``S_now`` this model's, so a config with another number
    of layers or another width gets the stds that the recipe would give it. Other parameters keep what the
    architecture's own initialiser gave them.

    Raises:
        ValueError: no record, or its patterns match nothing in ``model``; or it has a std for every layer by itself,
            and ``model`` has more layers.
    """
    init = _checked(model, record)["init"]
    for module in model.modules():
        norm = getattr(module, "norm", None) if hasattr(module, "is_spikepatched") else None
        if norm is not None:
            for name, parameter in norm.named_parameters():
                initialization.constant_(parameter, first_value(name))
    # Before the head is tied it has a tensor of its own, and after that two names.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # The second condition holds also where a quantiser has renamed them.
    if init is None or all(getattr(parameter, "_is_hf_initialized", False) for parameter in parameters.values()):
        return
    prefix = _missing_prefix(model)
    fills = {fill["parameter"].removeprefix(prefix): fill for fill in init["fills"]}
    constants = {constant["parameter"].removeprefix(prefix): constant for constant in init["constants"]}
    streams = [_stream_now(stream, parameters, prefix) for stream in init["streams"]]
    if not any(streams) or not any(_entry(name, fills) or _entry(name, constants) for name in parameters):
        raise ValueError(f"no parameter of {type(model).__name__} matches the patterns of config.spikepatch['init']")
    by_layer = {pattern(name) for name in (*fills, *constants) if pattern(name) != name}
    for name, parameter in parameters.items():
        fill, constant = _entry(name, fills), _entry(name, constants)
        if fill is not None:
            _draw(parameter, fill, *streams[fill["stream"]])
        elif constant is not None:
            _, deeper = streams[constant["stream"]]
            value = constant["value"] * deeper ** constant["depth"] + constant["offset"]
            initialization.constant_(parameter, value)
        elif pattern(name) in by_layer and any(deeper > 1 for _, deeper in streams):
            raise ValueError(f"{name}: the recipe has a std for every layer by itself, and the config more layers now")
        else:
            continue
        # transformers' own mark of a value that later initialisation must respect.
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def _stream_now(stream: StreamRecord, parameters: Mapping[str, nn.Parameter], prefix: str) -> tuple[int, float]:
    """The width of a stream in this model, and S over the recorded S; as recorded where it is not part of the model."""
    sublayers = [name.removeprefix(prefix) for name in stream["sublayers"]]
    found = [name for name in parameters if pattern(name) in sublayers]
    first = next((name for name in found if pattern(name) == sublayers[0]), None)
    if first is None:
        return stream["width"], 1.0
    return parameters[first].shape[stream["axis"]], len(found) / stream["count"]


def _entry(name: str, entries: Mapping[str, AnyEntry]) -> AnyEntry | None:
    return entries.get(name, entries.get(pattern(name)))


def _draw(parameter: nn.Parameter, fill: FillRecord, width: int, deeper: float) -> None:
    size = fill["size"] * deeper ** fill["depth"]
    if fill["fan"]:
        fan = sum(parameter.shape[axis] for axis in fill["axes"]) or width
        size *= math.sqrt(fill["fan"] / fan)
    if fill["distribution"] == "normal":
        initialization.normal_(parameter, mean=0.0, std=size)
    elif fill["distribution"] == "truncated":
        bound = fill["cut"] * size
        initialization.trunc_normal_(parameter, mean=0.0, std=size, a=-bound, b=bound)
    else:
        initialization.uniform_(parameter, -size, size)


def first_value(name: str) -> float:
    """Of an added norm's parameter: gain 1, bias 0."""
    return 1.0 if name == "weight" else 0.0


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


def _checked(model: nn.Module, record: Mapping[str, object] | None) -> PatchRecord:
    if not isinstance(record, Mapping):
        raise ValueError(f"{type(model).__name__} needs config.spikepatch, the record of what was patched")
    return cast(PatchRecord, record)


def _missing_prefix(model: nn.Module) -> str:
    """What precedes the names of a headless model's modules in the full model."""
    prefix: Any = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and not hasattr(model, prefix) else ""
