"""The modelling files of a patched checkpoint: the template with its stand-ins replaced, and the runtime beside it."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from types import ModuleType
from typing import Any

import libcst as cst
import libcst.matchers as m

from spikepatch.errors import Refused

#: The stand-ins of runtime/template.py.
_CONFIG, _BASE, _MODEL = "GPT2Config", "GPT2Model", "GPT2LMHeadModel"
_AUTO_CLASS, _MODEL_TYPE, _RUNTIME = "AutoModelForCausalLM", "spikepatch_gpt2", "embedding"
_PATCHED = {_CONFIG: "PatchedConfig", _BASE: "PatchedModel", _MODEL: "PatchedForCausalLM"}

#: Unlike `embedding.py`, no file of a model repository is called so.
_RUNTIME_FILE = "spikepatch_embedding"

#: Where a class is the head of several auto classes, the one that names its task best.
_PREFERRED = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")


@dataclass(frozen=True)
class Original:
    """The transformers classes that a generated file derives from.

    Attributes:
        model: the class that is patched, with its head if it has one.
        base: the class that ``AutoModel`` gives for the same config; None where that is ``model`` itself.
        config: the config class.
        auto_class: the name of the auto class that loads ``model``.
    """

    model: type
    base: type | None
    config: type
    auto_class: str


def original_of(model_class: type, config_class: type | None = None) -> Original:
    """Look ``model_class`` up in transformers' auto classes.

    Args:
        model_class: a model class of transformers.
        config_class: the config in use; by default, the one that the class declares.

    Raises:
        Refused: the class is patched already, is not transformers' own, or no auto class loads it.
    """
    from transformers.models.auto import modeling_auto

    config_class = config_class or getattr(model_class, "config_class", None)
    if config_class is None or not _is_own(model_class) or not _is_own(config_class):
        raise _not_own(model_class)
    heads = {name: _classes(modeling_auto, name, config_class) for name in _auto_classes(modeling_auto)}
    auto_class = next((name for name, classes in heads.items() if model_class in classes), None)
    if auto_class is None:
        raise Refused(
            what="no auto class of transformers loads this model",
            where=model_class.__name__,
            why="a patched checkpoint that needs code is found through the auto classes",
            remedy="patch the model class that AutoModelForCausalLM or another auto class gives for this config",
        )
    base = next((c for c in heads["AutoModel"] if c is not model_class), None) if auto_class != "AutoModel" else None
    return Original(model_class, base, config_class, auto_class)


def render(original: Original) -> dict[str, str]:
    """The files to put beside the weights: file name -> text.

    Names reach the code as syntax nodes, after a check that they are identifiers; the model type as a literal.

    Raises:
        Refused: a class cannot be imported by its name.
    """
    for model_class in filter(None, (original.config, original.base, original.model)):
        if model_class.__qualname__ != model_class.__name__ or not _identifiers(
            (model_class.__name__, *model_class.__module__.split("."))
        ):
            raise _not_importable(model_class)
    assert _identifiers((original.auto_class,)), original.auto_class
    template = cst.parse_module(_runtime_source("template"))
    return {
        f"{module_name(original)}.py": template.visit(_Substitution(original)).code,
        f"{_RUNTIME_FILE}.py": _runtime_source(_RUNTIME),
    }


def module_name(original: Original) -> str:
    """The module of the generated classes: ``qwen2-vl`` -> ``modeling_spikepatch_qwen2_vl``."""
    return "modeling_spikepatch_" + re.sub(r"[^a-z0-9]", "_", _type_of(original).lower())


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
    tokenizer = TOKENIZER_MAPPING_NAMES.get(_type_of(original))
    # transformers replaces the Mistral backend by the general one for folders without a tekken.json.
    general = tokenizer is None or tokenizer == "MistralCommonBackend"
    return {
        "model_type": f"spikepatch_{_type_of(original)}",
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
        self.model_type = f"spikepatch_{_type_of(original)}"

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
        lines: list[cst.BaseStatement] = [*_imports([c for c in self.originals.values() if c is not None])]
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
    """``from module import A, B``, a line for each module."""
    lines = []
    for module in sorted({c.__module__ for c in classes}):
        names = sorted({c.__name__ for c in classes if c.__module__ == module})
        path = cst.parse_expression(module)
        assert isinstance(path, (cst.Attribute, cst.Name)), module
        aliases = [cst.ImportAlias(cst.Name(name)) for name in names]
        lines.append(cst.SimpleStatementLine([cst.ImportFrom(module=path, names=aliases)]))
    return lines


def _runtime_source(module: str) -> str:
    return (resources.files("spikepatch.runtime") / f"{module}.py").read_text(encoding="utf-8")


def _type_of(original: Original) -> str:
    model_type: str = original.config.model_type  # type: ignore[attr-defined]
    return model_type


def _identifiers(names: Iterable[str]) -> bool:
    return all(name.isidentifier() and not keyword.iskeyword(name) for name in names)


def _auto_classes(modeling_auto: ModuleType) -> list[str]:
    others = sorted(name for name in vars(modeling_auto) if name.startswith("AutoModel") and name not in _PREFERRED)
    return [*_PREFERRED, *others]


def _classes(modeling_auto: ModuleType, auto_class: str, config_class: type) -> tuple[type, ...]:
    mapping = getattr(getattr(modeling_auto, auto_class), "_model_mapping", None)
    found = mapping.get(config_class, None) if mapping is not None else None
    return found if isinstance(found, tuple) else (found,) if found is not None else ()


def _is_own(model_class: type) -> bool:
    return model_class.__module__.startswith("transformers.")


def _not_own(model_class: type) -> Refused:
    if model_class.__name__.startswith("Spikepatch"):
        return Refused(
            what="the model is patched already",
            where=model_class.__name__,
            why="a second factor or norm would multiply with the first",
            remedy="patch the source that it was made from",
        )
    return Refused(
        what="the model's code is not part of transformers",
        where=f"{model_class.__module__}.{model_class.__qualname__}",
        why="the patched checkpoint derives from the model's class, and can only import classes of transformers",
        remedy="use a model class of transformers; re-initialisation alone (storage route `plain`) needs no code",
    )


def _not_importable(model_class: type) -> Refused:
    return Refused(
        what="the model's class cannot be imported by its name",
        where=f"{model_class.__module__}.{model_class.__qualname__}",
        why="generated code derives from the class, which must be a plain name at the top level of its module",
        remedy="use a model class that transformers has",
    )
