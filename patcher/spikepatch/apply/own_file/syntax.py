"""A Python file and its syntax tree: where things stand, what names mean, and splices that leave every other byte."""

from __future__ import annotations

import itertools
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import libcst as cst
from libcst import metadata
from libcst.codemod import CodemodContext
from libcst.codemod.visitors import AddImportsVisitor

from spikepatch.errors import BadSource

_NEWLINE = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Splice:
    """Characters ``start`` to ``end`` of the file become ``text``."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Parsed:
    """A file and its syntax tree. ``starts``: offset of each line, ``newline``: as most of the file has it."""

    file: str
    text: str
    module: cst.Module
    lines: tuple[str, ...]
    starts: tuple[int, ...]
    newline: str
    positions: Mapping[cst.CSTNode, metadata.CodeRange]
    outer: Mapping[cst.CSTNode, metadata.CodeRange]
    names: Mapping[cst.CSTNode, Any]
    parents: Mapping[cst.CSTNode, cst.CSTNode]
    scopes: Mapping[cst.CSTNode, metadata.Scope | None]

    def line(self, number: int) -> str:
        """Line ``number``, from 1, without its end; "" behind the last one."""
        return self.lines[number - 1] if number <= len(self.lines) else ""

    def offset(self, position: metadata.CodePosition) -> int:
        return self.starts[position.line - 1] + position.column

    def qualified(self, node: cst.CSTNode) -> set[str]:
        """The full names that ``node`` may stand for, by the file's imports and definitions."""
        found = self.names.get(node, ())
        return {name.name for name in (found() if callable(found) else found)}

    def where(self, line: int) -> str:
        return f"{self.file}, line {line}"

    def start_line(self, node: cst.CSTNode) -> int:
        return self.positions[node].start.line


def parse(file: str, text: str) -> Parsed:
    """Parse a file.

    Raises:
        BadSource: it is not valid Python, for the interpreter that runs or for libcst.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, file, "exec", dont_inherit=True)
        wrapper = metadata.MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True)
    except (SyntaxError, ValueError, cst.ParserSyntaxError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else getattr(error, "raw_line", 1)
        raise BadSource(
            "the file is not valid Python",
            where=f"{file}, line {line}",
            why=str(getattr(error, "msg", None) or getattr(error, "message", None) or error).partition("\n")[0],
            remedy="give a file that this version of Python compiles",
        ) from error
    starts = (0, *(found.end() for found in _NEWLINE.finditer(text)))
    newlines = Counter(_NEWLINE.findall(text))
    return Parsed(
        file,
        text,
        wrapper.module,
        tuple(_NEWLINE.split(text)),
        starts,
        newlines.most_common(1)[0][0] if newlines else "\n",
        wrapper.resolve(metadata.PositionProvider),
        wrapper.resolve(metadata.WhitespaceInclusivePositionProvider),
        wrapper.resolve(metadata.QualifiedNameProvider),
        wrapper.resolve(metadata.ParentNodeProvider),
        wrapper.resolve(metadata.ScopeProvider),
    )


def splice(text: str, edits: Iterable[Splice]) -> str:
    """``text`` with all ``edits``, which do not overlap; of those at one place the first comes first."""
    ordered = sorted(edits, key=lambda edit: (edit.start, edit.end))
    assert all(a.end <= b.start for a, b in itertools.pairwise(ordered)), ordered
    pieces, at = [], 0
    for edit in ordered:
        pieces += [text[at : edit.start], edit.text]
        at = edit.end
    return "".join([*pieces, text[at:]])


def spelled(parsed: Parsed, target: str) -> str | None:
    """How the file, by its imports at the top level, can write ``target``: ``torch.nn`` -> ``nn``."""
    found: list[str] = []
    for small in _imports(parsed):
        if isinstance(small.names, cst.ImportStar):
            continue
        source = _dotted(small.module) if isinstance(small, cst.ImportFrom) and not small.relative else ""
        if isinstance(small, cst.ImportFrom) and not source:
            continue
        for alias in small.names:
            full = f"{source}.{alias.evaluated_name}" if source else alias.evaluated_name
            name = alias.evaluated_alias or alias.evaluated_name
            if not source and alias.evaluated_alias is None:
                full = name = full.partition(".")[0]
            if target == full or target.startswith(full + "."):
                found.append(name + target.removeprefix(full))
    return min(found, key=len, default=None)


def with_imports(text: str, modules: Iterable[str]) -> str:
    """``text`` with ``import module`` behind its own imports, for each; libcst places them."""
    context = CodemodContext()
    for module in modules:
        AddImportsVisitor.add_needed_import(context, module)
    return AddImportsVisitor(context).transform_module(cst.parse_module(text)).code


def _imports(parsed: Parsed) -> list[cst.Import | cst.ImportFrom]:
    lines = [line for line in parsed.module.body if isinstance(line, cst.SimpleStatementLine)]
    return [small for line in lines for small in line.body if isinstance(small, (cst.Import, cst.ImportFrom))]


def _dotted(node: cst.BaseExpression | None) -> str:
    return cst.Module([]).code_for_node(node) if node is not None else ""


def bound_at(parsed: Parsed, name: str) -> int | None:
    """The line that binds ``name`` at the top level; None where it is free."""
    scope = parsed.scopes[parsed.module.body[0]] if parsed.module.body else None
    assignments = scope[name] if scope is not None else ()
    lines = [parsed.start_line(a.node) for a in assignments if isinstance(a, metadata.Assignment)]
    return min(lines, default=None)
