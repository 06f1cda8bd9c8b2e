"""Where in a file an edit goes: libcst finds the place, and the edit is a splice, so every other byte stays as it is."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import libcst as cst
import libcst.matchers as m
from libcst import metadata

from spikepatch.apply.construction import Built, Span
from spikepatch.errors import BadSource, Refused

_NEWLINE = re.compile(r"\r\n|\r|\n")
_EMBEDDINGS = {"torch.nn.Embedding", "torch.nn.modules.sparse.Embedding"}


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
            why=str(getattr(error, "msg", None) or getattr(error, "message", None) or error).splitlines()[0],
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
    assert all(a.end <= b.start for a, b in zip(ordered, ordered[1:], strict=False)), ordered
    pieces, at = [], 0
    for edit in ordered:
        pieces += [text[at : edit.start], edit.text]
        at = edit.end
    return "".join([*pieces, text[at:]])


def construction_of(parsed: Parsed, built: Built, module: str) -> cst.Call:
    """The call that builds the embedding at the path ``module``, and no other one.

    Of the calls whose value the embedding was, from its constructor outwards, it is the first that gave this one alone,
    in a function that the file mentions once; else the last that gave this one alone. A helper that is called again
    elsewhere is so left as it is, though under this configuration the other call may not have run.

    Raises:
        Refused: there is no such call in the file, or the module is no plain ``nn.Embedding``.
    """
    kind = built.embeddings.get(module)
    if kind is None:
        raise Refused(
            what=f"{module} is no nn.Embedding",
            where=parsed.file,
            why="its table is looked up by other code, whose output has no single expression to change",
            remedy="build it as an nn.Embedding, or use the recipe vanilla",
        )
    calls = built.calls[module]
    if kind not in _EMBEDDINGS:
        raise Refused(
            what=f"{module} is a {kind.rpartition('.')[2]}, not a plain nn.Embedding",
            where=_where(parsed, calls),
            why="the forward of that class would be lost or applied in an unknown order",
            remedy="build it as an nn.Embedding, or use the recipe vanilla",
        )
    if not calls:
        raise Refused(
            what=f"no line constructs {module}",
            where=parsed.file,
            why="the module was copied or unpickled, not built by a call that the factory makes",
            remedy="use a factory that builds the model with its constructor",
        )
    here = [span for span in calls if span.file == parsed.file]
    if not here:
        raise Refused(
            what=f"{module} is constructed in another file",
            where=f"{calls[0].file}, line {calls[0].line}",
            why=f"only {parsed.file} is edited",
            remedy="give that file, if it defines the model's class, or construct the embedding in the class's own file",
        )
    users = {
        span: sorted(name for name, spans in built.calls.items() if name in built.embeddings and span in spans)
        for span in here
    }
    alone = [span for span in here if users[span] == [module]]
    if not alone:
        others = [name for name in users[here[-1]] if name != module]
        raise Refused(
            what=f"no expression constructs {module} alone",
            where=parsed.where(here[-1].line),
            why=f"the same expression constructs {', '.join(others[:3])}, as in a loop or a shared helper",
            remedy="construct the token embedding in an expression of its own",
        )
    span = next((span for span in alone if _mentions(parsed, span.function) <= 1), alone[-1])
    node = _node_at(parsed, span, cst.Call, at_end=True)
    if node is None:
        raise Refused(
            what=f"the expression that constructs {module} is not a call",
            where=parsed.where(span.line),
            why="what Python was evaluating there matches no call in the source",
            remedy="construct the embedding by a plain call, such as self.tokens = nn.Embedding(rows, width)",
        )
    assert isinstance(node, cst.Call)
    return node


def _where(parsed: Parsed, calls: Sequence[Span]) -> str:
    return f"{calls[0].file}, line {calls[0].line}" if calls else parsed.file


def _mentions(parsed: Parsed, function: str) -> int:
    """How often the file names ``function``, apart from its definitions; constructors are known by their class."""
    if not function.isidentifier() or (function.startswith("__") and function.endswith("__")):
        return 0
    names: Sequence[cst.CSTNode] = m.findall(parsed.module, m.Name(function))
    definitions = m.findall(parsed.module, m.FunctionDef(name=m.Name(function)))
    return len(names) - len(definitions)


def _node_at(parsed: Parsed, span: Span, kind: type[cst.CSTNode], *, at_end: bool) -> cst.CSTNode | None:
    """The node of this kind that ends (or begins) where ``span`` does.

    No two calls end at one place; where they begin, Python 3.11 says otherwise for methods that stand on a line of their own.
    """
    for node, found in parsed.positions.items():
        if isinstance(node, kind):
            position = found.end if at_end else found.start
            before = len(parsed.line(position.line)[: position.column].encode())
            wanted = (span.end_line, span.end_column) if at_end else (span.line, span.column)
            if (position.line, before) == wanted:
                return node
    return None


def wrap(parsed: Parsed, call: cst.Call, class_name: str) -> tuple[list[Splice], bool]:
    """``nn.Embedding(...)`` -> ``Class(...)``, anything else -> ``Class.of(...)``; True where it is the latter."""
    names = parsed.qualified(call.func)
    if names and names <= _EMBEDDINGS:
        found = parsed.positions[call.func]
        return [Splice(parsed.offset(found.start), parsed.offset(found.end), class_name)], False
    found = parsed.positions[call]
    start, end = parsed.offset(found.start), parsed.offset(found.end)
    return [Splice(start, start, f"{class_name}.of("), Splice(end, end, ")")], True


def untie(parsed: Parsed, built: Built, head: str, embedding: str) -> Splice:
    """Turn the assignment that ties ``head`` to ``embedding`` into a comment.

    Raises:
        Refused: it is not in the file, or does not stand alone in its statement.
    """
    span = built.ties.get(head) or built.ties.get(embedding)
    if span is None or span.file != parsed.file:
        raise Refused(
            what=f"the statement that ties {head} to {embedding} is not in the file",
            where=parsed.file if span is None else f"{span.file}, line {span.line}",
            why="no assignment in it put the one parameter in the place of the other",
            remedy="build the model with an untied head (in a transformers config: tie_word_embeddings=False)",
        )
    target = _node_at(parsed, span, cst.Attribute, at_end=True)
    small = parsed.parents[parsed.parents[target]] if target is not None else None
    line = parsed.parents[small] if small is not None else None
    if not (
        isinstance(small, cst.Assign)
        and len(small.targets) == 1
        and isinstance(line, cst.SimpleStatementLine)
        and len(line.body) == 1
        and parsed.positions[line].start.line == parsed.positions[line].end.line
    ):
        raise Refused(
            what=f"the statement that ties {head} to {embedding} cannot be taken out",
            where=parsed.where(span.line),
            why="it is not a plain assignment on a line of its own",
            remedy="write it as one, such as self.head.weight = self.tokens.weight, or leave --untie out",
        )
    block: Any = parsed.parents[line]
    found = parsed.positions[line]
    start, end = parsed.offset(found.start), parsed.offset(found.end)
    lonely = "pass  " if len(block.body) == 1 else ""
    return Splice(start, end, f"{lonely}# untied: {parsed.text[start:end]}")


def at_end_of_init(parsed: Parsed, built: Built, call: str) -> Splice:
    """``call(self)`` as the last statement of the built class's ``__init__``; a class that inherits it gets one.

    Raises:
        Refused: the class or its ``__init__`` is not found in the file, or does not always reach its end.
    """
    root = class_definition(parsed, built)
    body = root.body
    if built.init_line < 0 or not isinstance(body, cst.IndentedBlock):
        raise Refused(
            what=f"the initialiser cannot be called in {built.class_name}",
            where=parsed.where(parsed.start_line(root)),
            why="its __init__ is defined elsewhere" if built.init_line < 0 else "the class is written on one line",
            remedy="write the __init__ out in the class",
        )
    if not built.init_line:
        indent, step = _indent(parsed, body), parsed.module.default_indent
        lines = ["", "def __init__(self, *args, **kwargs):"]
        lines += [f"{step}super().__init__(*args, **kwargs)", f"{step}{call}(self)"]
        return _after(parsed, body, [indent + line if line else "" for line in lines])
    function = next(
        (f for f in body.body if m.matches(f, m.FunctionDef(name=m.Name("__init__"))) and _begins(parsed, f, built)),
        None,
    )
    if not isinstance(function, cst.FunctionDef) or not isinstance(function.body, cst.IndentedBlock):
        raise Refused(
            what=f"the initialiser cannot be called in {built.class_name}",
            where=parsed.where(built.init_line),
            why="its __init__ is not a plain function with a block of statements",
            remedy="write the __init__ out in the class",
        )
    returns = _Returns()
    function.body.visit(returns)
    if returns.found:
        raise Refused(
            what=f"{built.class_name}.__init__ can return early",
            where=parsed.where(parsed.start_line(returns.found[0])),
            why="an initialiser at its end would not always run",
            remedy="let it run to its end, with if and else in place of return",
        )
    parameters = [*function.params.posonly_params, *function.params.params]
    name = parameters[0].name.value if parameters else "self"
    return _after(parsed, function.body, [f"{_indent(parsed, function.body)}{call}({name})"])


class _Returns(cst.CSTVisitor):
    """The return statements of a function itself, not of those inside it."""

    def __init__(self) -> None:
        self.found: list[cst.Return] = []

    def visit_Return(self, node: cst.Return) -> None:  # noqa: N802
        self.found.append(node)

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:  # noqa: N802
        return False

    def visit_ClassDef(self, node: cst.ClassDef) -> bool:  # noqa: N802
        return False


def class_definition(parsed: Parsed, built: Built) -> cst.ClassDef:
    """The one definition that has the qualified name of the built model's class.

    Raises:
        Refused: there is none, or several.
    """
    found = [
        node
        for node in m.findall(parsed.module, m.ClassDef())
        if parsed.qualified(node) == {built.class_name}
    ]
    if len(found) != 1:
        raise Refused(
            what=f"{len(found)} definitions of the class {built.class_name}",
            where=parsed.file,
            why="which of them is built is not known" if found else "the class is made by other means than a statement",
            remedy="define the class once, by a class statement",
        )
    assert isinstance(found[0], cst.ClassDef)
    return found[0]


def _begins(parsed: Parsed, function: cst.BaseStatement, built: Built) -> bool:
    assert isinstance(function, cst.FunctionDef)
    first = function.decorators[0] if function.decorators else function
    return built.init_line in {parsed.start_line(first), parsed.start_line(function)}


def _indent(parsed: Parsed, block: cst.IndentedBlock) -> str:
    found = re.match(r"[ \t\f]*", parsed.line(parsed.start_line(block.body[0])))
    assert found is not None
    return found[0]


def _after(parsed: Parsed, block: cst.IndentedBlock, lines: list[str]) -> Splice:
    """``lines`` behind the last statement of ``block``, and behind the comments that belong to it."""
    end = parsed.positions[block.body[-1]].end
    last = end.line - (end.column == 0)
    indent = _indent(parsed, block)
    while re.match(re.escape(indent) + r"[ \t]*#", parsed.line(last + 1)):
        last += 1
    text = parsed.newline.join(lines)
    if last < len(parsed.starts):
        return Splice(parsed.starts[last], parsed.starts[last], text + parsed.newline)
    return Splice(len(parsed.text), len(parsed.text), parsed.newline + text)  # the file ends without a newline


def before_statement(parsed: Parsed, nodes: Sequence[cst.CSTNode], lines: Sequence[str]) -> Splice:
    """Definitions in front of the first top-level statement that holds one of ``nodes``, and of its comments.

    ``lines`` are indented by fours; in the file they are as the rest of it.
    """
    step = parsed.module.default_indent
    text = "".join(re.sub("^( {4})+", lambda found: step * (len(found[0]) // 4), ln) + parsed.newline for ln in lines)
    top = [_top_level(parsed, node) for node in nodes]
    first = min(top, key=parsed.start_line)
    start = parsed.offset(parsed.outer[first].start)
    index = parsed.module.body.index(first)
    if not index:  # comments at the head of the file are the module's, not the statement's
        start = parsed.offset(parsed.positions[first].start)
    lead = parsed.newline * 2 if index else ""
    blank = re.match(r"[ \t\f]*(\r\n|\r|\n)", parsed.text[start:])
    return Splice(start, start, lead + text + ("" if blank else parsed.newline * 2))


def _top_level(parsed: Parsed, node: cst.CSTNode) -> cst.CSTNode:
    while not isinstance(parsed.parents[node], cst.Module):
        node = parsed.parents[node]
    return node


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


def import_splice(parsed: Parsed, line: str) -> Splice | None:
    """``line`` in front of the first import at the top level, ``__future__`` apart; None where there is no import."""
    for small in _imports(parsed):
        if isinstance(small, cst.ImportFrom) and small.module is not None and _dotted(small.module) == "__future__":
            continue
        start = parsed.starts[parsed.start_line(parsed.parents[small]) - 1]
        return Splice(start, start, line + parsed.newline)
    return None


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
