"""Tensors, and parts of tensors, that no initialiser writes: NaN, zeros, constants, garbage, copies of each other."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spikepatch.auditing.contents import Contents
from spikepatch.auditing.fault import Fault, FaultLevel
from spikepatch.auditing.groups import Evidence, Group, Member, ParameterPart

_REDRAW = "draw it again"
#: Parts that are matrices, whose values are draws.
_DRAWN: tuple[ParameterPart, ...] = ("matrix", "projection", "table", "head")
#: The largest of 10^12 normal draws is at 7 stds.
_OUTLIER = 10.0
#: So many rows of another size are a part; fewer may be single values.
_SEVERAL = 4
#: A float32 that nobody wrote is as a rule denormal or huge.
_TINY, _HUGE = 1e-12, 1e4


def broken(evidence: Evidence) -> Iterator[Fault]:
    """Values that were never written, or overwritten."""
    for group in evidence.groups:
        bad = [m for m in group.members if m.contents.nonfinite]
        if bad:
            first = bad[0].contents
            yield Fault(
                "non-finite",
                "unstable",
                tuple(m.name for m in bad),
                "holds NaN or infinite values",
                "finite values",
                f"{sum(m.contents.nonfinite for m in bad)} are not finite"
                + (f", in {first.where}" if first.where else ""),
                "memory that nobody wrote, or an overflow: " + _REDRAW,
            )
        sound = [m for m in group.members if not m.contents.nonfinite and m.contents.elements > 1]
        if group.part in _DRAWN or (group.part == "other" and _is_matrix(group)):
            yield from _garbage(group, sound, evidence.learned)
        if group.part in {"gain", "other"}:
            yield from _silent(group, sound)
        if group.part in _DRAWN:
            yield from _zero(evidence, group, sound)
            yield from _constant(group, sound)
            yield from _parts(group, sound, evidence)
            if (
                evidence.residual is not None
                and not evidence.learned
                and (group.kind != "mixer" or group.part == "projection")
            ):
                yield from _shifted(group, sound)


def _is_matrix(group: Group) -> bool:
    first = group.members[0].contents
    return min(first.rows, first.columns) >= 16


def _zero(evidence: Evidence, group: Group, members: list[Member]) -> Iterator[Fault]:
    zero = [m for m in members if m.contents.is_zero]
    if not zero:
        return
    names = tuple(m.name for m in zero)
    kinds = {e.parameter: e.kind for e in evidence.embeddings}
    severity: FaultLevel = "note"
    what = "is zero in every layer" if len(members) > 1 else "is zero"
    remedy = "right where it was meant so: a head, queries or residual projections that begin at zero"
    if len(zero) < len(members):
        severity, what = "at-risk", f"is zero, the other {len(members) - len(zero)} of its kind are not"
        remedy = "memory that nobody wrote: " + _REDRAW
    elif group.part == "table" and kinds.get(names[0]) == "token":
        severity, what, remedy = "at-risk", "is zero: all tokens are the same", _REDRAW
    elif group.part == "table":
        what, remedy = (
            f"is zero: no {kinds.get(names[0])} is told from another at the start",
            "draw it, if it was not meant",
        )
    elif group.part == "matrix" and group.kind != "attention" and _projection_is_zero(evidence, group):
        severity, what = "at-risk", "is zero, and so is the projection behind it: neither gets a gradient"
        remedy = "draw one of the two"
    yield Fault("zero", severity, names, what, "drawn values", "all zeros", remedy)


def _silent(group: Group, members: list[Member]) -> Iterator[Fault]:
    """Gains that are no norm's, and what has no part that is known: as the others of their kind are."""
    zero = [m for m in members if m.contents.is_zero and m.contents.elements >= 4]
    if not zero:
        return
    some = len(zero) < len(members)
    if not some and group.part != "gain":  # what it is for is not known
        return
    rest = f", the other {len(members) - len(zero)} of its kind are not" if some else " in every layer"
    yield Fault(
        "zero",
        "at-risk" if some else "note",
        tuple(m.name for m in zero),
        f"is zero{rest}: what is multiplied with it is lost",
        "other values",
        "all zeros",
        "memory that nobody wrote: fill it again" if some else "right where a path is to begin closed",
    )


def _projection_is_zero(evidence: Evidence, group: Group) -> bool:
    behind = [
        m.contents.is_zero
        for other in evidence.of("projection")
        if other.matrix is not None and group.matrix is not None and other.matrix.sublayer == group.matrix.sublayer
        for m in other.members
    ]
    return bool(behind) and all(behind)


def _constant(group: Group, members: list[Member]) -> Iterator[Fault]:
    same = [m for m in members if m.contents.is_constant and not m.contents.is_zero]
    if same:
        yield Fault(
            "constant",
            "at-risk",
            tuple(m.name for m in same),
            "has one value everywhere: all units behind it compute the same, and get the same gradient",
            "drawn values",
            f"{same[0].contents.mean:.4g} everywhere",
            _REDRAW,
        )


def _garbage(group: Group, members: list[Member], learned: bool) -> Iterator[Fault]:
    huge = [m for m in members if m.contents.largest > _HUGE or 0 < m.contents.largest < _TINY]
    if huge:
        yield Fault(
            "garbage",
            "at-risk",
            tuple(m.name for m in huge),
            "holds values of a size that no initialiser draws: memory that nobody wrote",
            f"values between {_TINY:g} and {_HUGE:g}",
            f"the largest is {huge[0].contents.largest:.3g}",
            _REDRAW,
        )
    if learned:
        return
    odd = [m for m in members if m not in huge and _far(m.contents) > _OUTLIER * max(m.contents.std, _TINY)]
    odd = [m for m in odd if m.contents.strong_rows < _SEVERAL]  # that is a part
    odd = [m for m in odd if not m.contents.is_constant]
    if odd:
        first = max((m.contents for m in odd), key=lambda c: c.largest / max(c.std, _TINY))
        yield Fault(
            "outlier",
            "at-risk",
            tuple(m.name for m in odd),
            "holds single values far out in the tail: an outlier, by a cut in absolute terms or by memory nobody wrote",
            f"the largest value below {_OUTLIER:g} std",
            f"{first.largest:.3g} at a std of {first.std:.3g}: {first.largest / max(first.std, _TINY):.0f} std",
            "cut at two or three times the std; " + _REDRAW,
        )


