"""The modelling files of a patched checkpoint: the template with its stand-ins replaced, and the runtime beside it."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import libcst as cst
import libcst.matchers as m

from spikepatch.apply.original import Original, is_remote, stem
from spikepatch.errors import Refused

#: The stand-ins of runtime/template.py.
_CONFIG, _BASE, _MODEL = "GPT2Config", "GPT2Model", "GPT2LMHeadModel"
_AUTO_CLASS, _MODEL_TYPE, _RUNTIME = "AutoModelForCausalLM", "spikepatch_gpt2", "embedding"
_PATCHED = {_CONFIG: "PatchedConfig", _BASE: "PatchedModel", _MODEL: "PatchedForCausalLM"}

#: Unlike `embedding.py`, no file of a model repository is called so.
_RUNTIME_FILE = "spikepatch_embedding"


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
    template = cst.parse_module(_runtime_source("template"))
    return {
        f"{module_name(original)}.py": template.visit(_Substitution(original)).code,
        f"{_RUNTIME_FILE}.py": _runtime_source(_RUNTIME),
    }


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


def stored_as_code(record: Mapping[str, Any]) -> bool:
    """The model of this ``config.spikepatch`` runs on generated files."""
    return "auto_map" in record["original"]


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


def class_name(original: type) -> str:
    """The generated class that derives from ``original``."""
    return f"Spikepatch{original.__name__}"


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


class _Substitution(m.MatcherDecoratableTransformer):
    """Stand-ins become the names of an architecture; what concerns a missing base class goes."""

    def __init__(self, original: Original) -> None:
        super().__init__()
        self.originals = {_CONFIG: original.config, _BASE: original.base, _MODEL: original.model}
        self.names = {_AUTO_CLASS: original.auto_class}
        for stand_in, cls in self.originals.items():
            if cls is not None:
                self.names |= {stand_in: cls.__name__, _PATCHED[stand_in]: class_name(cls)}
        self.model_type = f"spikepatch_{original.model_type}"

    @m.leave(m.Name())
    def rename(self, original: cst.Name, node: cst.Name) -> cst.Name:
        return node.with_changes(value=self.names.get(node.value, node.value))

    @m.leave(m.SimpleString())
    def replace_text(self, original: cst.SimpleString, node: cst.SimpleString) -> cst.SimpleString:
        if node.evaluated_value == _MODEL_TYPE:
            return cst.SimpleString(repr(self.model_type))
        if node.value.startswith('"""'):  # a docstring, whose words are replaced by identifiers only
            return cst.SimpleString(re.sub(r"\w+", lambda word: self.names.get(word[0], word[0]), node.value))
        return node

    @m.leave(m.ClassDef(name=m.Name(_PATCHED[_BASE])))
    def drop_missing_base(self, original: cst.ClassDef, node: cst.ClassDef) -> cst.ClassDef | cst.RemovalSentinel:
        return node if self.originals[_BASE] is not None else cst.RemoveFromParent()

    @m.leave(m.Module())
    def import_originals(self, original: cst.Module, node: cst.Module) -> cst.Module:
        dotted = [m.matches(line, m.SimpleStatementLine([m.ImportFrom(module=m.Attribute())])) for line in node.body]
        first = dotted.index(True)
        lines = _imports([c for c in self.originals.values() if c is not None])
        lines[0] = lines[0].with_changes(leading_lines=original.body[first].leading_lines)
        others = [line for line, is_dotted in zip(node.body, dotted, strict=True) if not is_dotted]
        return node.with_changes(body=[*others[:first], *lines, *others[first:]])

    @m.leave(m.ImportFrom(module=m.Name(_RUNTIME), relative=[m.Dot()]))
    def import_runtime(self, original: cst.ImportFrom, node: cst.ImportFrom) -> cst.ImportFrom:
        return node.with_changes(module=cst.Name(_RUNTIME_FILE))

    @m.leave(m.TrailingWhitespace(comment=m.Comment(m.MatchRegex("# type: ignore.*"))))
    def drop_comment(self, original: cst.TrailingWhitespace, node: cst.TrailingWhitespace) -> cst.TrailingWhitespace:
        return cst.TrailingWhitespace()


def _imports(classes: list[type]) -> list[cst.SimpleStatementLine]:
    """``from module import A, B``, a line for each module; of files that lie beside, ``from .module``."""
    lines = []
    for module, dots in sorted({_place(c) for c in classes}, key=lambda place: (len(place[1]), place[0])):
        path = cst.parse_expression(module)
        assert isinstance(path, (cst.Attribute, cst.Name)), module
        aliases = [
            cst.ImportAlias(cst.Name(c)) for c in sorted({c.__name__ for c in classes if _place(c)[0] == module})
        ]
        imported = cst.ImportFrom(module=path, names=aliases, relative=[cst.Dot() for _ in dots])
        lines.append(cst.SimpleStatementLine([imported]))
    return lines


def _place(cls: type) -> tuple[str, str]:
    """(module, dots before it) from where generated code imports ``cls``."""
    return (stem(cls), ".") if is_remote(cls) else (cls.__module__, "")


def _runtime_source(module: str) -> str:
    return (resources.files("spikepatch.runtime") / f"{module}.py").read_text(encoding="utf-8")


def _identifiers(names: Iterable[str]) -> bool:
    return all(name.isidentifier() and not keyword.iskeyword(name) for name in names)


def _not_importable(model_class: type) -> Refused:
    return Refused(
        what="the model's class cannot be imported by its name",
        where=f"{model_class.__module__}.{model_class.__qualname__}",
        why="generated code derives from the class, which must be a plain name at the top level of its module",
        remedy="use a class of transformers, or one at the top level of a file whose name is an identifier",
    )
