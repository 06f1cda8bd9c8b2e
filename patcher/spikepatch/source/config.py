"""config.json -> config object and model class; refused before any code that comes with the model could run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikepatch.errors import BadSource, Refused, did_you_mean, on_one_line, unprintable
from spikepatch.quiet import quiet
from spikepatch.source.auto_classes import OF_BOTH, auto_classes, in_order
from spikepatch.source.formats import DOWNLOAD_AGAIN, parse_json, recognise, some
from spikepatch.source.local import read_file
from spikepatch.source.redirects import check_config, entries

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Bytes of a config.json; the largest of transformers has some 50,000.
_LARGEST = 10_000_000

#: Layers of a model.
_DEEPEST = 10_000

#: Auto classes whose code runs when a model is built.
_BUILDERS = ("AutoConfig", "AutoModel", "AutoBackbone")


@dataclass(frozen=True)
class Recorded:
    """What config.json says of a patch: ``config.spikepatch``, as ``Plan.record`` wrote it.

    Attributes:
        recipe: its name.
        embeddings: what is done to each embedding, by module; ``plans.edits.recorded_edit`` reads it.
        as_code: the model runs on generated files that lie beside the weights.
        entries: all that is recorded.
    """

    recipe: str
    embeddings: Mapping[str, Mapping[str, Any]]
    as_code: bool
    entries: Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """What is to be built.

    Attributes:
        config, model_class: the class takes the config; of a composite model, the part that it is built from.
        auto_class: name of the class in transformers whose ``from_pretrained`` gives it.
        needs_code: it is built from Python files that came with the model.
        patched: of a folder that spikepatch has written, what its config records; the rest is then about the model
            before the patch.
    """

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    auto_class: str
    needs_code: bool = False
    patched: Recorded | None = None


def default_architecture(model_type: str, *, where: str) -> Architecture:
    """The architecture that transformers builds from a type's default config.

    Raises:
        BadSource: transformers does not know the type.
        Refused: the type has no usable default config, or no model class.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        raise _unknown_type(model_type, where, "correct the type, or update transformers")
    with quiet():
        try:
            config = AutoConfig.for_model(model_type)
        except Exception as error:
            from spikepatch.source.meta import not_buildable

            raise not_buildable(where, error) from error
        return _preferred_class(config, where)


def read_architecture(folder: Path, *, where: str, trusted: bool) -> Architecture:
    """The architecture that ``folder/config.json`` describes; of a patched model, the one that was patched.

    spikepatch records what its entries replaced, so a patched model is read without the code that lies beside it.

    Args:
        where: the source, for errors.
        trusted: Python files of the model may be run.

    Raises:
        BadSource: config.json is malformed, contradicts itself, or is of a type that transformers does not know.
        Refused: it needs code and is not ``trusted``, or it is quantised.
    """
    written = _read_json(folder / "config.json", where)
    raw, patched = _unpatched(written, where)
    # What is recorded of the time before a patch is taken for config.json, and config.json itself is loaded as well.
    for each in (written, raw):
        check_config(each, where)
        _check_depth(each, where)
        if any(key == "quantization_config" and entry is not None for _, key, entry in entries(each)):
            raise _quantised(where)
    kernels = [reference for reference in _code_references(written) if not reference.startswith("Auto")]
    code = sorted({*_code_references(raw), *kernels})
    if code and not trusted:
        raise _untrusted(code, where)
    for each in (written, raw):
        _check_auto_map(each, where)

    from transformers import CONFIG_MAPPING, AutoConfig

    from spikepatch.source.private import as_parsed, forget_weights, name_config

    remote_config = isinstance(raw.get("auto_map"), dict) and "AutoConfig" in raw["auto_map"]
    if not remote_config and (not isinstance(raw.get("model_type"), str) or raw["model_type"] not in CONFIG_MAPPING):
        raise _unknown_type(raw.get("model_type"), where, "update transformers, or correct config.json")
    if hidden := unprintable([str(raw.get("model_type", ""))]):  # only code of its own can have it
        raise BadSource(
            "config.json has a model_type with control characters",
            where=where,
            why=f"no model is called {hidden[0]}, and a terminal would show something else",
            remedy="do not trust this model; get it from its author again",
        )
    with quiet():
        try:
            if patched is None:
                config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
            else:
                config = _config_class(raw, folder).from_dict(as_parsed(raw))
        except Exception as error:
            raise BadSource(
                "config.json does not describe a model",
                where=where,
                why=on_one_line(error),
                remedy=f"correct the value that is named; or {DOWNLOAD_AGAIN}",
            ) from error
        name_config(config, where)
        forget_weights(config)
        if code and (remote := _remote_class(config, folder, where)) is not None:
            found = remote
        # transformers reads some configs as another type than they say; `architectures` is then about the old type.
        elif config.architectures and config.model_type == raw["model_type"]:
            found = _named_class(config, where)
        else:
            found = _preferred_class(config, where)
        return replace(found, needs_code=bool(code), patched=patched)


