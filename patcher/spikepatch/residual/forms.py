"""Further forms of inputs, for a model that does not run on its main input as ``example.py`` makes it up.

Arguments are known by the names that transformers gives them, whatever the model: text, pictures (whole, as clips, or
cut into patches beside the grid that they are from), spectra, waves, series, and vectors of the model's own width. What
no name tells is tried: the order of the axes, and the usual sizes where the config has none. The forward pass decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn

from spikepatch.errors import Refused
from spikepatch.residual.example import TOKENS, number, setting

NOT_TRACED = "the forward pass cannot be traced, so its residual stream cannot be found"

#: One argument in one form, and what goes with it.
Arguments = dict[str, torch.Tensor]

#: Forms that are tried of one model, at most; most fail in their first layer.
_MOST = 96

#: Samples of a wave: a multiple of the usual strides of codecs.
_SAMPLES = 38400

#: Values of a series that is made up.
_LONGEST = 512

#: Pixels along a side of a picture that is made up.
_WIDEST = 1024

_IDS = frozenset(("input_ids", "decoder_input_ids", "inputs_embeds"))


def forms(model: nn.Module) -> Iterator[Arguments]:
    """Inputs for ``model.forward``, the barest first: what it must have, then what else it names."""
    parameters = signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", "input_ids")
    mains = main if isinstance(main, (list, tuple)) else [main]
    must = set(_needed(parameters))
    known = [name for name in parameters if name in _FORMS]
    needed = [name for name in known if name in must or (name in mains and not must)]
    others = [name for name in known if name not in {*needed, *_ALONE}]
    both = {"decoder_input_ids": _ids()} if getattr(config, "is_encoder_decoder", False) else {}
    choices = [
        ["input_ids"] if "input_ids" in known else [],
        needed,
        *([*needed, n] for n in others),
        [*needed, *others],
    ]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    count = 0
    for names in dict.fromkeys(map(tuple, choices)):
        for parts in itertools.product(*(_FORMS[name](config, name, parameters.keys()) for name in names)):
            joined = both | {name: value for part in parts for name, value in part.items()}
            every = {name: _as(value, dtype) for name, value in joined.items() if name in parameters}
            bare = {name: value for name, value in every.items() if name in must or name in names or name in both}
            for inputs in [bare] if bare.keys() == every.keys() else [bare, every]:
                if inputs and must <= inputs.keys() and count < _MOST:
                    count += 1
                    yield inputs


def _as(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def check_forward(model: nn.Module) -> None:
    """Refuse a model that is several in one, and runs them only as it generates."""
    if type(model).forward is not nn.Module.forward:
        return
    parts = [name for name, part in model.named_children() if type(part).forward is not nn.Module.forward]
    raise Refused(
        what="it has no forward pass of its own, so its residual stream cannot be found",
        where=type(model).__name__,
        why=f"only its parts have one: {', '.join(parts)}" if parts else "nor has a part of it",
        remedy=f"give the part that you train: in Python, inspect and patch take any module (model.{parts[0]})"
        if parts
        else "give a model that has one",
    )


def not_traced(model: nn.Module, why: str) -> Refused:
    """The error for a model that does not run, ``why`` beginning with what it does not run on."""
    parameters = signature(model.forward).parameters
    odd = _unknown(model)
    without = f"; nothing tells what its {' and '.join(odd)} may be" if odd else ""
    no_text = (
        ""
        if _IDS & parameters.keys() or not hasattr(model, "config")
        else "; it takes no token ids: it is no language model"
    )
    return Refused(
        what=NOT_TRACED,
        where=type(model).__name__,
        why=f"it does not run {why}{without}{no_text}",
        remedy="give all that its forward needs: --example-inputs module:NAME (in Python: a dict of tensors as"
        " example_inputs); where the sizes of a default config do not fit each other, give a real config",
    )


def _unknown(model: nn.Module) -> list[str]:
    """What the forward must have, and no name tells of."""
    parameters = signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    known = (form for name in parameters if name in _FORMS for form in _FORMS[name](config, name, parameters.keys()))
    told = {name for form in known for name in form}
    return [name for name in _needed(parameters) if name not in told]


def _needed(parameters: Mapping[str, Parameter]) -> list[str]:
    return [n for n, p in parameters.items() if p.default is p.empty and p.kind is Parameter.POSITIONAL_OR_KEYWORD]


def _ids() -> torch.Tensor:
    return torch.arange(5, 5 + TOKENS).unsqueeze(0)


def _text(config: Any, name: str, asked: Collection[str]) -> Iterator[Arguments]:
    """Tokens; or for each place one of every codebook."""
    ids, beside = _ids(), {"bbox": torch.zeros(1, TOKENS, 4, dtype=torch.long)}
    yield {name: ids, **beside}
    books = number(setting(config, "num_codebooks", "num_channels", otherwise=0))
    for count in (books, books + 1) if 1 < books < 64 else ():
        of_each = ids.unsqueeze(-1).repeat(1, 1, count)  # (batch, tokens, codebooks)
        yield {name: ids, "decoder_input_ids": of_each}
        yield {name: of_each}


def _pictures(config: Any, name: str, asked: Collection[str]) -> Iterator[Arguments]:
    """One picture or clip: cut into patches, where the grid is asked for, or whole."""
    channels = number(setting(config, "num_channels", "in_channels", "in_chans", otherwise=3))
    size = setting(config, "image_size", "crop_size", "max_img_size", "input_size", otherwise=224)
    sizes = list(size.values()) if isinstance(size, dict) else size if isinstance(size, (list, tuple)) else [size]
    high, wide = number(sizes[0]), number(sizes[-1])
    patch = setting(config, "patch_size", "tubelet_size", otherwise=16)
    patch = number(patch[-1] if isinstance(patch, (list, tuple)) else patch)
    frames = number(setting(config, "num_frames", "frames_per_clip", otherwise=2))
    thick = number(setting(config, "temporal_patch_size", "patch_temporal", otherwise=1))
    merged = number(
        setting(config, "spatial_merge_size", "merge_size", "merge_kernel_size", "pooling_kernel_size", otherwise=2)
    )
    patches = list(_patches(name, channels, patch, thick, max(merged, 1)))
    if name not in {"pixel_values", "pixel_values_videos"} or any(len(form.keys() & asked) > 1 for form in patches):
        yield from patches
    seen = {"image_attention_mask": torch.ones(1, TOKENS, 1, dtype=torch.long)}
    one = torch.zeros(1, channels, high, wide)
    yield {name: one, **dict.fromkeys(("prompt_pixel_values", "prompt_masks"), one)}
    for count in dict.fromkeys((frames, 1, 2)):
        yield {name: torch.zeros(1, count, channels, high, wide), **seen}
    if 40 * patch <= _WIDEST:  # what windows of patches fit into, with merges
        yield {name: torch.zeros(1, channels, 40 * patch, 40 * patch)}


def _patches(name: str, channels: int, patch: int, thick: int, merged: int) -> Iterator[Arguments]:
    side = 2 * merged
    grid = torch.tensor([[1, side, side]])
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    beside = {
        "grid_thw": grid, "image_grid_thw": grid, "grid_hws": grid[:, 1:], "spatial_shapes": grid[:, 1:],
        "target_sizes": grid[:, 1:], "merge_sizes": torch.tensor([merged]), "pixel_position_ids": at[None],
        "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.long),
    }  # fmt: skip
    for depth in dict.fromkeys((thick, 1)):
        length = channels * depth * patch * patch
        yield {name: torch.zeros(side * side, length), **beside}
        yield {name: torch.zeros(1, side * side, length), **beside}
    yield {name: torch.zeros(side * side, channels, patch, patch), **beside}
    yield {name: torch.zeros(1, channels, patch, side * side * patch), **beside}
    yield {name: torch.zeros(1, side * side, channels * patch * patch + 2)}  # the row and the column come first


def _spectra(config: Any, name: str, asked: Collection[str]) -> Iterator[Arguments]:
    named = setting(config, *_BANDS, otherwise=80)
    stacked = number(setting(config, "num_stacked_frames", otherwise=1))
    length = 2 * number(setting(config, "max_source_positions", otherwise=400))
    for bands in dict.fromkeys((number(named), number(named) * stacked, 80, 128)):
        for frames in dict.fromkeys((8 * TOKENS, length, number(setting(config, "max_length", otherwise=length)))):
            heard = torch.ones(1, frames, dtype=torch.bool)
            beside = dict.fromkeys(("attention_mask", "input_features_mask", "audio_mel_mask"), heard)
            for sound in (
                torch.zeros(1, frames, bands),
                torch.zeros(1, bands, frames),
                torch.zeros(1, 1, frames, bands),
            ):
                yield {name: sound, **beside}


def _waves(config: Any, name: str, asked: Collection[str]) -> Iterator[Arguments]:
    yield {name: torch.zeros(1, 1, _SAMPLES)}
    yield {name: torch.zeros(1, _SAMPLES)}
    yield from _spectra(config, name, asked)


def _series(config: Any, name: str, asked: Collection[str]) -> Iterator[Arguments]:
    length = min(number(setting(config, "context_length", otherwise=64)), _LONGEST)
    channels = number(setting(config, "num_input_channels", "input_size", otherwise=1))
    for values in (torch.zeros(1, length, channels), torch.zeros(1, length)):
        beside = {"past_values_padding": torch.zeros(1, length, dtype=torch.long), "freq": torch.zeros(1, 1).long()}
        yield {name: values, "past_observed_mask": torch.ones_like(values), **beside}


def _vectors(config: Any, name: str, asked: Collection[str]) -> Iterator[Arguments]:
    """As wide as the model; states of another model as wide as that one."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    foreign = ("cross_attention_hidden_size", "encoder_hidden_size") if name in _STATES else ("latent_dim", "vae_dim")
    own = ("hidden_size", "d_model", "n_embd")
    for names in ((*foreign, *own), own):
        width = number(setting(text, *names, otherwise=1))
        yield {name: torch.zeros(1, TOKENS, width)}
        yield {name: torch.zeros(1, width, TOKENS)}


