"""Images and sounds among the tokens of an example: inputs by the sizes that a config has, and places for features."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn

from spikepatch.residual.record import record
from spikepatch.residual.recordable import prepared
from spikepatch.source.private import tree_leaves

#: What transformers calls the method that makes features, and the config's token whose places they take.
_IMAGE = ("get_image_features", ("image_token_id", "image_token_index"))
_AUDIO = ("get_audio_features", ("audio_token_id", "audio_token_index"))


class _Features(nn.Module):
    """What a model makes of an image or a sound, as a forward pass of its own."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, **inputs: torch.Tensor) -> Any:
        result = getattr(_owner(self.model, self.method), self.method)(**inputs)
        return getattr(result, "pooler_output", result)


def _owner(model: nn.Module, method: str) -> nn.Module | None:
    """The outermost module that has the method: with a head, the model itself may lack it."""
    return next((module for module in model.modules() if hasattr(module, method)), None)


def with_features(model: nn.Module, example: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """``example`` with an image, with a sound, or with both, for a transformers model that reads them so.

    Such a model has ``get_image_features`` or ``get_audio_features``, and a token in its config whose places in the
    text they take. The first form of the input is taken that it reads.
    """
    config: Any = getattr(model, "config", None)
    found = dict(example)
    for method, tokens, forms in ((*_IMAGE, _images), (*_AUDIO, _sounds)):
        token = _place_token(config, tokens)
        if _owner(model, method) is None or token is None or "input_ids" not in found:
            continue
        for inputs in forms(config):
            if next(iter(inputs)) not in signature(model.forward).parameters:
                continue
            if places := _places(model, method, inputs):
                ids = found["input_ids"]
                rows = torch.full((len(ids), places), token, dtype=ids.dtype)
                found = {**found, "input_ids": torch.cat([ids[:, :4], rows, ids[:, 4:]], dim=1), **inputs}
                if "mm_token_type_ids" in signature(model.forward).parameters:
                    found["mm_token_type_ids"] = (found["input_ids"] == token).long()
                yield dict(found)
                break


def place_tokens(config: Any) -> list[int]:
    """The tokens whose places in a text are those of an image's or a sound's features."""
    found = (_place_token(config, names) for _, names in (_IMAGE, _AUDIO))
    return [token for token in found if token is not None]


def _place_token(config: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((token for token in found if isinstance(token, int)), None)


def _places(model: nn.Module, method: str, inputs: Mapping[str, torch.Tensor]) -> int:
    """How many features the model makes of ``inputs``; 0 where it does not take them."""
    with contextlib.suppress(Exception):  # whatever a forward pass raises
        _, result = record(_Features(prepared(model), method), inputs)
        return sum(t.numel() // t.shape[-1] for t in tree_leaves(result) if isinstance(t, torch.Tensor))
    return 0


def _images(config: Any) -> Iterator[dict[str, torch.Tensor]]:
    """One image: as small as a grid of patches allows, or of the size that is named; the smaller forms first."""
    vision = getattr(config, "vision_config", config)
    patch, merge = _number(vision, "patch_size", 16), max(_number(vision, "spatial_merge_size", 2), 1)
    channels = _number(vision, "num_channels", 0) or _number(vision, "in_channels", 3)
    small, named = 4 * patch * merge, _number(vision, "image_size", 224)
    frames = _number(vision, "temporal_patch_size", 1)
    grid = torch.tensor([[1, 2 * merge, 2 * merge]])
    patches = _drawn(int(grid.prod()), channels * frames * patch * patch)
    yield {"pixel_values": patches, "image_grid_thw": grid}
    yield {"pixel_values": patches, "image_grid_thw": grid, "image_merge_sizes": torch.tensor([merge])}
    yield {"pixel_values": patches, "image_grid_hw": grid[:, 1:]}
    shown = torch.ones(1, len(patches), dtype=torch.long)
    yield {"pixel_values": patches[None], "spatial_shapes": grid[:, 1:], "pixel_attention_mask": shown}
    for size in (small, named):
        image, tiles = _drawn(1, channels, size, size), _drawn(1, 2, channels, size, size)
        yield {"pixel_values": image, "image_sizes": torch.tensor([[size, size]])}
        yield {"pixel_values": tiles, "image_sizes": torch.tensor([[size, size]])}
        yield {"pixel_values": image}
        yield {"pixel_values": tiles[:, :1]}
        yield {"pixel_values_images": image}
    detailed = _number(getattr(config, "high_res_vision_config", config), "image_size", named)
    twice = _drawn(1, channels, named, named), _drawn(1, channels, detailed, detailed)
    yield dict(zip(("pixel_values", "high_res_pixel_values"), twice, strict=True))


def _sounds(config: Any) -> Iterator[dict[str, torch.Tensor]]:
    audio = getattr(config, "audio_config", config)
    frames = 2 * _number(audio, "max_source_positions", 1500)
    features = _drawn(1, _number(audio, "num_mel_bins", 80), frames)
    heard = torch.ones(1, frames, dtype=torch.long)
    yield {"input_features": features, "feature_attention_mask": heard}
    yield {"input_features": features, "input_features_mask": heard}
    yield {"input_features": features}
    yield {"input_features": features.mT, "input_features_mask": heard}


def _number(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) else default


def _drawn(*size: int) -> torch.Tensor:
    """Numbers of the size that processors scale an input to."""
    return torch.randn(size, generator=torch.Generator().manual_seed(0))
