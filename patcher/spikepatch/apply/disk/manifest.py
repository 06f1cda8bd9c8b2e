"""What an output folder says of itself: ``spikepatch.json`` for machines, the model card for people."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from spikepatch._version import __version__
from spikepatch.plans.in_words import changes, parts, streams
from spikepatch.plans.plan import Plan, Recipe
from spikepatch.source.local import in_utf8, opened, read_file, without_place

if TYPE_CHECKING:
    from spikepatch.source.open import Source

MANIFEST = "spikepatch.json"

_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")

#: Bytes of a model card.
_LARGEST_CARD = 10_000_000


def manifest(
    plan: Plan,
    storage: str,
    source: Mapping[str, Any],
    command: str,
    hashes: Mapping[str, str],
    load_test: str = "left out",
) -> str:
    """The manifest's JSON text; without times or the output's path, so that a command writes the same bytes twice.

    Args:
        source: see ``fingerprint``.
        hashes: file name -> SHA-256 of every other file of the folder.
        load_test: whether a fresh process has loaded the folder as the model that was meant.
    """
    from spikepatch.apply.values.draw import gaussian

    probe = hashlib.sha256(gaussian(plan.seed, "probe", 0, 4096, 1.0).numpy().tobytes()).hexdigest()
    planned = plan.to_dict() | {"source": without_place(plan.source)}
    return _manifest(
        source, command, hashes, {"storage": storage, "load_test": load_test, "probe": probe, "plan": planned}
    )


def fold_manifest(
    record: Mapping[str, Any],
    source: Mapping[str, Any],
    command: str,
    hashes: Mapping[str, str],
    load_test: str = "left out",
) -> str:
    """The same for a folded model; ``record``: what config.json had recorded of the patch."""
    entries = {"storage": "plain", "load_test": load_test, "folded": dict(record)}
    return _manifest(source, command, hashes, entries)


def _manifest(source: Mapping[str, Any], command: str, hashes: Mapping[str, str], entries: Mapping[str, Any]) -> str:
    data = {
        "spikepatch": __version__,
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors", "numpy")},
        "command": command,
        "source": dict(source),
        **entries,
        "files": dict(sorted(hashes.items())),
    }
    return json.dumps(data | {"sha256": digest(data)}, indent=2) + "\n"


def digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's entries, but for ``sha256`` itself, however they are laid out."""
    rest = {name: value for name, value in data.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def command_line(given: Sequence[str], **options: object) -> str:
    """``spikepatch`` with these words and options; without options that are None or False.

    What is recorded in a folder has its sources by ``without_place``.
    """
    words = ["spikepatch", *given]
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def python_line(source: str, recipe: Recipe, options: Mapping[str, object]) -> str:
    """The same for a recipe that has no name and no file: ``python -c`` with all that builds it.

    Of one that is no data, such as one with a function of the caller's own, it is the call, with RECIPE in its place.
    """
    kinds = dict.fromkeys((Recipe, *map(type, recipe.transforms)))
    namespace = {kind.__name__: kind for kind in kinds}
    try:
        known = eval(repr(recipe), dict(namespace)) == recipe
    except Exception:  # whatever a repr that is no expression raises
        known = False
    whole = known and len(namespace) == len(kinds) and not any(kind.__module__ == "__main__" for kind in kinds)
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    arguments = [repr(without_place(source)), repr("OUT"), *(f"{name}={value!r}" for name, value in given.items())]
    call = f"spikepatch.convert({', '.join(arguments)}, recipe={repr(recipe) if whole else 'RECIPE'})"
    if not whole:
        return f"{call}  # RECIPE: {recipe.name!r}, which was passed as an object"
    imports = [f"from {kind.__module__} import {kind.__name__}" for kind in kinds]
    return shlex.join(["python", "-c", "; ".join(["import spikepatch", *imports, call])])


def fingerprint(source: Source, known: Mapping[Path, str] = MappingProxyType({})) -> dict[str, Any]:
    """What was read: the config, and the weights where any were.

    Args:
        known: SHA-256 of files that need not be read again.
    """
    data: dict[str, Any] = {
        "name": source.short_name,
        "kind": source.kind,
        "commit": source.commit,
        "config": hashlib.sha256(source.config.to_json_string().encode()).hexdigest(),
    }
    if source.checkpoint is not None:
        paths = [source.checkpoint.folder / shard for shard in source.checkpoint.shards]
        data["weights"] = {path.name: known.get(path) or file_hash(path) for path in paths}
    return data


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inherited_metadata(card: Path | None, hub_id: str | None, *, weights: bool = True) -> dict[str, Any]:
    """What the front matter of an output takes over of the source's card: licence, language, task; and the base model,
    whose weights it has.

    Args:
        card: README.md of the source, if it has one; a malformed one counts for nothing.
        hub_id: of the source, which is then the base model itself.
        weights: of the source, or some of them, are in the output.
    """
    from huggingface_hub.repocard import metadata_load

    data: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # written by hand: anything may be in there, or nothing
        if card is not None:
            read_file(card, within=card.parent, limit=_LARGEST_CARD)
            data = metadata_load(card) or {}
    from spikepatch.source.private import is_repository

    kept = {key: data[key] for key in _INHERITED if _is_text(data.get(key))}
    languages = data.get("language")
    if isinstance(languages, list) and languages and all(map(_is_text, languages)):
        kept["language"] = languages
    bases = [hub_id] if hub_id is not None else data.get("base_model")
    bases = [base for base in (bases if isinstance(bases, list) else [bases]) if is_repository(base)]
    return kept | ({"base_model": bases[0] if len(bases) == 1 else bases} if bases and weights else {})


def _is_text(value: object) -> bool:
    """A string that can be written in UTF-8."""
    return isinstance(value, str) and in_utf8(value)


def model_card(
    plan: Plan,
    *,
    trust: bool,
    auto_class: str,
    tokenizer: bool = False,
    title: str | None = None,
    inherited: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """README.md of the output: front matter by the hub's rules, and how to load it.

    Args:
        trust: it loads with ``trust_remote_code=True`` only.
        tokenizer: there is one. AutoTokenizer reads the config first, and without ``trust_remote_code`` it asks on a
            terminal whether the model's code is to be run.
        title: name of the source; by default that of the plan.
        inherited: see ``inherited_metadata``.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(library_name="transformers", tags=["spikepatch", plan.recipe], **inherited)
    weights = {
        "all": "**Fresh weights**: a model to pre-train. Learned weights of the source are not in it.",
        "residual": "Learned weights, with the residual projections drawn afresh: to be trained on before use.",
        "none": "Learned weights behind a larger shortcut: to be trained on, the function has changed.",
    }[plan.reinit]
    if plan.kept:
        weights = (
            "Learned weights in the towers, which compute features of images and sounds; **fresh weights** in all else."
        )
    lines = [f"{streams(plan)}, seed {plan.seed}", *parts(plan), *changes(plan, quote="`")]
    if plan.structural:
        lines.append(
            "not to be merged with a model that has another factor or none: merge tools take one model's config for all"
        )
    listed = "\n".join(f"- {line}" for line in lines)
    return f"""---
{data.to_yaml()}
---

# {title or without_place(plan.source)}, patched with spikepatch ({plan.recipe})

{weights}

{listed}

{_loading(auto_class, trust=trust, tokenizer=tokenizer)}

The recipe follows Takase et al., *Spike No More: Stabilizing the Pre-training of Large Language Models*
(arXiv 2312.16903). `{MANIFEST}` holds the whole plan, with seed, versions and checksums.
"""


def _loading(auto_class: str, *, trust: bool, tokenizer: bool) -> str:
    option = ", trust_remote_code=True" if trust else ""
    classes = {"model": auto_class} | ({"tokenizer": "AutoTokenizer"} if tokenizer else {})
    loaded = "\n".join(f'{name} = {each}.from_pretrained("PATH"{option})' for name, each in classes.items())
    return f"```python\nfrom transformers import {', '.join(classes.values())}\n\n{loaded}\n```"


def fold_card(
    tables: Sequence[str],
    *,
    trust: bool,
    auto_class: str,
    title: str,
    inherited: Mapping[str, Any],
    tokenizer: bool = False,
) -> str:
    """README.md of a folded model; arguments as in ``model_card``."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(library_name="transformers", tags=["spikepatch"], **inherited)
    changes = "\n".join(f"- `{table}`: holds its rows times their factor, or behind their norm" for table in tables)
    return f"""---
{data.to_yaml()}
---

# {title}, folded with spikepatch

The plain architecture, with the logits of the patched model that it was made from. For use: training on from here is
not the same as training the patched model on.

{changes}

{_loading(auto_class, trust=trust, tokenizer=tokenizer)}

`{MANIFEST}` holds what had been patched, with versions and checksums.
"""
