"""The size of the residual stream, by one definition, and where it is measured in a running model.

sigma of a token's vector is its std over the width, or its RMS where an RMSNorm reads it: what that norm divides by.
A point's size is the mean of sigma over all tokens. ``convert``, ``check`` and ``train`` print no other.

Hooks are in place for one forward pass only, so that all other steps are as fast as if nothing were watched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from spikepatch.errors import Refused
from spikepatch.residual.inspect import inspect
from spikepatch.residual.map import Norm, NormKind, ResidualMap
from spikepatch.residual.names import layers
from spikepatch.residual.norms import NormNode


def sigma(stream: torch.Tensor, kind: NormKind) -> torch.Tensor:
    """(..., d) -> (...): the RMS of each vector for an ``rmsnorm``, its std for a ``layernorm``; at least float32."""
    wide = stream.float() if stream.dtype.itemsize < 4 else stream
    return wide.square().mean(-1).sqrt() if kind == "rmsnorm" else wide.std(-1, correction=0)


def norm_kind(readers: Iterable[Norm | NormNode], residual: ResidualMap) -> NormKind:
    """The kind of most norms that read a point; where none does, of most of the model's."""
    kinds = [norm.kind for norm in readers] or [norm.kind for norm in residual.norms]
    return "rmsnorm" if kinds.count("rmsnorm") > len(kinds) / 2 else "layernorm"


@dataclass(frozen=True)
class Point:
    """A module whose input is the residual stream; ``kind``: of the norm that decides what sigma is there."""

    module: str
    layer: int | None
    kind: NormKind


@dataclass(frozen=True)
class Points:
    """Where a model is watched, as the residual map tells.

    Attributes:
        streams: in the order of the map.
        layers: path of each block of layers, in order.
        width: length of one token's stream vector.
        notes: what cannot be watched, and why.
    """

    streams: tuple[Point, ...]
    layers: tuple[str, ...]
    width: int
    notes: tuple[str, ...] = ()


def points_of(model: nn.Module) -> Points:
    """The points of ``model``, whose weights are neither read nor changed; none where it has no map."""
    try:
        return points_in(model, inspect(model))
    except Refused as error:
        return Points((), (), 0, (f"no layer is watched: {error.what}: {error.why}",))


def points_in(model: nn.Module, residual: ResidualMap) -> Points:
    """The points of ``model``, whose map is ``residual``.

    A sub-layer's input is that of its pre-norm. Where a layer has none (post-norm, or a norm on the branch alone), or
    where the norm is computed by a module that does more, the layers' inputs are watched instead.
    """
    blocks = layers(model, [projection.parameter for projection in residual.residual_projections])
    if not blocks:
        return Points((), (), residual.width, ("no layer is watched: the map has no list of layers",))
    pre = [norm for norm in residual.norms if norm.role == "pre"]
    alone = [Point(norm.module, norm.layer, norm.kind) for norm in pre if _is_alone(norm.module, residual)]
    if {point.layer for point in alone} >= set(blocks.values()):
        return Points(tuple(alone), tuple(blocks), residual.width)
    first = {norm.layer: norm for norm in reversed(pre)}
    at = [Point(path, i, norm_kind([first[i]] if i in first else [], residual)) for path, i in blocks.items()]
    why = "the stream is watched at the layers' inputs: not every layer has a norm of its own before its sub-layers"
    return Points(tuple(at), tuple(blocks), residual.width, (why,))


def _is_alone(module: str, residual: ResidualMap) -> bool:
    """The module computes a norm and nothing else: no matrix of the map is in it."""
    return not any(matrix.parameter.startswith(f"{module}.") for matrix in residual.matrices)


@contextlib.contextmanager
def watching(model: nn.Module, points: Points, found: dict[str, torch.Tensor]) -> Iterator[None]:
    """One forward pass of ``model`` inside the block fills ``found``: a point's module -> the stream's size there.

    In float32, on the device of the stream. Of a module that is called more than once, the first call counts. A
    compiled model runs uncompiled.
    """
    handles = [
        model.get_submodule(point.module).register_forward_pre_hook(
            partial(_note, found, point, points.width), with_kwargs=True
        )
        for point in points.streams
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _note(
    found: dict[str, torch.Tensor], point: Point, width: int, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
) -> None:
    for value in (*args, *kwargs.values()):
        if point.module not in found and isinstance(value, torch.Tensor) and value.shape[-1:] == (width,):
            found[point.module] = sigma(value.detach(), point.kind).mean()