def _far(contents: Contents) -> float:
    """The largest deviation from the mean, at most."""
    return contents.largest - abs(contents.mean)


def _shifted(group: Group, members: list[Member]) -> Iterator[Fault]:
    """Draws around something else than 0, such as ``rand`` in place of ``randn``: every output has the same share."""
    found = [
        m
        for m in members
        if not m.contents.is_constant
        and not _is_computed(m.contents)
        and min(m.contents.rows, m.contents.columns) >= 8
        and abs(m.contents.mean) > max(0.2, 6 / math.sqrt(m.contents.sampled)) * m.contents.std
    ]
    if found:
        first = found[0].contents
        yield Fault(
            "mean",
            "at-risk" if abs(first.mean) > first.std / 2 else "note",
            tuple(m.name for m in found),
            "the values are drawn around a mean that is not 0: all outputs share one large part",
            "a mean of 0",
            f"a mean of {first.mean:.3g} at a std of {first.std:.3g}",
            "draw it around 0",
        )


def _parts(group: Group, members: list[Member], evidence: Evidence) -> Iterator[Fault]:
    """Rows or columns that were left out. Trained weights may have died, and padded tables have rows of zeros."""
    if evidence.learned:
        return
    may_be_table = group.part in {"table", "head"} or evidence.residual is None
    found = []
    for member in members:
        c = member.contents
        if c.is_zero or c.is_constant or min(c.rows, c.columns) < 8 or _is_computed(c):
            continue
        if may_be_table and c.zero_rows == 1:  # the padding token's
            continue
        told = c.largest > _OUTLIER * c.std and c.strong_rows < _SEVERAL  # as an outlier
        strong = 0 if told else c.strong_rows
        rows = c.zero_rows + (c.weak_rows + strong if c.columns >= 16 else 0)
        columns = c.zero_columns + (c.weak_columns if c.rows >= 16 else 0)
        if rows or columns:
            found.append((member, rows, columns))
    if not found:
        return
    member, rows, columns = found[0]
    padding = may_be_table and not columns and rows == member.contents.zero_rows
    text = " and ".join(f"{n} of {m}" for n, m in _counts(member.contents, rows, columns))
    yield Fault(
        "part",
        "note" if padding else "at-risk",
        tuple(m.name for m, _, _ in found),
        "has rows of zeros, as padding has"
        if padding
        else "is zero, tiny or huge in a part: a block that nobody wrote",
        "drawn values everywhere",
        f"{text} zero, or of another size than the others",
        "right for padding; nothing is to be done" if padding else _REDRAW,
    )


def _is_computed(contents: Contents) -> bool:
    """Sinusoids, and what else has rows of exactly one size."""
    return contents.row_spread < 0.1 and contents.column_spread > 2


def _counts(contents: Contents, rows: int, columns: int) -> Iterator[tuple[int, str]]:
    if rows:
        yield rows, f"{contents.rows} rows"
    if columns:
        yield columns, f"{contents.columns} columns"


def copies(evidence: Evidence) -> Iterator[Fault]:
    """Blocks, layers, experts or tensors that were drawn from one seed."""
    severity: FaultLevel = "note" if evidence.learned else "at-risk"
    remedy = "give every layer, expert and shard draws of its own; a seed for each rank"
    repeated: dict[tuple[int, int, int], list[Member]] = {}
    for group in evidence.of(*_DRAWN):
        for member in group.members:
            c = member.contents
            repeat = c.repeat
            if repeat is None or (_is_computed(c) and repeat.share < 0.9):
                continue
            if group.part in {"table", "head"} and repeat.shift == 1 and repeat.share < 0.5:
                continue  # rows for tokens that were added
            count = c.rows if repeat.axis == 0 else c.columns
            if repeat.share * count >= 4 and repeat.share >= 1 / 64:
                repeated.setdefault((repeat.axis, repeat.shift, count), []).append(member)
    for (axis, shift, count), members in repeated.items():
        what = "rows" if axis == 0 else "columns"
        share = max(m.contents.repeat.share for m in members if m.contents.repeat is not None)
        yield Fault(
            "copied-blocks",
            severity,
            tuple(m.name for m in members),
            f"has identical blocks: {what} are the same as those {shift} before, up to a factor",
            "independent draws",
            f"{share:.0%} of {count} {what} are copies",
            remedy,
        )
    by_prefix: dict[int, list[Member]] = {}
    for group in evidence.groups:
        if group.part not in _DRAWN and not _is_matrix(group):
            continue
        for member in group.members:
            c = member.contents
            if c.prefix is not None and not c.is_constant and not _is_computed(c):
                by_prefix.setdefault(c.prefix, []).append(member)
    sets = [tuple(m.name for m in members) for members in by_prefix.values() if len(members) > 1]
    if sets:
        names = tuple(name for each in sets for name in each)
        yield Fault(
            "copies",
            severity,
            names,
            "tensors are identical up to a factor: drawn from the same seed, or copied",
            "independent draws",
            f"{len(names)} tensors in {len(sets)} sets, such as {sets[0][0]} and {sets[0][1]}",
            remedy,
        )
