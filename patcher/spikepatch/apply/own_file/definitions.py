"""The code that is put into a user's file: an embedding class and an initialiser, small and without dependencies."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from spikepatch._version import __version__
from spikepatch.errors import Refused
from spikepatch.plans.plan import (
    NORM_NAMES,
    Constant,
    DetachEmbedding,
    EmbeddingEdit,
    Fill,
    NormEmbedding,
    Plan,
    Recipe,
    ScaleEmbedding,
    ValueEdit,
)
from spikepatch.residual.map import pattern as dotted_pattern

#: The initialiser's name in the user's file, and the sign that the file is patched.
INITIALISER = "spike_no_more_init"


class Names(NamedTuple):
    """How the file calls three modules: torch.nn, math and re."""

    nn: str
    math: str
    re: str


def class_name(edit: EmbeddingEdit) -> str:
    """What the class that stands in for ``nn.Embedding`` is called in the user's file."""
    match edit:
        case ScaleEmbedding():
            return "ScaledEmbedding"
        case NormEmbedding():
            return "NormedEmbedding"
        case DetachEmbedding():
            return "DetachedEmbedding"


def header(recipe: Recipe) -> list[str]:
    """A comment: what was written here, the equation, the paper."""
    written = f"The recipe {recipe.name}, written by spikepatch {__version__}"
    equation = f"{written}: {recipe.equation}" if recipe.equation else written
    text = f"{equation}. {recipe.source}." if recipe.source else f"{equation}."
    return textwrap.wrap(text, 88, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def embedding_class(edit: EmbeddingEdit, names: Names, *, wraps: bool) -> list[str]:
    """The lines of the class that takes the place of ``nn.Embedding``; ``wraps``: it takes over one that is built."""
    made: list[str] = []
    match edit:
        case ScaleEmbedding():
            factor = f"{names.math}.sqrt(self.embedding_dim)" if edit.per_width else repr(edit.factor)
            says = f"E(ids) * {'sqrt(d)' if edit.per_width else factor}, so that the residual stream starts large."
            body = [f"return super().forward(ids) * {factor}"]
        case NormEmbedding():
            kind, plain = NORM_NAMES[edit.kind], "" if edit.affine else ", elementwise_affine=False"
            says = f"{kind}(E(ids)), so that the residual stream starts with a std of 1."
            body = ["return self.norm(super().forward(ids))"]
            made = [f"$.norm = {names.nn}.{kind}($.embedding_dim, eps={edit.eps!r}{plain})", "$.norm.to($.weight)"]
        case DetachEmbedding():
            says = f"E(ids), through which {edit.gradient!r} of the gradient flows back."
            body = ["rows = super().forward(ids)", "still = rows.detach()"]
            body += [f"return still + {edit.gradient!r} * (rows - still)"]
    lines = [f"class {class_name(edit)}({names.nn}.Embedding):", f'    """{says}"""', ""]
    if wraps:
        lines += ["    @classmethod", "    def of(cls, embedding):", '        """Change an nn.Embedding, in place."""']
        lines += ["        embedding.__class__ = cls"]
        lines += [f"        {line.replace('$', 'embedding')}" for line in made]
        lines += ["        return embedding", ""]
    elif made:
        lines += ["    def __init__(self, *args, **kwargs):", "        super().__init__(*args, **kwargs)"]
        lines += [*(f"        {line.replace('$', 'self')}" for line in made), ""]
    return [*lines, "    def forward(self, ids):", *(f"        {line}" for line in body)]


def initialiser(plan: Plan, shapes: Mapping[str, Sequence[int]], names: Names) -> list[str]:
    """The lines of the initialiser: the values of the plan, as functions of the model's own width and depth.

    Args:
        shapes: of every parameter and buffer.

    Raises:
        Refused: the model has several streams, or the sub-layers cannot be told from other parameters by their names.
    """
    if len(plan.streams) > 1:
        raise Refused(
            what="a model with several residual streams cannot be initialised by one function of its width and depth",
            where=plan.architecture,
            why=f"it has {len(plan.streams)}, as an encoder-decoder has, each with a width and depth of its own",
            remedy="call spikepatch.patch on the built model",
        )
    (stream,) = plan.streams
    draws = _draws(plan, shapes, names)
    code = " ".join(draws)
    # A pattern with a number and no star is of one layer alone: it says nothing of a model with more or fewer.
    by_layer = any(re.search(r"\d", p) and "*" not in p for patterns in draws.values() for p in patterns)
    lines = [
        f"def {INITIALISER}(model):",
        '    """Draw the recipe\'s weights; what is not listed keeps its own initialisation.',
        "",
        "    d is the width of the residual stream and S the number of sub-layers that add to it, for",
        "    a model of any size; a star in a name stands for a number.",
        '    """',
        "",
        "    def matches(name, pattern):",
        f'        regex = {names.re}.escape(pattern).replace(r"\\*", r"\\d+")',
        f"        return {names.re}.fullmatch(regex, name) is not None",
        "",
    ]
    if re.search(r"\b(d|small)\b", code):
        lines += [f"    d = model.get_parameter({_quoted(stream.sublayers[0])}).shape[{stream.axis}]"]
    if "small" in code:
        lines += [f"    small = {names.math}.sqrt(2 / (5 * d))"]
    if by_layer or re.search(r"\bS\b", code):
        lines += ["    sublayers = [", *(f"        {_quoted(p)}," for p in _counted(plan.sublayers, shapes)), "    ]"]
        lines += ["    S = sum(matches(n, p) for n, _ in model.named_parameters() for p in sublayers)"]
    if by_layer:
        here = len(plan.sublayers)
        lines += [f"    if S != {here}:"]
        lines += [f'        raise ValueError(f"layers are listed one by one, for S = {here}, not {{S}}")']
    lines += ["    draws = ["]
    for draw, patterns in draws.items():
        lines += ["        (", f"            lambda w: {draw},", "            ["]
        lines += [*(f"                {_quoted(pattern)}," for pattern in patterns), "            ],", "        ),"]
    return [
        *lines,
        "    ]",
        "    for draw, patterns in draws:",
        "        for name, parameter in model.named_parameters():",
        "            if any(matches(name, pattern) for pattern in patterns):",
        "                draw(parameter)",
    ]


def _draws(plan: Plan, shapes: Mapping[str, Sequence[int]], names: Names) -> dict[str, list[str]]:
    """What draws a parameter ``w`` -> patterns: the widest ones that match parameters drawn like this alone."""
    values = {edit.parameter: _draw(edit, len(plan.sublayers), names) for edit in plan.select(ValueEdit)}
    found: dict[str, list[str]] = {}
    for name, value in values.items():
        fitting = (
            p for p in _patterns(name) if {values.get(n) for n in (*shapes, *values) if matches(n, p)} == {value}
        )
        pattern = next(fitting)  # its own name fits
        if pattern not in found.setdefault(value, []):
            found[value].append(pattern)
    return found


def _patterns(name: str) -> Iterator[str]:
    """With a star for every number, every number that is a part of its own, the first number (the layer's), or none.

    In code that numbers its attributes (``layer0``) a number is no part of its own; which of these holds is tried.
    """
    yield re.sub(r"\d+", "*", name)
    yield dotted_pattern(name)
    yield re.sub(r"\d+", "*", name, count=1)
    yield name


def matches(name: str, pattern: str) -> bool:
    """As in the inserted code: a star stands for a number."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def _draw(edit: ValueEdit, sublayers: int, names: Names) -> str:
    init, sqrt = f"{names.nn}.init", f"{names.math}.sqrt"
    if isinstance(edit, Constant):
        value = f"{edit.value / sublayers**edit.depth:.15g}{_power(edit.depth, sqrt)}"
        return f"{init}.constant_(w, {value}{f' + {edit.offset!r}' if edit.offset else ''})"
    match edit.distribution:
        case "normal":
            return f"{init}.normal_(w, std={_size(edit, edit.size, sublayers, sqrt)})"
        case "truncated":
            bound = _size(edit, edit.cut * edit.size, sublayers, sqrt)
            return f"{init}.trunc_normal_(w, std={_size(edit, edit.size, sublayers, sqrt)}, a=-{bound}, b={bound})"
        case "uniform":
            bound = _size(edit, edit.size, sublayers, sqrt)
            return f"{init}.uniform_(w, -{bound}, {bound})"


def _size(fill: Fill, size: float, sublayers: int, sqrt: str) -> str:
    """``size``, which goes with the fan and the depth as the std of ``fill`` does: c S^p, or sqrt(c / fan) S^p."""
    constant = size / sublayers**fill.depth
    if not fill.fan:
        return f"{constant:.15g}{_power(fill.depth, sqrt)}"
    ratio = f"{constant**2 * fill.fan:.14g}"
    fan = " + ".join(f"w.shape[{axis}]" for axis in fill.axes) or "d"
    text = f"{sqrt}({ratio} / {f'({fan})' if fill.axes[1:] else fan})"
    return f"{'small' if (ratio, fan) == ('0.4', 'd') else text}{_power(fill.depth, sqrt)}"


def _power(depth: float, sqrt: str) -> str:
    """`` * S^depth``."""
    return {0.0: "", -0.5: f" / {sqrt}(S)", -1.0: " / S"}.get(depth, f" * S**{depth!r}")


def _counted(sublayers: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Patterns that match one parameter of each sub-layer, so that the matches of a deeper model are its S.

    The first number is the layer's. Another one, such as an expert's, is kept where it is the same in every layer.
    """
    groups: dict[str, list[list[str]]] = {}
    for name in sublayers:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(re.split(r"(\d+)", name))
    found = []
    for group in groups.values():
        columns = list(zip(*group, strict=True))
        found.append("".join("*" if i == 1 or len(set(c)) > 1 else c[0] for i, c in enumerate(columns)))
    if {n for n in shapes if any(matches(n, p) for p in found)} != set(sublayers):
        raise Refused(
            what="the sub-layers cannot be counted by the names of their parameters",
            where=", ".join(found[:4]),
            why="other parameters have names of the same form",
            remedy="give the residual projections names of their own, such as down instead of one of w1, w2, w3",
        )
    return found


def _quoted(name: str) -> str:
    return f'"{name}"' if '"' not in name and "\\" not in name and name.isprintable() else ascii(name)
