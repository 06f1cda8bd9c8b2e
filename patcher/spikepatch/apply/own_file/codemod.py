"""A recipe written into the source code of a model: ``codemod(file, factory) -> Codemod``."""

from __future__ import annotations

import dataclasses
import difflib
import io
import os
import re
import stat
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libcst as cst

from spikepatch.apply.disk.atomic import placing
from spikepatch.apply.own_file import definitions, placement
from spikepatch.apply.own_file.build import Built, build
from spikepatch.apply.own_file.recheck import differences
from spikepatch.apply.own_file.syntax import Parsed, Splice, bound_at, parse, spelled, splice, with_imports
from spikepatch.errors import BadSource, BadTarget, Refused
from spikepatch.plans.plan import EmbeddingEdit, NormEmbedding, Plan, Recipe, ScaleEmbedding, Untie
from spikepatch.plans.work_out import make_plan
from spikepatch.recipes import built_in
from spikepatch.recipes.request import Request, parse_request
from spikepatch.source.local import read_file

#: What the inserted code uses.
_MODULES = ("torch.nn", "math", "re")


@dataclass(frozen=True)
class Codemod:
    """An edit of one file.

    Attributes:
        file: as given.
        before, after: its bytes.
        encoding: of both.
        plan: what was written into it.
        notes: what else to know before training with it.
    """

    file: Path
    before: bytes
    after: bytes
    encoding: str
    plan: Plan
    notes: tuple[str, ...]

    @property
    def text(self) -> str:
        """The edited file."""
        return self.after.decode(self.encoding)

    @property
    def diff(self) -> str:
        """From the file to the edited file, as ``patch`` and ``git apply`` read it."""
        before, after = (
            re.findall(r"[^\n]*\n|[^\n]+", data.decode(self.encoding)) for data in (self.before, self.after)
        )
        path = self.file.absolute()
        name = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).lstrip("/")
        lines = difflib.unified_diff(before, after, f"a/{name}", f"b/{name}")
        return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def codemod(
    file: str | os.PathLike[str],
    factory: str,
    recipe: str | Recipe = built_in.DEFAULT,
    *,
    factor: float | None = None,
    positions: bool = False,
    replace: bool = False,
    untie: bool = False,
    write: bool = False,
) -> Codemod:
    """Write a recipe for fresh weights into the Python file that defines a model.

    The factory is imported and called, in a process of its own, so the user's code runs. The model that it builds is
    mapped, the recipe planned, and the file edited at the expressions that built the embeddings and at the end of the
    model's ``__init__``. Every other byte stays. Then the edited text is built in the same way, and what it gives is
    compared with the plan; only then is it returned, or written.

    Args:
        file: the file that defines the class of the model.
        factory: ``module:function``, importable from the current folder or the file's; called without arguments, it
            returns the model, or the model and its example inputs: ids, or a mapping from arguments of forward to
            tensors. The edit works for any width and depth, so a small model on the CPU is enough.
        recipe, factor, positions, replace, untie: as in ``spikepatch.plan``.
        write: replace the file, at once and as a whole, with its permissions kept.

    Raises:
        BadSource: the file or the factory cannot be used.
        Refused: the model is not proven, the recipe does not fit, or an edit cannot be placed safely.
        BadTarget: the file cannot be written, or has changed meanwhile. In all cases it is as it was.
    """
    path, real = Path(file), Path(os.path.realpath(file))
    request = parse_request(recipe, reinit="all", factor=factor, positions=positions, replace=replace, untie=untie)
    _check_factory(factory)
    before, encoding = _read(path)
    if write:
        _check_writable(path, real)
    text = before.decode(encoding)
    parsed = parse(str(real), text)
    _guard_patched(parsed)
    original = build(real, text, factory)
    plan, edited = rewrite(parsed, original, request)
    again = _verified(real, edited, factory, plan, original)
    result = Codemod(path, before, edited.encode(encoding), encoding, plan, tuple(_notes(again, plan)))
    if write:
        _write(result, real)
    return result


def rewrite(parsed: Parsed, built: Built, request: Request) -> tuple[Plan, str]:
    """The request, worked out for what the file builds, and the file with it.

    Raises:
        BadSource: the model's class is not defined in the file.
        Refused: the recipe does not fit, or an edit cannot be placed safely.
    """
    if built.class_file != parsed.file:
        raise BadSource(
            "the factory builds a model of another file",
            where=parsed.file,
            why=f"{built.class_name} is defined in {built.class_file or 'no file'}",
            remedy="give the file that defines the model's class, or a factory that returns the model itself",
        )
    plan = make_plan(built.residual, built.shapes, request.recipe, reinit=request.reinit, seed=request.seed)
    edits, modules = _edits(parsed, built, plan, request.recipe)
    return plan, with_imports(splice(parsed.text, edits), modules)


def _check_factory(factory: str) -> None:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", factory):
        raise BadSource(
            "no factory",
            where=f"--factory {factory}",
            why="it is not of the form module:function",
            remedy="name a function that builds the model, such as --factory build:make_model for build.py",
        )


