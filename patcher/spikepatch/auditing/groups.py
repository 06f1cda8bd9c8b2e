"""Parameters in groups: equal names but for numbers, and equal by the map too: use, sub-layer, shape."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from spikepatch.auditing.contents import LEARNED_SPREAD, WITH_GAINS, Contents
from spikepatch.auditing.roles import VectorRole
from spikepatch.residual.map import Embedding, Matrix, ResidualMap, ResidualProjection, pattern

ParameterPart = Literal[
    "matrix", "projection", "table", "head", "norm", "step", "rate", "decay", "bias", "gain", "other"
]


@dataclass(frozen=True)
class Member:
    """One parameter. ``layer``: the number in its name that tells it from the rest of its group."""

    name: str
    layer: int
    contents: Contents


@dataclass(frozen=True)
class Group:
    """Parameters of one use.

    Attributes:
        pattern: their names with numbers replaced.
        part: what they are for; a projection is a matrix whose product is added to the stream.
        matrix, projection: of the first of them, as the map has it.
        members: in the order of the model.
    """

    pattern: str
    part: ParameterPart
    matrix: Matrix | None
    projection: ResidualProjection | None
    members: tuple[Member, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of its members."""
        return tuple(member.name for member in self.members)

    @property
    def kind(self) -> str:
        """What its sub-layer computes; empty outside of one."""
        return self.matrix.kind if self.matrix is not None else ""

    @property
    def std(self) -> float:
        """The median one."""
        return statistics.median(m.contents.std for m in self.members)

    @property
    def error(self) -> float:
        """Standard error of one member's std, relative."""
        return max(m.contents.error for m in self.members)


@dataclass(frozen=True)
class Evidence:
    """All that the rules read.

    Attributes:
        residual: the map, with its streams; None where there is none.
        contents: of every float parameter.
        roles: of vectors and small tensors, by the graph.
        groups: of all parameters.
        factors: matrices whose product is multiplied by a number -> that number.
        queries: matrices of queries whose attention does not divide by the root of a head's size -> that size.
        learned: the weights have been trained.
        touched: gains differ from channel to channel around their value: it may have been trained for some steps.
    """

    residual: ResidualMap | None
    contents: Mapping[str, Contents]
    roles: Mapping[str, VectorRole]
    groups: tuple[Group, ...]
    queries: Mapping[str, int]
    factors: Mapping[str, float]
    learned: bool
    touched: bool

    @property
    def streams(self) -> tuple[ResidualMap, ...]:
        """The one that feeds the output first."""
        return (self.residual, *self.residual.streams) if self.residual is not None else ()

    @property
    def embeddings(self) -> tuple[Embedding, ...]:
        """Of all streams, each once."""
        found = {e.parameter: e for stream in reversed(self.streams) for e in reversed(stream.embeddings)}
        return tuple(reversed(found.values()))

    def of(self, *parts: ParameterPart) -> tuple[Group, ...]:
        """The groups of these parts."""
        return tuple(group for group in self.groups if group.part in parts)

    def without(self, names: set[str]) -> Evidence:
        """The same, without parameters that something else has been said of."""
        kept = []
        for group in self.groups:
            members = tuple(m for m in group.members if m.name not in names)
            if members:
                kept.append(Group(group.pattern, group.part, group.matrix, group.projection, members))
        return dataclasses.replace(self, groups=tuple(kept))


def evidence(
    residual: ResidualMap | None,
    contents: Mapping[str, Contents],
    roles: Mapping[str, VectorRole],
    queries: Mapping[str, int],
    factors: Mapping[str, float],
) -> Evidence:
    """Put every parameter into its group."""
    streams = (residual, *residual.streams) if residual is not None else ()
    matrices = {m.parameter: m for stream in streams for m in stream.matrices}
    projections = {p.parameter: p for stream in streams for p in stream.residual_projections}
    parts: dict[str, ParameterPart] = dict(roles)
    if residual is None:  # what is broken shows without a map
        parts = {name: "matrix" for name, c in contents.items() if min(c.rows, c.columns) >= 16}
    parts |= {n.parameter: "norm" for stream in streams for n in stream.norms if n.parameter is not None}
    parts |= {n.bias: "bias" for stream in streams for n in stream.norms if n.bias is not None}
    parts |= {name: "matrix" for name in matrices if roles.get(name) != "rate"}
    parts |= dict.fromkeys(projections, "projection")
    parts |= {stream.head.parameter: "head" for stream in streams if stream.head is not None}
    parts |= {e.parameter: "table" for stream in streams for e in stream.embeddings}
    found: dict[tuple[object, ...], list[str]] = {}
    for name, each in contents.items():
        matrix = matrices.get(name)
        key = (pattern(name), parts.get(name, "other"), each.shape, matrix.kind if matrix is not None else "")
        found.setdefault(key, []).append(name)
    groups = tuple(
        Group(
            pattern=pattern(names[0]),
            part=parts.get(names[0], "other"),
            matrix=matrices.get(names[0]),
            projection=projections.get(names[0]),
            members=tuple(Member(n, i, contents[n]) for n, i in zip(names, _layers(names), strict=True)),
        )
        for names in found.values()
    )
    return Evidence(residual, contents, roles, groups, queries, factors, _learned(groups), _touched(groups))


def _layers(names: list[str]) -> list[int]:
    """The first number that is not the same in all names; where there is none, 0."""
    numbers = [[int(part) for part in name.split(".") if part.isdecimal()] for name in names]
    for column in zip(*numbers, strict=True):
        if len(set(column)) > 1:
            return list(column)
    return [row[0] if row else 0 for row in numbers]


def _touched(groups: tuple[Group, ...]) -> bool:
    each = [m.contents for g in groups if g.part == "norm" for m in g.members]
    uneven = sum(not c.is_constant and 0 < c.std < abs(c.mean) / 3 for c in each)
    return 2 * uneven > len(each) > 0


def _learned(groups: tuple[Group, ...]) -> bool:
    """Most matrices are not as independent draws are: their rows, or their columns, differ by far more; by a little
    more is enough where most gains differ from channel to channel as well.
    """
    limit = WITH_GAINS if _touched(groups) else LEARNED_SPREAD
    each = [
        max(m.contents.row_spread, m.contents.column_spread)
        for group in groups
        if group.part in {"matrix", "projection", "table", "head"}
        for m in group.members
        if min(m.contents.rows, m.contents.columns) >= 16 and m.contents.std > 0
    ]
    return 2 * sum(spread > limit for spread in each) > len(each) > 0
