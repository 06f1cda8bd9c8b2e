"""The template of a patched model's file with its stand-ins replaced, as syntax and not as text."""

from __future__ import annotations

import re

import libcst as cst
import libcst.matchers as m

from spikepatch.source.classes import Original, class_name, is_remote, stem

#: The stand-ins of runtime/template.py.
_CONFIG, _BASE, _MODEL = "GPT2Config", "GPT2Model", "GPT2LMHeadModel"
_AUTO_CLASS, _MODEL_TYPE = "AutoModelForCausalLM", "spikepatch_gpt2"
_PATCHED = {_CONFIG: "PatchedConfig", _BASE: "PatchedModel", _MODEL: "PatchedForCausalLM"}


def substituted(template: str, original: Original) -> str:
    """The source of runtime/template.py, with the classes of ``original`` in place of its stand-ins."""
    return cst.parse_module(template).visit(_Substitution(original)).code


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
