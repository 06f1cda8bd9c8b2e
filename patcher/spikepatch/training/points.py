"""What happens inside a model while it trains: stream std and gradient norm, layer by layer, at the map's points.

Hooks are in place for one forward pass only, so that all other steps are as fast as if nothing were watched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from spikepatch.errors import Refused
from spikepatch.residual.inspect import inspect
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.names import layers


@dataclass(frozen=True)
class Points:
    """Where a model is watched, as the residual map tells.

    Attributes:
        streams: modules whose input is the residual stream, in the order of the map.
        layers: path of each block of layers, in order.
        width: length of one token's stream vector.
        notes: what cannot be watched, and why.
    """

    streams: tuple[str, ...]
    layers: tuple[str, ...]
    width: int
    notes: tuple[str, ...] = ()


def points_of(model: nn.Module) -> Points:
    """The points of ``model``, whose weights are neither read nor changed; none where it has no map.

    A sub-layer's input is that of its pre-norm. Where a layer has none (post-norm, or a norm on the branch alone), or
    where the norm is computed by a module that does more, the layers' inputs are watched instead.
    """
    try:
        residual = inspect(model)
    except Refused as error:
        return Points((), (), 0, (f"no layer is watched: {error.what}: {error.why}",))
    blocks = layers(model, [projection.parameter for projection in residual.residual_projections])
    if not blocks:
        return Points((), (), residual.width, ("no layer is watched: the map has no list of layers",))
    norms = [norm for norm in residual.norms if norm.role == "pre" and _is_alone(norm.module, residual)]
    if {norm.layer for norm in norms} >= set(blocks.values()):
        return Points(tuple(dict.fromkeys(norm.module for norm in norms)), tuple(blocks), residual.width)
    why = "the stream is watched at the layers' inputs: not every layer has a norm of its own before its sub-layers"
    return Points(tuple(blocks), tuple(blocks), residual.width, (why,))


def _is_alone(module: str, residual: ResidualMap) -> bool:
    """The module computes a norm and nothing else: no matrix of the map is in it."""
    return not any(matrix.parameter.startswith(f"{module}.") for matrix in residual.matrices)


@contextlib.contextmanager
def watching(model: nn.Module, points: Points, found: dict[str, torch.Tensor]) -> Iterator[None]:
    """One forward pass of ``model`` inside the block fills ``found``: point -> std of the stream there.

    The std is that of each token's vector over the width, the mean of it over all tokens, float32, on the device of the
    stream. Of a module that is called more than once, the first call counts. A compiled model runs uncompiled.
    """
    handles = [
        model.get_submodule(path).register_forward_pre_hook(partial(_note, found, path, points.width), with_kwargs=True)
        for path in points.streams
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _note(
    found: dict[str, torch.Tensor], path: str, width: int, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
) -> None:
    for value in (*args, *kwargs.values()):
        if path not in found and isinstance(value, torch.Tensor) and value.shape[-1:] == (width,):
            found[path] = value.detach().float().std(-1, correction=0).mean()


def gradient_norms(model: nn.Module, points: Points) -> torch.Tensor:
    """(layers,): the norm of the gradient of all parameters of each layer; the same on every rank."""
    norms = [
        whole(get_total_norm([p.grad for p in model.get_submodule(path).parameters() if p.grad is not None]))
        for path in points.layers
    ]
    return torch.stack(norms)


def whole(value: torch.Tensor) -> torch.Tensor:
    """A plain tensor, the same on every rank."""
    return value.full_tensor() if isinstance(value, DTensor) else value
