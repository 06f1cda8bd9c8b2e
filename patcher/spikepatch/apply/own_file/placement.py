"""Where in a file an edit goes: by the calls that were seen to build the model, never by names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import libcst as cst
import libcst.matchers as m

from spikepatch.apply.own_file.build import Built
from spikepatch.apply.own_file.call_sites import Span
from spikepatch.apply.own_file.syntax import Parsed, Splice
from spikepatch.errors import Refused

_EMBEDDINGS = {"torch.nn.Embedding", "torch.nn.modules.sparse.Embedding"}


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
            remedy="construct the embedding in the file of the model's class, and give that file",
        )
    users = {span: [name for name, spans in built.calls.items() if span in spans] for span in here}
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
    node = _ending_at(parsed, span, cst.Call)
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


def _ending_at(parsed: Parsed, span: Span, kind: type[cst.CSTNode]) -> cst.CSTNode | None:
    """The node of this kind that ends where ``span`` does: no two calls do, and no two attributes.

    Where a span begins differs: of a method on a line of its own, Python 3.11 takes that line.
    """
    for node, found in parsed.positions.items():
        if isinstance(node, kind) and found.end.line == span.end_line:
            before = parsed.lines[span.end_line - 1][: found.end.column]
            if len(before.encode()) == span.end_column:
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
    target = _ending_at(parsed, span, cst.Attribute)
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
    own = parsed.scopes[function.body.body[0]]
    returns = [found for found in m.findall(function.body, m.Return()) if parsed.scopes[found] is own]
    if returns:
        raise Refused(
            what=f"{built.class_name}.__init__ can return early",
            where=parsed.where(parsed.start_line(returns[0])),
            why="an initialiser at its end would not always run",
            remedy="let it run to its end, with if and else in place of return",
        )
    parameters = [*function.params.posonly_params, *function.params.params]
    name = parameters[0].name.value if parameters else "self"
    return _after(parsed, function.body, [f"{_indent(parsed, function.body)}{call}({name})"])


def class_definition(parsed: Parsed, built: Built) -> cst.ClassDef:
    """The one definition that has the qualified name of the built model's class.

    Raises:
        Refused: there is none, or several.
    """
    found = [node for node in m.findall(parsed.module, m.ClassDef()) if parsed.qualified(node) == {built.class_name}]
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
