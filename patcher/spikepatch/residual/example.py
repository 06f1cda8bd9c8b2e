"""What a forward pass is run on: the inputs that a config tells of, and those that the caller gives."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn

from spikepatch.errors import Refused
from spikepatch.source.own_object import imported

#: Keyword arguments of ``forward``, tensors and settings; or ``module:NAME`` of them, or of a function that makes them
#: for a model.
Given = Mapping[str, Any] | str | None

#: Token positions in the traced example: more than one, and unlike the usual head counts and widths.
TOKENS = 11


def given(example_inputs: Mapping[str, Any] | str, model: nn.Module) -> Mapping[str, Any]:
    """The arguments that the caller means.

    Args:
        example_inputs: a dict of tensors, and of settings such as a mode's name; or ``module:NAME``, where NAME is such
            a dict, or a function of the model that returns one. The module is imported, so its code runs.
        model: what they are for; its weights may be on the meta device.

    Raises:
        Refused: it is none of these.
    """
    where, found = type(model).__name__, example_inputs
    if isinstance(found, str):
        where, found = found, imported(found, "the example")
        if callable(found):
            try:
                found = found(model)
            except Exception as error:  # whatever the user's function raises
                raise Refused(
                    what="the example cannot be made",
                    where=where,
                    why=f"{type(error).__name__}: {error}",
                    remedy="NAME is called with the model, whose config has the sizes, and returns a dict of tensors",
                ) from error
    odd = found if not isinstance(found, Mapping) else next(filter(_is_no_argument, found.values()), None)
    if odd is not None:
        raise Refused(
            what="example_inputs is no dict of arguments",
            where=where,
            why=f"it {'holds one' if isinstance(found, Mapping) else 'is'} of type {type(odd).__name__}, where a tensor"
            " is wanted for each argument by its name",
            remedy="pass example_inputs={'name of the argument': tensor}; where an argument is to hold several, give in"
            " Python a module around the model, whose forward takes them one by one",
        )
    return found


def _is_no_argument(value: object) -> bool:
    """Numbers that are no tensor yet."""
    return isinstance(value, (list, tuple, dict, set)) or (hasattr(value, "__array__") and not torch.is_tensor(value))


def example_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a transformers model takes, by its declared main input: token ids, an image, a spectrogram or a wave.

    Raises:
        Refused: it is no transformers model.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise Refused(
            what="no example inputs for a plain module",
            where=type(model).__name__,
            why="only a transformers model tells by its config what its forward takes",
            remedy="pass example_inputs={'name of the argument': tensor}",
        )
    ids = torch.arange(5, 5 + TOKENS).unsqueeze(0)  # (batch, tokens)
    if codebooks := getattr(config, "num_codebooks", 0):
        ids = ids.repeat(codebooks, 1)  # (codebooks, tokens)
    name = getattr(model, "main_input_name", "input_ids")
    name = name[0] if isinstance(name, (list, tuple)) else name
    example = {name: ids}
    if name == "pixel_values":
        example = {name: _picture(config)}
    elif name == "input_features":
        bands = setting(config, "num_mel_bins", "input_feat_per_channel", "feature_size", otherwise=80)
        frames = setting(config, "max_source_positions", otherwise=128)
        example = {name: torch.zeros(1, number(bands), 2 * number(frames))}
    elif name == "input_values":
        example = {name: torch.zeros(1, 8000)}
    if getattr(config, "is_encoder_decoder", False):
        example["decoder_input_ids"] = ids.clone()
    return example


def completed(model: nn.Module, example: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``example``, and of token ids, boxes and an image those that the forward's signature names and that it lacks; for
    a model that does not run on its main input alone.
    """
    config: Any = getattr(model, "config", None)
    ids = torch.arange(5, 5 + TOKENS).unsqueeze(0)
    known = {
        "input_ids": ids,
        "qformer_input_ids": ids,
        "bbox": torch.zeros(1, TOKENS, 4, dtype=torch.long),
        "pixel_values": _picture(config),
    }
    names = signature(model.forward).parameters
    return {**example, **{n: t for n, t in known.items() if n in names and n not in example}}


def _picture(config: Any) -> torch.Tensor:
    size = setting(config, "image_size", "input_size", otherwise=224)
    sizes = list(size.values()) if isinstance(size, dict) else size if isinstance(size, (list, tuple)) else [size]
    channels = setting(config, "num_channels", "in_channels", "in_chans", otherwise=3)
    return torch.zeros(1, *(number(each) for each in (channels, sizes[0], sizes[-1])))


def setting(config: Any, *names: str, otherwise: object) -> Any:
    """The first of these settings that the config has, or that one inside it has."""
    parts = [config, *(getattr(config, name, None) for name in getattr(type(config), "sub_configs", {}))]
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((value for value in found if value is not None), otherwise)


def number(value: object) -> int:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if isinstance(value, int) else 1


def offered(model: nn.Module, example: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Further inputs that the forward's signature names."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ids = next((x for x in example.values() if not x.is_floating_point()), None)
    width = getattr(text, "hidden_size", None)
    if ids is None or not isinstance(width, int):
        return {}
    batch = len(ids) // (getattr(config, "num_codebooks", 0) or 1)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    wide = getattr(text, "cross_attention_hidden_size", None) or width
    states = torch.zeros(batch, TOKENS - 4, wide, dtype=dtype)
    first = torch.zeros_like(ids).index_fill_(-1, torch.tensor([0]), 1)
    known = {
        "encoder_hidden_states": states,
        "cross_attention_states": states,
        "token_type_ids": torch.zeros_like(ids),
        "global_attention_mask": first,
    }
    return {name: value for name, value in known.items() if name in signature(model.forward).parameters}