def _states(config: Any, name: str, asked: Collection[str]) -> Iterator[Arguments]:
    """Whatever the first layer reads: patches, vectors or a wave."""
    yield from itertools.islice(_pictures(config, name, asked), 2)
    yield from _vectors(config, name, asked)
    yield {name: torch.zeros(1, 1, _SAMPLES)}


#: What configs call the number of bands of a spectrum.
_BANDS = (
    "num_mel_bins", "input_feat_per_channel", "feature_size", "input_feat_size", "feature_projection_input_dim",
    "n_mels", "mel_dim",
)  # fmt: skip

_VECTORS = ("inputs_embeds", "query_embeds", "noise_embeds", "latents")
_STATES = ("encoder_hidden_states", "context_hidden_states")
#: They stand for another input, and are tried only where the forward must have them.
_ALONE = (*_VECTORS, "pixel_values_videos", "hidden_states")

_FORMS: Mapping[str, Callable[[Any, str, Collection[str]], Iterator[Arguments]]] = {
    **dict.fromkeys(("input_ids", "qformer_input_ids"), _text),
    **dict.fromkeys(("pixel_values", "pixel_values_videos", "flattened_patches"), _pictures),
    **dict.fromkeys(("input_features", "audio_mel"), _spectra),
    "input_values": _waves,
    "past_values": _series,
    "hidden_states": _states,
    **dict.fromkeys((*_VECTORS, *_STATES), _vectors),
}