def _unpatched(raw: dict[str, Any], where: str) -> tuple[dict[str, Any], Recorded | None]:
    """config.json as it was before spikepatch, and the record of what spikepatch did; (``raw``, None) for others.

    Raises:
        Refused: it claims a patch that it does not have.
    """
    record = raw.get("spikepatch")
    kinds = {"recipe": str, "original": dict, "embeddings": dict}
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        return raw, None
    original = record["original"]
    found = Recorded(record["recipe"], record["embeddings"], "auto_map" in original, record)
    wanted = f"spikepatch_{original.get('model_type')}"
    if found.as_code and raw.get("model_type") != wanted:
        raise Refused(
            "claims a patch that it does not have",
            where=where,
            why=f"config.json records the recipe {found.recipe}, whose model is of the type"
            f" {wanted}, and has the type {raw.get('model_type')}: a plain class has"
            " loaded a patched folder and saved it without the patch",
            remedy="load the patched folder with its Auto class and trust_remote_code=True, and save that; or remove"
            ' "spikepatch" from config.json, to take it for the plain model that it is',
        )
    before = {name: value for name, value in raw.items() if name != "spikepatch"} | original
    return {name: value for name, value in before.items() if value is not None or name not in original}, found


def _config_class(raw: dict[str, Any], folder: Path) -> Any:
    from transformers import CONFIG_MAPPING
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto_map = raw.get("auto_map", {})
    if "AutoConfig" in auto_map:
        return get_class_from_dynamic_module(auto_map["AutoConfig"], str(folder))
    return CONFIG_MAPPING[raw["model_type"]]


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        data = read_file(path, within=path.parent, limit=_LARGEST)
    except OSError as error:
        raise BadSource(
            "config.json cannot be read",
            where=where,
            why=error.strerror or str(error),
            remedy="check what it is and who may read it; replace a link by the file",
        ) from error
    try:
        raw = parse_json(data)
    except ValueError as error:
        problem, remedy = recognise(data) or (str(error), DOWNLOAD_AGAIN)
        raise BadSource("config.json is not JSON", where=where, why=f"it is {problem}", remedy=remedy) from error
    if not isinstance(raw, dict):
        raise BadSource(
            "config.json is not a JSON object", where=where, why=f"it is a {type(raw).__name__}", remedy=DOWNLOAD_AGAIN
        )
    return raw


def _code_references(config: dict[str, Any]) -> Iterator[str]:
    """Code that building the model would fetch or import: the model's own classes, and kernels, at any depth."""
    from spikepatch.source.private import KERNEL_KEYS

    for place, key, value in entries(config):
        if key == "auto_map":
            named = value.items() if isinstance(value, dict) else [("AutoModel", value)]
            yield from (f"{auto}: {ref}" for auto, ref in named if auto.startswith(_BUILDERS))
        elif key in KERNEL_KEYS and "/" in str(value):
            yield f"{place}: {value}"


def _check_depth(config: dict[str, Any], where: str) -> None:
    """Refuse a number of layers that no model has, before a constructor makes a list of them."""
    for place, key, value in entries(config):
        if "layer" in key and type(value) is int and value > _DEEPEST:
            raise BadSource(
                f"config.json asks for {value:,} layers",
                where=where,
                why=f"{place} is over {_DEEPEST:,}, and no model has as many",
                remedy=f"correct it; or {DOWNLOAD_AGAIN}",
            )


