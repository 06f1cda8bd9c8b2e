"""Rules that stds follow: over the layers of one group, and over the shapes of several groups.

    over layers   sigma_l = c (l + 1)^p, p = 0 but for initialisers that scale by the layer's own index
    over shapes   sigma = c, c / sqrt(in), c sqrt(2 / (in + out)), the c of most groups

Two stds are equal where they differ by less than 2.5 %, or than five standard errors of both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from spikepatch.auditing.groups import Evidence, Group, Member

#: Below this nothing is said of a std.
TOLERANCE = 0.025
_SIGMAS = 5.0
#: Powers of depth that initialisers use.
_POWERS = (0.0, -0.5, -1.0, -0.25)


def tolerance(*errors: float) -> float:
    """How far two stds may be apart, relative."""
    return max(TOLERANCE, _SIGMAS * math.hypot(*errors))


def close(a: float, b: float, *errors: float) -> bool:
    """Two stds are equal, as far as can be told."""
    return b > 0 and a > 0 and abs(math.log(a / b)) < tolerance(*errors)


@dataclass(frozen=True)
class Law:
    """``std`` at layer 0 and the power of (l + 1) that it goes with; ``outliers`` do not."""

    std: float
    power: float
    outliers: tuple[Member, ...]

    def at(self, layer: int) -> float:
        """What the law says of a layer."""
        return self.std * math.pow(layer + 1, self.power)


def law_of(group: Group) -> Law | None:
    """The law that most members follow; None where no law holds for half of them."""
    members = [m for m in group.members if m.contents.std > 0]
    if not members:
        return None
    if group.part == "projection" and (scaled := _half_scaled(members)) is not None:
        return scaled
    layers = {m.layer for m in members}
    best: Law | None = None
    for power in _POWERS if len(layers) > 2 else _POWERS[:1]:
        values = [m.contents.std / (m.layer + 1) ** power for m in members]
        errors = [m.contents.error for m in members]
        centre = mode(values, errors)
        inside = [close(v, centre, e, e) for v, e in zip(values, errors, strict=True)]
        found = Law(centre, power, tuple(m for m, ok in zip(members, inside, strict=True) if not ok))
        if best is None or len(found.outliers) < len(best.outliers):
            best = found
    assert best is not None
    kept = len(members) - len(best.outliers)
    needed = 2 if len(members) < 4 else max(2, math.ceil(len(members) / 2))
    return best if not best.outliers or kept >= needed else None


def _half_scaled(members: Sequence[Member]) -> Law | None:
    """Two stds and no other, each of several layers: depth scaling reached the layers with the smaller one."""
    small = min(members, key=lambda m: m.contents.std).contents
    low = [m for m in members if close(m.contents.std, small.std, small.error, m.contents.error)]
    high = [m for m in members if m not in low]
    if len(low) < 2 or len(high) < 2:
        return None
    first = high[0].contents
    if not all(close(m.contents.std, first.std, first.error, m.contents.error) for m in high):
        return None
    return Law(statistics.median(m.contents.std for m in low), 0.0, tuple(high))


def mode(values: Sequence[float], errors: Sequence[float]) -> float:
    """The value that most others are equal to: the median of those."""
    best: list[float] = []
    for value, error in zip(values, errors, strict=True):
        near = [v for v, e in zip(values, errors, strict=True) if close(v, value, error, e)]
        if len(near) > len(best):
            best = near
    return statistics.median(best)


@dataclass(frozen=True)
class Scheme:
    """A rule over shapes: std = c * shape(group); ``text`` has the number."""

    name: str
    c: float
    shape: Callable[[Group], float]
    followers: frozenset[str]

    def std(self, group: Group) -> float:
        """What the scheme says of a group, without any factor for depth."""
        return self.c * self.shape(group)

    @property
    def text(self) -> str:
        """Such as ``std 0.02``."""
        return self.name.replace("c", f"{self.c:.3g}", 1)


def fan_in(group: Group) -> int:
    """Products that each output sums."""
    assert group.matrix is not None
    return group.matrix.fan_in


def fan_out(group: Group) -> int:
    """Outputs, of all matrices that are fused into one."""
    assert group.matrix is not None
    return group.matrix.fan_out


_SCHEMES: tuple[tuple[str, Callable[[Group], float]], ...] = (
    ("std c", lambda g: 1.0),
    ("std c / sqrt(in)", lambda g: fan_in(g) ** -0.5),
    ("std c sqrt(2 / (in + out))", lambda g: math.sqrt(2 / (fan_in(g) + fan_out(g)))),
)


def schemes(evidence: Evidence) -> tuple[Scheme, ...]:
    """Every rule with the c of every group of inner matrices, each with those that follow it."""
    laws = {g.names: law for g in inner(evidence.groups) if (law := law_of(g)) is not None}
    groups = [g for g in inner(evidence.groups) if g.names in laws]
    found = []
    for name, shape in _SCHEMES:
        values = [laws[g.names].std / shape(g) for g in groups]
        errors = [g.error / math.sqrt(len(g.members)) for g in groups]
        centres: list[float] = []
        for value, error in zip(values, errors, strict=True):
            near = [v for v, e in zip(values, errors, strict=True) if close(v, value, error, e)]
            centre = statistics.median(near)
            if centre not in centres:
                centres.append(centre)
        for c in centres:
            followers = [g for g, v, e in zip(groups, values, errors, strict=True) if close(v, c, e, e)]
            found.append(Scheme(name, c, shape, frozenset(g.pattern for g in followers)))
    return tuple(found)


def torch_default(evidence: Evidence) -> Scheme | None:
    """Where there is no scheme and all residual projections are uniform: torch's 1/sqrt(3 in), before any factor."""
    found = evidence.of("projection")
    if found and all(m.contents.kurtosis < 2.1 and m.contents.std > 0 for g in found for m in g.members):
        return Scheme("std c / sqrt(in)", 3**-0.5, lambda g: fan_in(g) ** -0.5, frozenset())
    return None


def inner(groups: Iterable[Group]) -> tuple[Group, ...]:
    """Matrices that vote: no residual projections, nor what a mixer keeps inside, which is part of its design."""
    return tuple(
        g
        for g in groups
        if g.part == "matrix" and g.matrix is not None and (g.kind != "mixer" or g.matrix.reads_stream)
    )
