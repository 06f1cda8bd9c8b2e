"""The code that is put into a user's file: an embedding class and an initialiser, small and without dependencies."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from spikepatch import __version__
from spikepatch.errors import Refused
from spikepatch.plans import Fill, NormEmbedding, Plan, ScaleEmbedding, small_std

#: The initialiser's name in the user's file, and the sign that the file is patched.
INITIALISER = "spike_no_more_init"


class Names(NamedTuple):
    """How the file calls three modules: torch.nn, math and re."""

    nn: str
    math: str
    re: str


def class_name(edit: ScaleEmbedding | NormEmbedding) -> str:
    return "ScaledEmbedding" if isinstance(edit, ScaleEmbedding) else "NormedEmbedding"


def header(recipe: str, equation: str, source: str) -> list[str]:
    """A comment: what was written here, the equation, the paper."""
    text = f"The recipe {recipe}, written by spikepatch {__version__}: {equation}. {source}."
    return textwrap.wrap(text, 88, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def embedding_class(edit: ScaleEmbedding | NormEmbedding, names: Names, *, wraps: bool) -> list[str]:
    """The lines of the class that takes the place of ``nn.Embedding``; ``wraps``: it takes over one that is built."""
    made: list[str] = []
    if isinstance(edit, ScaleEmbedding):
        factor = f"{names.math}.sqrt(self.embedding_dim)" if edit.per_width else repr(edit.factor)
        equation = "E(ids) * sqrt(d)" if edit.per_width else f"E(ids) * {edit.factor!r}"
        result = f"super().forward(ids) * {factor}"
    else:
        equation = "LayerNorm(E(ids))"
        result = "self.norm(super().forward(ids))"
        made = [f"$.norm = {names.nn}.LayerNorm($.embedding_dim, eps={edit.eps!r})", "$.norm.to($.weight)"]
    lines = [f"class {class_name(edit)}({names.nn}.Embedding):"]
    lines += [f'    """{equation}, so that the residual stream starts with a large std."""', ""]
    if wraps:
        lines += ["    @classmethod", "    def of(cls, embedding):", '        """Change an nn.Embedding, in place."""']
        lines += ["        embedding.__class__ = cls"]
        lines += [f"        {line.replace('$', 'embedding')}" for line in made]
        lines += ["        return embedding", ""]
    elif made:
        lines += ["    def __init__(self, *args, **kwargs):", "        super().__init__(*args, **kwargs)"]
        lines += [*(f"        {line.replace('$', 'self')}" for line in made), ""]
    return [*lines, "    def forward(self, ids):", f"        return {result}"]


def initialiser(plan: Plan, shapes: Mapping[str, Sequence[int]], names: Names) -> list[str]:
    """The lines of the initialiser: the stds of the plan, as functions of the model's own width and depth.

    Args:
        shapes: of everything in the state dict.

    Raises:
        Refused: the width or the sub-layers cannot be told from the parameters by their names and shapes.
    """
    fills = plan.select(Fill)
    stds = _stds(plan, fills, shapes, f"{names.math}.sqrt")
    parameter, axis = _width(plan, fills, shapes)
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
        f"    d = model.get_parameter({_quoted(parameter)}).shape[{axis}]",
        f"    small = {names.math}.sqrt(2 / (5 * d))",
    ]
    if any(fill.residual for fill in fills):
        lines += ["    sublayers = [", *(f"        {_quoted(p)}," for p in _counted(plan.sublayers, shapes)), "    ]"]
        lines += ["    S = sum(matches(n, p) for n, _ in model.named_parameters() for p in sublayers)"]
    return [
        *lines,
        "    stds = {",
        *(f"        {_quoted(name)}: {value}," for name, value in stds.items()),
        "    }",
        "    for name, parameter in model.named_parameters():",
        "        for pattern, std in stds.items():",
        "            if matches(name, pattern):",
        f"                {names.nn}.init.normal_(parameter, std=std)",
        "                break",
    ]


def _stds(plan: Plan, fills: Sequence[Fill], shapes: Mapping[str, Sequence[int]], sqrt: str) -> dict[str, str]:
    """Pattern -> std in terms of ``small`` and S: the widest pattern that matches parameters of this std alone."""
    values = {fill.parameter: _expression(plan, fill, sqrt) for fill in fills}
    found = {}
    for name, value in values.items():
        fitting = (
            p for p in _patterns(name) if {values.get(n) for n in (*shapes, *values) if matches(n, p)} == {value}
        )
        found[next(fitting)] = value  # its own name fits
    return found


def _patterns(name: str) -> Iterator[str]:
    """With a star for every number, for every number that is a part of its own, and for none."""
    yield re.sub(r"\d+", "*", name)
    yield re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
    yield name


def matches(name: str, pattern: str) -> bool:
    """As in the inserted code: a star stands for a number."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def _expression(plan: Plan, fill: Fill, sqrt: str) -> str:
    root = math.sqrt(len(plan.sublayers)) if fill.residual else 1.0
    ratio = fill.std * root / small_std(plan.width)
    text = "small" if math.isclose(ratio, 1, rel_tol=1e-12) else f"{ratio!r} * small"
    return f"{text} / {sqrt}(S)" if fill.residual else text


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


def _width(plan: Plan, fills: Sequence[Fill], shapes: Mapping[str, Sequence[int]]) -> tuple[str, int]:
    """A parameter, and the one of its axes that is as long as the stream is wide; embeddings are filled first."""
    candidates = [*(fill.parameter for fill in fills), *plan.sublayers]
    # Those without a number first: no change of depth takes them away.
    for name in sorted(candidates, key=lambda name: bool(re.search(r"\d", name))):
        axes = [axis for axis, length in enumerate(shapes[name]) if length == plan.width]
        if len(axes) == 1:
            return name, axes[0]
    raise Refused(
        what="no parameter tells the width of the stream",
        where=plan.architecture,
        why=f"each has several axes of the length {plan.width}, or none",
        remedy="build the model with other sizes, such as a vocabulary that is not as large as the width",
    )


def _quoted(name: str) -> str:
    return f'"{name}"' if '"' not in name and "\\" not in name and name.isprintable() else ascii(name)