def _check_auto_map(config: dict[str, Any], where: str) -> None:
    """Refuse an ``auto_map``, at any depth, that is none: class of transformers -> where the model's own class is."""
    for place, key, value in entries(config):
        named = value.items() if isinstance(value, dict) else [("", value)]
        flat = [(auto, one) for auto, each in named for one in (each if isinstance(each, list) and auto else [each])]
        wrong = next((one for auto, one in flat if not auto or not isinstance(one, (str, type(None)))), None)
        if key == "auto_map" and value is not None and flat and (wrong is not None or not isinstance(value, dict)):
            raise BadSource(
                "config.json has an auto_map that is none",
                where=where,
                why=f"{place} has {str(wrong)[:100]!r}, and names a class of the model's own, such as"
                ' {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}',
                remedy=f"correct it, or remove it if the model needs no code of its own; or {DOWNLOAD_AGAIN}",
            )


def _quantised(where: str) -> Refused:
    return Refused(
        "is quantised",
        where=where,
        why="config.json has a quantization_config: the weights are packed, and a factor or a fill has no meaning for"
        " packed weights",
        remedy="use the unquantised original, or dequantise the model and save it with save_pretrained",
    )


def _untrusted(code: list[str], where: str) -> Refused:
    return Refused(
        "needs code that comes with the model",
        where=where,
        why=f"config.json names {some(code)}; without that code another model than the author's would be built",
        remedy="read the model's Python files; if you trust them, pass --trust-remote-code",
    )


def _remote_class(config: PreTrainedConfig, folder: Path, where: str) -> Architecture | None:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto_map: dict[str, Any] = getattr(config, "auto_map", None) or {}
    named = in_order(auto_map)
    if not named:
        return None
    try:
        model_class = get_class_from_dynamic_module(auto_map[named[0]], str(folder))
    except Exception as error:
        raise BadSource(
            f"its own code for {named[0]} cannot be loaded",
            where=where,
            why=on_one_line(error),
            remedy="check that the Python files which auto_map names are in the folder and fit this transformers",
        ) from error
    return Architecture(config, model_class, named[0])


def _named_class(config: PreTrainedConfig, where: str) -> Architecture:
    """The class that ``config.architectures`` names first."""
    import transformers

    name = config.architectures[0] if isinstance(config.architectures, list) else config.architectures
    named = getattr(transformers, name, None) if isinstance(name, str) else None
    if not inspect.isclass(named) or not issubclass(named, transformers.PreTrainedModel):
        raise BadSource(
            f"config.json names the architecture {name!r}, which is no model of transformers",
            where=where,
            why=f"transformers {transformers.__version__} has no model class of this name",
            remedy="correct `architectures` in config.json, or remove it; or update transformers",
        )
    model_class: Any = named
    config = _config_for(model_class, config)
    if not isinstance(config, model_class.config_class):
        raise BadSource(
            f"config.json contradicts itself: model_type {config.model_type!r}, architecture {name!r}",
            where=where,
            why=f"{name} is built from a {model_class.config_class.__name__}, not from a {type(config).__name__}",
            remedy="correct `architectures` in config.json, or remove it",
        )
    return Architecture(config, model_class, _auto_class(model_class, config))


def _preferred_class(config: PreTrainedConfig, where: str) -> Architecture:
    """The first class of the type, in the order of the Auto classes."""
    known = dict(auto_classes(type(config)))
    both = OF_BOTH if getattr(config, "is_encoder_decoder", False) else ()
    for auto_class in dict.fromkeys((*both, *known)):
        for model_class in known[auto_class]:
            return Architecture(_config_for(model_class, config), model_class, auto_class)
    raise Refused(
        f"transformers has no model for the type {config.model_type!r} by itself",
        where=where,
        why="it is a part of another model, or its classes have no Auto class",
        remedy="give the whole model, or a folder whose config.json names a class in `architectures`",
    )


def _config_for(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The text part of a composite config where the class is built from that; as the Auto classes do it."""
    text = type(config).sub_configs.get("text_config")
    return config.get_text_config() if text is not None and model_class.config_class == text else config


def _auto_class(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """The Auto class that has ``model_class`` for this config's type; the class's own name where none has."""
    return next((n for n, found in auto_classes(type(config)) if model_class in found), model_class.__name__)


def _unknown_type(model_type: object, where: str, remedy: str) -> BadSource:
    import transformers

    return BadSource(
        f"the model type {model_type!r} is unknown" if model_type is not None else "config.json has no model_type",
        where=where,
        why=f"transformers {transformers.__version__} has no such type",
        remedy=f"{did_you_mean(model_type, transformers.CONFIG_MAPPING.keys(), '')} {remedy}".strip(),
    )
