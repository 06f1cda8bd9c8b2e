"""What would make transformers read other files than those that are checked, or fetch code: refused, and not handed on.

All of it was found in the loaders of transformers 5.24: ``PreTrainedConfig.get_config_dict``, ``from_pretrained`` of
models and tokenizers, the quantizers, the kernels, and the backbones of vision models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spikepatch.errors import Refused
from spikepatch.source.formats import INDEX_FILE, SINGLE_FILE, parse_json, some
from spikepatch.source.local import read_file

#: Key of config.json -> what transformers does for it. At any depth, since a part may be loaded by itself.
_CONFIG_KEYS = {
    "configuration_files": "reads another file as the config, by its own version",
    "transformers_weights": "reads other weights",
    "fusion_config": "replaces layers of the model by other ones",
}

#: Values of the last two that name what would be read anyway.
_USUAL_WEIGHTS = (None, SINGLE_FILE, INDEX_FILE)

#: The same of tokenizer_config.json.
_TOKENIZER_KEYS = {
    "fast_tokenizer_files": "reads another file as the tokenizer, by its own version",
    "gguf_file": "reads the vocabulary of another file",
    "init_inputs": "passes these, such as files, to the tokenizer's constructor",
}

#: In a name that a vision model's backbone is made of.
_REMOTE_NAME = re.compile(r"^(hf-hub|hf_hub|local-dir):|/")

#: A file of a sharded checkpoint that transformers takes in place of model.safetensors.
_RANK_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

_REMEDY = "remove it, if the files that are read without it are the model; or load the model and save it again"


def check_config(config: dict[str, Any], where: str) -> None:
    """Refuse keys of config.json that send transformers to files that are not looked at here.

    Raises:
        Refused: every such key is named, with what it does.
    """
    found = [f"{path}: transformers {does}" for path, does in _redirects(config)]
    if found:
        raise Refused(
            "config.json sends transformers to other files than those that are checked",
            where=where,
            why=some(dict.fromkeys(found), 5),
            remedy=_REMEDY,
        )


def _redirects(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    for place, key, entry in entries(value, path):
        if key == "transformers_weights" and entry in _USUAL_WEIGHTS:
            continue
        if key in _CONFIG_KEYS and entry:
            yield f"{place} = {entry!r:.80}", _CONFIG_KEYS[key]
        elif key in ("backbone", "architecture") and isinstance(entry, str) and _REMOTE_NAME.search(entry):
            yield f"{place} = {entry!r:.80}", "builds a part of the model from another repository"


def entries(value: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """(path, key, entry) of every object in JSON, at any depth."""
    if isinstance(value, dict):
        for key, entry in value.items():
            place = f"{path}.{key}" if path else str(key)
            yield place, key, entry
            yield from entries(entry, place)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from entries(entry, f"{path}[{index}]")


def check_files(names: Iterable[str], where: str) -> None:
    """Refuse a folder in which transformers finds something else to load than the checked weights.

    Raises:
        Refused: an adapter lies beside the weights, or a checkpoint of several ranks.
    """
    present = set(names)
    why = []
    if "adapter_config.json" in present:
        why.append("adapter_config.json: transformers puts the adapter on the model where peft is installed")
    if ranks := sorted(name for name in present if _RANK_FILE.fullmatch(name)):
        why.append(f"{ranks[0]}: transformers takes the checkpoint of several ranks in place of {SINGLE_FILE}")
    if why:
        raise Refused(
            "transformers loads something else from it than the weights that are checked",
            where=where,
            why="; ".join(why),
            remedy="move it away, or load the model (an adapter: merge it) and save it again",
        )


def check_tokenizer(folder: Path, where: str) -> None:
    """The same for tokenizer_config.json, if there is one; a malformed one is left to who reads it.

    Raises:
        Refused: every such key is named, with what it does.
    """
    try:
        config = parse_json(read_file(folder / "tokenizer_config.json", within=folder))
    except (OSError, ValueError):
        return
    if not isinstance(config, dict):
        return
    found = [
        f"{key} = {config[key]!r:.80}: transformers {does}" for key, does in _TOKENIZER_KEYS.items() if config.get(key)
    ]
    if found:
        raise Refused(
            "tokenizer_config.json sends transformers to other files than those that are checked",
            where=where,
            why=some(found, 5),
            remedy=_REMEDY,
        )


def code_files(config: Any) -> list[str]:
    """The Python files that the ``auto_map`` of a config.json or tokenizer_config.json names."""
    named = config.get("auto_map") if isinstance(config, dict) else None
    references = list(named.values()) if isinstance(named, dict) else [named] if named else []
    flat = [one for each in references for one in (each if isinstance(each, list) else [each]) if one]
    return [f"{str(reference).rpartition('--')[2].partition('.')[0]}.py" for reference in flat]
