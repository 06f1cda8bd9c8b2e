"""What a patched model looks its tokens up in: embeddings with a factor, a norm or a detached gradient.

A checkpoint that needs code carries a copy of this file beside its modelling file, for processes where spikepatch is
not installed. So it imports torch and transformers only.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypedDict, cast

import torch
from torch import nn
from transformers import PreTrainedModel


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


class OpaqueEmbedding(PatchedEmbedding):
    """One that does more than to multiply its rows by ``embed_scale``, which is all that PEFT's adapters know of.

    An adapter on it would look rows up in the matrix and leave the rest out: other logits before a step of training,
    and other ones again once it is merged. PEFT asks every layer that it wraps for its size, and learns it there.
    """

    @property
    def num_embeddings(self) -> int:
        if str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0] == "peft":
            raise ValueError(
                f"an adapter on this embedding would leave out what config.spikepatch says of it ({type(self).__name__}"
                "): train the whole embedding with modules_to_save, or leave it out of the adapter"
            )
        return int(vars(self)["num_embeddings"])

    @num_embeddings.setter
    def num_embeddings(self, count: int) -> None:
        vars(self)["num_embeddings"] = count


class RescaledEmbedding(OpaqueEmbedding):
    """``extra_scale`` times the output of a class whose own forward already uses the name ``embed_scale``."""

    extra_scale: float

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs) * self.extra_scale


class NormedEmbedding(OpaqueEmbedding):
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
    edits = checked(model, record)["embeddings"]
    prefix = missing_prefix(model)
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
    guard(model)


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


def lookups(model: nn.Module, table: Any) -> Any:
    """``table``, which ``model`` calls its input embeddings; where no forward pass looks anything up in it, as in T5's
    ``shared``, the patched one with the same matrix: what it returns is what enters the model.
    """
    if hasattr(table, "is_spikepatched"):
        return table
    weight = getattr(table, "weight", None)
    return next((m for m in patched_embeddings(model).values() if weight is not None and m.weight is weight), table)


def replace_lookups(model: nn.Module, value: Any, put: Callable[[Any], object]) -> None:
    """``put(value)``, which is ``model.set_input_embeddings``; patched embeddings stay where it is their matrix, as
    when a vocabulary is resized.

    Raises:
        ValueError: an embedding with another matrix was put there; the old ones are back.
    """
    before = dict(patched_embeddings(model))
    matrices = {id(module.weight) for module in before.values()}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding) and id(module.weight) in matrices:
            before.setdefault(name, module)
    put(value)
    lost = []
    for name, module in before.items():
        now: Any = model.get_submodule(name)
        same = getattr(now, "weight", None) is module.weight
        if now is module or (hasattr(now, "is_spikepatched") and not same):
            continue
        if not same:
            lost.append(name)
        place, _, attribute = name.rpartition(".")
        module.num_embeddings = len(module.weight)
        setattr(model.get_submodule(place), attribute, module)
    if lost:
        raise ValueError(f"a new embedding at {', '.join(lost)} would lose what config.spikepatch says of the old one")


def guard(model: nn.Module) -> None:
    """Make the models inside ``model`` keep their patched embeddings, as its own class does; and those that list their
    tied weights, as before transformers 5, such that transformers can save them. (It builds them untied only.)
    """
    for module in model.modules():
        if isinstance(getattr(module, "_tied_weights_keys", None), (list, tuple)):
            vars(module)["_tied_weights_keys"] = {}
        if module is not model and isinstance(module, PreTrainedModel) and patched_embeddings(module):
            vars(module)["get_input_embeddings"] = functools.partial(_inner_lookups, module)
            vars(module)["set_input_embeddings"] = functools.partial(_replace_inner_lookups, module)


def _inner_lookups(module: Any) -> Any:
    return lookups(module, type(module).get_input_embeddings(module))


def _replace_inner_lookups(module: Any, value: Any) -> None:
    replace_lookups(module, value, functools.partial(type(module).set_input_embeddings, module))


def lost_embeddings(model: nn.Module, record: Mapping[str, object] | None) -> list[str]:
    """Where ``record`` says that an embedding is patched, and what stands there is not, nor wraps one that is."""
    prefix = missing_prefix(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name.removeprefix(prefix) for name in checked(model, record)["embeddings"]]
    return [name for name in names if name not in modules or not patched_embeddings(modules[name])]


def first_value(name: str) -> float:
    """Of an added norm's parameter: gain 1, bias 0."""
    return 1.0 if name == "weight" else 0.0


def pattern(parameter: str) -> str:
    """The name with every all-digit component replaced: ``h.3.attn.weight`` -> ``h.*.attn.weight``."""
    return ".".join("*" if part.isdecimal() else part for part in parameter.split("."))


def checked(model: nn.Module, record: Mapping[str, object] | None) -> PatchRecord:
    """``record``; ValueError where there is none."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{type(model).__name__} needs config.spikepatch, the record of what was patched")
    return cast(PatchRecord, record)


def missing_prefix(model: nn.Module) -> str:
    """What precedes the names of a headless model's modules in the full model."""
    prefix: Any = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and not hasattr(model, prefix) else ""
