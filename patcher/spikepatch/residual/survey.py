"""Which of the installed transformers' types have a proven map, found out now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spikepatch.errors import Refused, SpikepatchError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from spikepatch.residual.map import ResidualMap

#: Tasks whose models are language models, with the tables of transformers that list them.
_TABLES = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}
#: The types that these do not have, by what their models take.
_OTHERS = {
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "multimodal": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "other": "MODEL_MAPPING_NAMES",
}

#: How a reason begins that is none of the model's.
BUG = "a bug in spikepatch, please report it"

#: Config fields that hold the number of layers, and lists as long as it that hold anything but kinds of layers.
_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "num_layers_per_stack", "num_blocks", "depth",
)  # fmt: skip
_NOT_KINDS = ("moe_layers", "full_attn_idxs", "architectures", "layer_rope_theta")
#: Lists of kinds that stand for the number of layers where there is none.
_KINDS = ("layers_block_type",)


@dataclass(frozen=True)
class Row:
    """What was found for one type. ``reason``: why there is no proven map; empty where there is one.

    Attributes:
        task: ``causal``, ``seq2seq`` or ``masked``; of other types ``image-text``, ``speech``, ``multimodal``,
            ``image``, ``audio`` or ``other``.
        placement: where the norms stand; None without a map.
        layers: N of the shortened model; an encoder's not included.
        sublayers: S of the same.
        kinds: what its sub-layers compute.
        embeddings: the factor with which each table enters the stream, ``normed``, or both kinds in order.
        conditions: for which inputs alone a proven map holds; empty: for all.
    """

    type: str
    task: str
    architecture: str
    proven: bool
    reason: str
    placement: str | None = None
    layers: int | None = None
    sublayers: int | None = None
    kinds: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()


def types(text: str = "") -> list[tuple[str, str, str]]:
    """(task, type, class) of the installed transformers' types that contain ``text``: language models under each of
    their tasks, every other type once.
    """
    from transformers.models.auto import modeling_auto

    found = [
        (task, model_type, architecture)
        for task, table in _TABLES.items()
        for model_type, architecture in getattr(modeling_auto, table).items()
    ]
    known = {model_type for _, model_type, _ in found}
    for task, table in _OTHERS.items():
        for model_type, architecture in getattr(modeling_auto, table, {}).items():
            if model_type not in known:
                known.add(model_type)
                found.append((task, model_type, architecture if isinstance(architecture, str) else architecture[0]))
    return [entry for entry in found if text in entry[1]]


def survey(text: str = "") -> Iterator[Row]:
    """Map the default config of every type with ``text`` in it, cut to one layer of each kind, on the meta device."""
    return rows_of(types(text))


def rows_of(chosen: Iterable[tuple[str, str, str]]) -> Iterator[Row]:
    """The same of some (task, type, class)."""
    for task, model_type, architecture in chosen:
        try:
            residual = _mapped(model_type, architecture)
        except SpikepatchError as error:
            yield Row(model_type, task, architecture, False, _reason(error))
            continue
        except Exception as error:  # the other types are told all the same
            yield Row(model_type, task, architecture, False, f"{BUG}: {type(error).__name__}: {error}")
            continue
        yield Row(
            model_type,
            task,
            architecture,
            residual.proven,
            "" if residual.proven else f"not proven: {residual.leaks[0]}",
            residual.placement,
            residual.layers,
            residual.sublayers,
            tuple(dict.fromkeys(p.kind for p in residual.residual_projections)),
            tuple(f"{e.kind} {'normed' if e.normed else f'x {e.scale:g}'}" for e in residual.embeddings),
            residual.conditions,
        )


def _mapped(model_type: str, architecture: str) -> ResidualMap:
    import transformers

    from spikepatch.quiet import quiet
    from spikepatch.residual.forms import NOT_TRACED
    from spikepatch.residual.inspect import inspect
    from spikepatch.source.meta import NOT_BUILT, build_meta, not_buildable

    where = f"arch:{model_type}"
    with quiet():
        try:
            model_class: Any = getattr(transformers, architecture)
            config = config_of(model_class, transformers.AutoConfig.for_model(model_type))
            short = transformers.AutoConfig.for_model(model_type)
        except Exception as error:  # a class may need a package that is not installed, or be none at all
            raise not_buildable(where, error) from error
    for part in config_parts(short):
        keep_one_layer_of_each_kind(part)
    try:
        model = build_meta(model_class, config_of(model_class, short), where=where)
        return inspect(model, source=where)
    except Refused as error:  # the cut may be what it cannot be built from, or does not run with
        if error.what not in {NOT_BUILT, NOT_TRACED}:
            raise
    return inspect(build_meta(model_class, config, where=where), source=where)


def config_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """``config`` and the configs inside it, outermost first."""
    from transformers import PreTrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from config_parts(value)


def config_of(model_class: Any, config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of ``config`` that ``model_class`` is built from: of its own class where there is one, else all."""
    return next((part for part in config_parts(config) if isinstance(part, model_class.config_class)), config)


def keep_one_layer_of_each_kind(config: PreTrainedConfig) -> None:
    """Cut the layers to the first of each kind that the config tells apart, at least two, in place.

    Sizes other than the number of layers stay, so that what depends on the width is found as it is.
    """
    fields = vars(config)  # past the validators: the fields agree again only once all are cut
    counts = [name for name in _COUNTS if isinstance(fields.get(name), int)]
    layers = next((fields[n] if n in counts else len(fields[n]) for n in (*counts, *_KINDS) if fields.get(n)), 0)
    if not layers:
        return
    per_layer = [
        name
        for name, value in fields.items()
        if isinstance(value, (list, tuple)) and len(value) == layers > 2 and name not in _NOT_KINDS
    ]
    kinds: dict[str, int] = {}  # spelled -> first layer of the kind
    for i in range(layers):
        kinds.setdefault(repr([fields[name][i] for name in per_layer]), i)
    kept = list(kinds.values()) if len(kinds) > 1 else [0, min(1, layers - 1)]
    for name in per_layer:
        fields[name] = [fields[name][i] for i in kept]
    for name in counts:
        fields[name] = min(fields[name], len(kept))


def _reason(error: SpikepatchError) -> str:
    return f"{error.what}: {error.why}"
