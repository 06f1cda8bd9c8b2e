"""Residual projections against the factors for depth that initialisers use.

1             none                       1/S                 applied twice
1/sqrt(S)     GPT-2, S sub-layers        1/sqrt(k)           for another number of sub-layers
1/sqrt(2(l+1)), 1/sqrt(l+1)  Mitchell, by the layer's own index
2/(N sqrt(d)) Wang, N layers             0                   projections that begin at zero
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from spikepatch.auditing.fault import Fault
from spikepatch.auditing.groups import Evidence, Group
from spikepatch.auditing.laws import Scheme, close, inner, law_of, schemes
from spikepatch.auditing.spread import carries_head_size, odd_group
from spikepatch.plans.plan import small_std
from spikepatch.residual.map import ResidualMap

_BY_INDEX = "by the layer's index"


@dataclass(frozen=True)
class Scaled:
    """A group with the factor that its std has over the scheme's, and the name of that factor; empty: none known."""

    group: Group
    factor: float
    name: str


def factor_name(ratio: float, power: float, std: float, error: float, stream: ResidualMap) -> str:
    """Which factor for depth a ratio is."""
    count, layers = stream.sublayers, stream.layers or stream.sublayers  # blocks that stand in no list
    if power == -0.5:
        for name, value in (("1/sqrt(2(l+1))", 2**-0.5), ("1/sqrt(l+1)", 1.0)):
            if close(ratio, value, error):
                return name
        return _BY_INDEX
    if power:
        return _BY_INDEX
    known = [("1", 1.0), ("1/sqrt(S)", count**-0.5), ("1/S", 1 / count), ("1/sqrt(N)", layers**-0.5)]
    known += [("sqrt(S)", count**0.5)] if count > 2 else []
    for name, value in known:
        if close(ratio, value, error):
            return name
    small = close(std / ratio, small_std(stream.width), error)
    if small and close(std, 2 / (layers * math.sqrt(stream.width)), error):
        return "wang"
    k = round(ratio**-2) if 0 < ratio < 0.9 else 0
    return f"1/sqrt({k})" if 2 <= k <= 1000 and close(ratio, k**-0.5) and k * 0.05 < 1.5 else ""


def scaled(evidence: Evidence, scheme: Scheme, stream: ResidualMap) -> list[Scaled]:
    """The projections of one stream that a factor for depth reaches."""
    own = {p.parameter: p for p in stream.residual_projections}
    found = []
    for group in evidence.of("projection"):
        projection = own.get(group.members[0].name)
        if projection is None or projection.branch_norm is not None or group.matrix is None:
            continue
        if all(m.contents.is_zero for m in group.members):
            found.append(Scaled(group, 0.0, "0"))
            continue
        law = law_of(group)
        if law is None:
            continue
        std = law.std * abs(projection.multiplier)
        ratio = std / scheme.std(group)
        error = group.error / math.sqrt(len(group.members))
        found.append(Scaled(group, ratio, factor_name(ratio, law.power, std, error, stream)))
    return found


def best_scheme(evidence: Evidence) -> Scheme | None:
    """The scheme that explains most: groups that follow it, and projections with a factor for depth that has a name.

    None where it explains fewer than two groups, or not most of them.
    """
    groups = len({g.pattern for g in inner(evidence.groups)})
    tables = [(g.std, g.error) for g in evidence.of("table", "head") if g.std > 0]
    best: tuple[float, Scheme] | None = None
    for scheme in schemes(evidence):
        explained, of = _explained(evidence, scheme)
        explained += len(scheme.followers)
        total = groups + of
        if explained < 1.7 or 2 * explained <= total:
            continue
        constant = scheme.name == "std c"
        score = explained + 0.1 * any(constant and close(std, scheme.c, error) for std, error in tables)
        if best is None or score > best[0] + 1e-9:
            best = score, scheme
    return best[1] if best is not None else None


def _explained(evidence: Evidence, scheme: Scheme) -> tuple[float, int]:
    """How many projections have a factor with a name, the same for all; and how many there are."""
    score, count = 0.0, 0
    for stream in evidence.streams:
        names = [s.name for s in scaled(evidence, scheme, stream) if s.name != "0"]
        weak = {name for name in names if _is_number(name) or name in {_BY_INDEX, "1/sqrt(N)", "sqrt(S)"}}
        score += sum(0.3 if name in weak else 1.0 for name in names if name)
        score -= 0.1 * max(len(set(names)) - 1, 0)
        count += len(names)
    return score, count


def _is_number(name: str) -> bool:
    return name.startswith("1/sqrt(") and name[7:-1].isdecimal()


def depth(evidence: Evidence, scheme: Scheme) -> Iterator[Fault]:
    """What is wrong with the factors for depth."""
    for stream in evidence.streams:
        yield from _behind_norms(evidence, scheme, stream)
        if not _applies(stream):
            continue
        found = scaled(evidence, scheme, stream)
        elsewhere = _on_others(evidence, scheme, stream)
        inverse = [s for s in found if s.name == "sqrt(S)"]
        if inverse and len(inverse) == len(found):
            yield _fault(
                "at-risk",
                inverse,
                "depth scaling is on the wrong matrices: the others have 1/sqrt(S), residual projections have none",
                "a factor of 1/sqrt(S) on residual projections, and on nothing else",
            )
        plain = [s for s in found if s.name == "1"]
        rest = [s for s in found if s.name not in {"1", "0"} and (s not in inverse or len(inverse) < len(found))]
        strong = [s for s in rest if s.name and s not in inverse and not _is_number(s.name)]
        expected = f"a factor of 1/sqrt(S) = {stream.sublayers**-0.5:.3g} for S = {stream.sublayers} sub-layers"
        if plain and elsewhere:
            yield _fault(
                "at-risk",
                [*plain, *(s for s in elsewhere if not rest or s.factor)],
                f"depth scaling is on the wrong matrix: {elsewhere[0].group.pattern} has"
                f" {elsewhere[0].name}, {plain[0].group.pattern} has none",
                expected,
            )
        elif plain and strong:
            yield _fault(
                "at-risk",
                plain,
                f"depth scaling is missing here, {strong[0].group.pattern} has {strong[0].name}",
                expected,
            )
        elif plain and _everywhere(evidence, scheme, stream):
            followers = [Scaled(g, 1.0, "1") for g in inner(evidence.groups) if g.pattern in scheme.followers]
            what = "depth scaling, 1/sqrt(S), is on every matrix, not on residual projections alone"
            yield _fault("note", [*followers, *plain], what, expected)
        elif plain:
            yield _fault("note", plain, "no depth scaling: the std is that of the other matrices", expected)
        yield from _odd_factors(rest, stream, expected)


