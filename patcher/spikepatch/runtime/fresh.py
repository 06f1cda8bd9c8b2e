"""Fresh weights of a patched model: the recipe's stds, for any number of layers, any width and any vocabulary.

A checkpoint that needs code carries a copy of this file, as of ``embedding.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn
from transformers import initialization

from .embedding import FillRecord, StreamRecord, checked, first_value, missing_prefix, pattern

AnyEntry = TypeVar("AnyEntry")


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
    init = checked(model, record)["init"]
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
    prefix = missing_prefix(model)
    fills = {fill["parameter"].removeprefix(prefix): fill for fill in init["fills"]}
    constants = {constant["parameter"].removeprefix(prefix): constant for constant in init["constants"]}
    streams = [_stream_now(stream, parameters, prefix) for stream in init["streams"]]
    if not any(streams) or not any(_entry(name, fills) or _entry(name, constants) for name in parameters):
        raise ValueError(f"no parameter of {type(model).__name__} matches the patterns of config.spikepatch['init']")
    by_layer = {pattern(name) for name in (*fills, *constants) if pattern(name) != name}
    for name, parameter in parameters.items():
        fill, constant = _entry(name, fills), _entry(name, constants)
        if fill is not None:
            _draw(parameter, fill, *streams[fill["stream"]], parameter.shape)
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


@torch.no_grad()
def initialise_added(model: nn.Module, record: Mapping[str, object] | None, before: Mapping[str, int]) -> None:
    """Draw the rows that parameters have beyond ``before`` as the recipe draws the others; where it draws them.

    Args:
        before: name of each parameter -> how many rows it had.
    """
    init = checked(model, record)["init"]
    if init is None:
        return
    prefix = missing_prefix(model)
    fills = {fill["parameter"].removeprefix(prefix): fill for fill in init["fills"]}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    streams = [_stream_now(stream, parameters, prefix) for stream in init["streams"]]
    drawn: set[int] = set()
    for name, parameter in parameters.items():
        fill, rows = _entry(name, fills), before.get(name, 0)
        if fill is not None and id(parameter) not in drawn and 0 < rows < len(parameter):
            drawn.add(id(parameter))
            _draw(parameter.data[rows:], fill, *streams[fill["stream"]], parameter.shape)


def _draw(values: torch.Tensor, fill: FillRecord, width: int, deeper: float, shape: Sequence[int]) -> None:
    """Fill ``values``, which are all or some of a parameter of ``shape``."""
    size = fill["size"] * deeper ** fill["depth"]
    if fill["fan"]:
        fan = sum(shape[axis] for axis in fill["axes"]) or width
        size *= math.sqrt(fill["fan"] / fan)
    if fill["distribution"] == "normal":
        initialization.normal_(values, mean=0.0, std=size)
    elif fill["distribution"] == "truncated":
        bound = fill["cut"] * size
        initialization.trunc_normal_(values, mean=0.0, std=size, a=-bound, b=bound)
    else:
        initialization.uniform_(values, -size, size)
