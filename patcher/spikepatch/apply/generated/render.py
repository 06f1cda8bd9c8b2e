"""The modelling files of a patched checkpoint: the template with its stand-ins replaced, and the runtime beside it."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from spikepatch.errors import Refused
from spikepatch.source.classes import Original, class_name, is_remote, stem

#: The files of ``runtime`` that lie beside a generated one; each is called so, and begins with this, there.
_RUNTIME = ("embedding", "fresh", "model")
_PREFIX = "spikepatch_"


def render(original: Original) -> dict[str, str]:
    """The files to put beside the weights: file name -> text.

    Names reach the code as syntax nodes, after a check that they are identifiers; the model type as a literal.

    Raises:
        Refused: a class cannot be imported by its name.
    """
    for model_class in original.classes:
        path = stem(model_class) if is_remote(model_class) else model_class.__module__
        if model_class.__qualname__ != model_class.__name__ or not _identifiers(
            (model_class.__name__, *path.split("."))
        ):
            raise _not_importable(model_class)
    assert _identifiers((original.auto_class,)), original.auto_class
    from spikepatch.apply.generated.substitution import substituted  # libcst takes 0.3 s, and most models need no code

    return {
        f"{module_name(original)}.py": substituted(_runtime_source("template"), original),
        **{f"{_PREFIX}{module}.py": _runtime_source(module) for module in _RUNTIME},
    }


def completed(record: Mapping[str, Any], original: Original, replaced: Mapping[str, Any]) -> dict[str, Any]:
    """``record`` of a plan as config.json holds it, where the model runs on generated files.

    A class of the original type that is asked for by its name, such as ``LlamaForCausalLM.from_pretrained(folder)``,
    sees another type, and looks for a part of the config that is of its own: it finds this, and a dtype that says what
    to do, at which transformers stops. Else it would load plain weights, and say so in a line that is easily
    overlooked.

    Args:
        replaced: see ``original_entries``.
    """
    stop = {
        "model_type": original.model_type,
        "dtype": f"this folder holds a patched model, which {original.model.__name__} by itself leaves unpatched. Load"
        f" it with {original.auto_class}.from_pretrained(folder, trust_remote_code=True)",
    }
    return {**record, "original": dict(replaced), **(stop if original.model_type else {})}


def original_entries(original: Original, config: Any) -> dict[str, Any]:
    """The entries of config.json that ``config_entries`` replaces, as they were; None: there was none.

    Code that came from a repository of its own (``repository--module.Class``) lies beside the weights from now on.
    """
    auto_map = getattr(config, "auto_map", None)
    return {
        "model_type": original.model_type,
        "architectures": [original.model.__name__],
        "auto_map": auto_map and {auto: _beside(reference) for auto, reference in auto_map.items()},
        "tokenizer_class": getattr(config, "tokenizer_class", None),
    }


def check_generated(folder: Path, original: Original) -> None:
    """The generated files in ``folder`` are those that this version writes, so what they do is known without a run.

    Raises:
        Refused: a file is missing, has been edited, or is another version's.
    """
    for name, text in render(original).items():
        file = folder / name
        if not file.is_file() or file.read_bytes() != text.encode():
            raise Refused(
                what=f"{name} is not the file that this version of spikepatch writes",
                where=str(folder),
                why="it has been edited, is missing, or was written by another version; code is compared, and never "
                "run, so what the model computes is not known",
                remedy="use the version of spikepatch that wrote the folder (see config.json), or restore the file",
            )


def _beside(reference: Any) -> Any:
    if isinstance(reference, (list, tuple)):
        return [_beside(one) for one in reference]
    return reference.rpartition("--")[2] if isinstance(reference, str) else reference


def module_name(original: Original) -> str:
    """The module of the generated classes: ``qwen2-vl`` -> ``modeling_spikepatch_qwen2_vl``."""
    return "modeling_spikepatch_" + re.sub(r"[^a-z0-9]", "_", original.model_type.lower())


def config_entries(original: Original) -> dict[str, Any]:
    """What ``config.json`` must say, apart from ``spikepatch`` itself, for the folder to load patched.

    ``tokenizer_class`` is there because AutoTokenizer looks the model type up where ``tokenizer_config.json`` names no
    class; do not put it over one that the source's config names.
    """
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    module = module_name(original)
    heads = {"AutoConfig": original.config, "AutoModel": original.base}
    heads[original.auto_class] = original.model
    tokenizer = TOKENIZER_MAPPING_NAMES.get(original.model_type)
    # transformers replaces the Mistral backend by the general one for folders without a tekken.json.
    general = tokenizer is None or tokenizer == "MistralCommonBackend"
    return {
        "model_type": f"spikepatch_{original.model_type}",
        "architectures": [class_name(original.model)],
        "auto_map": {auto: f"{module}.{class_name(cls)}" for auto, cls in heads.items() if cls is not None},
        "tokenizer_class": "TokenizersBackend" if general else tokenizer,
    }


def _runtime_source(module: str) -> str:
    """Its text, with the names that the files have beside a model: no file of a model repository is called so."""
    text = (resources.files("spikepatch.runtime") / f"{module}.py").read_text(encoding="utf-8")
    return re.sub(rf"(?m)^from \.({'|'.join(_RUNTIME)}) import", rf"from .{_PREFIX}\1 import", text)


def _identifiers(names: Iterable[str]) -> bool:
    return all(name.isidentifier() and not keyword.iskeyword(name) for name in names)


def _not_importable(model_class: type) -> Refused:
    return Refused(
        what="the model's class cannot be imported by its name",
        where=f"{model_class.__module__}.{model_class.__qualname__}",
        why="generated code derives from the class, which must be a plain name at the top level of its module",
        remedy="use a class of transformers, or one at the top level of a file whose name is an identifier",
    )