def _everywhere(evidence: Evidence, scheme: Scheme, stream: ResidualMap) -> bool:
    """The scheme of all matrices has the factor: 1/sqrt(S) of 1/sqrt(in), or of the std of tables and the head."""
    factor = stream.sublayers**-0.5
    if scheme.name == "std c":
        ends = [g for g in evidence.of("table", "head") if g.std > 0]
        return bool(ends) and all(close(scheme.c / g.std, factor, g.error) for g in ends)
    return close(scheme.c, factor) and not close(factor, 3**-0.5)  # torch's default


def _odd_factors(rest: list[Scaled], stream: ResidualMap, expected: str) -> Iterator[Fault]:
    twice = [s for s in rest if s.name == "1/S"]
    once = [s for s in rest if s.name == "1/sqrt(S)"]
    if twice:
        what = "depth scaling was applied twice: the factor is 1/S"
        yield _fault("at-risk" if once else "note", twice, what + (", of others 1/sqrt(S)" if once else ""), expected)
    numbers = [s for s in rest if _is_number(s.name)]
    classic = stream.sublayers == 2 * stream.layers
    numbers += [s for s in rest if s.name == "1/sqrt(N)" and classic]
    if numbers:
        name = numbers[0].name.replace("N", str(stream.layers))
        what = f"depth scaling is {name}, of another number of sub-layers: the model has S = {stream.sublayers}"
        if name == "1/sqrt(2)":
            what += "; it is 1/sqrt(2(l+1)) at l = 0, as if every layer had the index 0"
        yield _fault("note", numbers, what, expected)
    if odd := [s for s in rest if s.name in {"", "sqrt(S)"}]:
        what = f"the std is {odd[0].factor:.3g} times that of the other matrices, which is no known depth scaling"
        yield _fault("note", odd, what, expected)


def _on_others(evidence: Evidence, scheme: Scheme, stream: ResidualMap) -> list[Scaled]:
    """Matrices that are no projections, in sub-layers of the stream, with a factor for depth."""
    count = {p.sublayer for p in stream.residual_projections}
    found = []
    for group in inner(evidence.groups):
        law = law_of(group)
        if law is None or group.pattern in scheme.followers or group.matrix is None:
            continue
        if group.matrix.sublayer not in count or group.kind not in {"mlp", "moe", "attention"}:
            continue
        ratio = law.std / scheme.std(group)
        name = factor_name(ratio, law.power, law.std, group.error, stream)
        if carries_head_size(evidence, group, ratio):
            continue
        if name in {"1/sqrt(S)", "1/S", "1/sqrt(2(l+1))", "1/sqrt(l+1)"}:
            found.append(Scaled(group, ratio, name))
    for group in evidence.of("table", "head") if scheme.name == "std c" else ():  # no rule of shapes holds there
        ratio = group.std / scheme.c
        if ratio > 0 and close(ratio, stream.sublayers**-0.5, group.error):
            found.append(Scaled(group, ratio, "1/sqrt(S)"))
    return found


def scaled_on_purpose(evidence: Evidence, scheme: Scheme) -> set[str]:
    """Patterns of matrices, not projections, that carry a factor for depth, where that has a meaning."""
    streams = [stream for stream in evidence.streams if _applies(stream)]
    return {s.group.pattern for stream in streams for s in _on_others(evidence, scheme, stream)}


def _applies(stream: ResidualMap) -> bool:
    """Norms on the stream divide by its size, so that depth scaling has no reason."""
    return stream.sublayers >= 3 and stream.placement != "post-norm"


def _behind_norms(evidence: Evidence, scheme: Scheme, stream: ResidualMap) -> Iterator[Fault]:
    """Projections that a norm follows, on the branch or on the stream, are as other matrices are."""
    own = {p.parameter: p for p in stream.residual_projections}
    for group in evidence.of("projection"):
        projection = own.get(group.members[0].name)
        law = law_of(group)
        if projection is None or group.matrix is None or law is None:
            continue
        if projection.branch_norm is None and _applies(stream):
            continue
        ratio = law.std / scheme.std(group)
        error = group.error / math.sqrt(len(group.members))
        if factor_name(ratio, law.power, law.std, error, stream) not in {"1", "1/sqrt(S)", "wang"}:
            yield odd_group(group, scheme, law.std)


def _fault(severity: str, groups: list[Scaled], what: str, expected: str) -> Fault:
    return Fault(
        "depth-scaling",
        "at-risk" if severity == "at-risk" else "note",
        tuple(dict.fromkeys(name for s in groups for name in s.group.names)),
        what,
        expected,
        "; ".join(f"{s.group.pattern}: {s.factor:.3g}" for s in groups[:4]),
        "multiply the std of residual projections, and of nothing else, by 1/sqrt(S), once",
    )