def _read(path: Path) -> tuple[bytes, str]:
    try:
        data = read_file(path)
    except OSError as error:
        raise BadSource(
            "the file cannot be read",
            where=str(path),
            why=error.strerror or type(error).__name__,
            remedy="give the Python file that defines the model's class",
        ) from error
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise BadSource(
            "the file is no Python source",
            where=str(path),
            why=str(error),
            remedy="give the Python file that defines the model's class",
        ) from error
    return data, encoding


def _guard_patched(parsed: Parsed) -> None:
    line = bound_at(parsed, definitions.INITIALISER)
    if line is not None:
        raise Refused(
            what="the file is patched already",
            where=parsed.where(line),
            why=f"it defines {definitions.INITIALISER}; a second factor or norm would act on top of the first",
            remedy="start from the file as it was",
        )


def _edits(parsed: Parsed, built: Built, plan: Plan, recipe: Recipe) -> tuple[list[Splice], list[str]]:
    """Every change to the file, each found before any is made; and the modules that it must import for them."""
    structural = plan.select(EmbeddingEdit)
    if len({dataclasses.replace(edit, module="") for edit in structural}) > 1:
        raise Refused(
            what=f"the recipe {plan.recipe} cannot be written as source code",
            where=parsed.file,
            why="it changes several embeddings, each in another way, and one class is written for all",
            remedy="leave --positions out, or use a recipe that changes the token embedding alone",
        )
    root = placement.class_definition(parsed, built)
    found = {module: spelled(parsed, module) for module in _MODULES}
    names = definitions.Names(*(name or module for module, name in found.items()))

    edits: list[Splice] = []
    nodes: list[cst.CSTNode] = [root]
    wraps = False
    for edit in structural:
        call = placement.construction_of(parsed, built, edit.module)
        splices, wrapped = placement.wrap(parsed, call, definitions.class_name(edit))
        nodes.append(call)
        wraps |= wrapped
        edits += splices
    for untied in plan.select(Untie):
        edits.append(placement.untie(parsed, built, untied.head, untied.embedding))
    edits.append(placement.at_end_of_init(parsed, built, definitions.INITIALISER))

    added = definitions.initialiser(plan, built.shapes, names)
    if structural:
        _guard_name(parsed, definitions.class_name(structural[0]))
        added = [*definitions.embedding_class(structural[0], names, wraps=wraps), "", "", *added]
    code = "\n".join(added)
    missing = [module for module, name in found.items() if name is None and f"{module}." in code]
    for module in missing:
        _guard_name(parsed, module.partition(".")[0])
    lines = [*definitions.header(recipe), "", "", *added]
    return [*edits, placement.before_statement(parsed, nodes, lines)], missing


def _guard_name(parsed: Parsed, name: str) -> None:
    line = bound_at(parsed, name)
    if line is not None:
        raise Refused(
            what=f"the file has a {name} of its own",
            where=parsed.where(line),
            why="what the recipe adds has the same name",
            remedy="rename the one that is there",
        )


def _verified(real: Path, edited: str, factory: str, plan: Plan, original: Built) -> Built:
    """What the edited text builds.

    Raises:
        Refused: it is not what the plan says; the differences are named.
    """
    try:
        again = build(real, edited, factory)
    except (BadSource, Refused) as error:
        raise _failed(real, f"{error.what}: {error.why}") from error
    findings = list(differences(plan, original, again))
    if findings:
        more = f"; and {len(findings) - 6} more" if findings[6:] else ""
        raise _failed(real, "; ".join(findings[:6]) + more)
    return again


def _failed(where: Path, why: str) -> Refused:
    return Refused(
        what="the edited file does not build what the recipe says, so it is not written",
        where=str(where),
        why=why,
        remedy="let nothing initialise or replace weights after __init__, or construct the embedding in a plainer way",
    )


def _notes(edited: Built, plan: Plan) -> Iterator[str]:
    head = edited.residual.head
    if plan.select(ScaleEmbedding | NormEmbedding) and head is not None and head.tied:
        yield (
            "the head is tied, so a large shortcut makes it predict the current token at first: the initial loss is "
            "far above log V; --untie gives it its own matrix"
        )
    if plan.no_decay:
        yield f"train without weight decay on: {', '.join(plan.no_decay)}"


def _check_writable(path: Path, real: Path) -> None:
    if not os.access(real, os.W_OK) or not os.access(real.parent, os.W_OK | os.X_OK):
        raise BadTarget(
            "the file cannot be replaced",
            where=str(path),
            why="this user may not write to it or to its folder",
            remedy="change the permissions, or apply the diff yourself",
        )


def _write(result: Codemod, real: Path) -> None:
    """Write a new file beside the old one and give it the old one's name; a link keeps pointing to it."""
    with placing(real) as new:
        new.touch(0o600)
        new.write_bytes(result.after)
        new.chmod(stat.S_IMODE(real.stat().st_mode))
        if real.read_bytes() != result.before:
            raise BadTarget(
                "the file changed while it was being worked on",
                where=str(result.file),
                why="its bytes are no longer those that were read, so somebody's edit would be lost",
                remedy="run the command again",
            )
