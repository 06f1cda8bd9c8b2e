"""The std of matrices: torch's own default, wrong formulas, other layers, other groups."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spikepatch.auditing.fault import Fault
from spikepatch.auditing.groups import Evidence, Group, Member
from spikepatch.auditing.laws import Law, Scheme, close, fan_in, fan_out, inner, law_of
from spikepatch.auditing.vectors import is_torch_default
from spikepatch.plans.plan import small_std

#: A product of a unit input and a matrix has a std of sigma sqrt(in): torch's default 0.58, Xavier about 1, GPT-2 0.55.
_LARGE, _SMALL = 5.0, 0.01
#: How far some steps of training move the std of a matrix.
_TRAINED = 1.25
#: Constants that initialisers use: none of them is a variance by mistake.
_USUAL = (0.02, 0.01, 0.006)
#: Parts of one matrix may be so far apart by sampling, of a thousand elements each.
_UNEVEN = 1.25


def left_at_default(evidence: Evidence) -> Iterator[Fault]:
    """Matrices as ``nn.Linear`` leaves them, where most are not. A mixer's own initialiser may leave some so."""
    groups = [g for g in evidence.of("matrix", "projection", "head") if g.kind != "mixer" and len(g.members)]
    left = {g.names: [m for m in g.members if is_torch_default(m, *_fans(g, m))] for g in groups}
    wholly = sum(len(left[g.names]) == len(g.members) for g in groups)
    if 2 * wholly > len(groups) and not _others_follow(evidence, [g for g in groups if not left[g.names]]):
        return
    for group in groups:
        if members := left[group.names]:
            rest = len(group.members) - len(members)
            yield Fault(
                "torch-default",
                "at-risk",
                tuple(m.name for m in members),
                "is left at nn.Linear's default, uniform on +- 1/sqrt(in)"
                + (f"; the other {rest} of its kind are not" if rest else "; most other matrices are not"),
                "a draw by the model's own rule",
                f"uniform, a std of {members[0].contents.std:.3g}",
                "the initialiser missed it: its name or its class does not match",
            )


def _others_follow(evidence: Evidence, others: list[Group]) -> bool:
    """What is not at the default follows one constant, of tables, the head, and residual projections by depth: a rule
    that most matrices were missed by.
    """
    ends = [g for g in evidence.of("table", "head") if g.std > 0]
    behind = [g for g in others if g.part == "projection" and g.std > 0]
    if len(ends) < 2 or not behind or not all(close(g.std, ends[0].std, g.error, ends[0].error) for g in ends):
        return False
    factors = [s.sublayers**-0.5 for s in evidence.streams] + [1.0]
    return all(any(close(g.std / ends[0].std, f, g.error, ends[0].error) for f in factors) for g in behind)


def _fans(group: Group, member: Member) -> tuple[int, ...]:
    if group.matrix is not None:
        return (group.matrix.fan_in,)
    shape = member.contents.shape
    return (math.prod(shape[1:]) if len(shape) > 1 else 1,)


def wrong_formulas(evidence: Evidence, scheme: Scheme | None) -> Iterator[Fault]:
    """Stds that a known wrong formula gives, and no right one."""
    width = evidence.residual.width if evidence.residual is not None else 0
    plain: list[Group] = []
    for group in evidence.of("matrix", "projection"):
        if group.matrix is None or (group.kind == "mixer" and not group.matrix.reads_stream):
            continue
        stacked = _stacked(group)
        right = scheme is not None and close(group.std, scheme.std(group), group.error)
        for text, std in stacked:
            if not right and close(group.std, std, group.error) and std < _xavier(group) / 1.5:
                yield Fault(
                    "fan",
                    "at-risk",
                    group.names,
                    f"the std is too small: {text} takes the fan of the whole stack of matrices, not of one",
                    f"a std of {_xavier(group):.3g} (Xavier, of one matrix)",
                    f"a std of {group.std:.3g}",
                    "draw each matrix of the stack by itself",
                )
                break
        else:
            plain.append(group)
    yield from _roots(evidence)
    yield from _variances([g for g in plain if not _scaled_by_depth(g, evidence, scheme)], width, scheme)
    yield from _fused(evidence)
    yield from _by_outputs(evidence, scheme)
    yield from _uneven(evidence)


def _variances(groups: list[Group], width: int, scheme: Scheme | None) -> Iterator[Fault]:
    """Variances in place of stds: the formula that most groups follow before the others, each group once."""
    usual = (*_USUAL, small_std(width or 1))
    left = [
        g for g in groups if g.std * math.sqrt(fan_in(g)) < 0.3 and not any(close(g.std, std, g.error) for std in usual)
    ]
    while left:
        found = {
            name: [g for g in left if close(g.std, dict(_formulas(g, width))[name], g.error)]
            for name, _ in _formulas(left[0], width)
        }
        name = max(found, key=lambda each: len(found[each]))
        if not found[name]:
            return
        wrong, left = found[name], [g for g in left if g not in found[name]]
        others = scheme.followers - {g.pattern for g in wrong} if scheme is not None else set()
        if not others or not any(g.pattern in scheme.followers for g in wrong if scheme is not None):
            yield Fault(
                "variance-for-std",
                "at-risk",
                tuple(n for g in wrong for n in g.names),
                f"the std is too small: it is {name}, a variance, where its root is meant",
                f"a std of {math.sqrt(wrong[0].std):.3g}",
                f"a std of {wrong[0].std:.3g}",
                "take the square root",
            )


def _scaled_by_depth(group: Group, evidence: Evidence, scheme: Scheme | None) -> bool:
    """A residual projection of the scheme's std / sqrt(S), which can be a variance's number by chance: at d = 64,
    sqrt(2/(5d)) / sqrt(24) is about 1/d.
    """
    depths = [stream.sublayers for stream in evidence.streams] if group.part == "projection" else []
    return scheme is not None and any(close(group.std, scheme.std(group) * s**-0.5, group.error) for s in depths if s)


def _roots(evidence: Evidence) -> Iterator[Fault]:
    """The root of a std, where the std is meant: the root of 0.02 in place of 0.02, in most matrices."""
    groups = [g for g in inner(evidence.groups) if g.part == "matrix"]
    root = math.sqrt(0.02)
    found = [g for g in groups if close(g.std, root, g.error) and g.std * math.sqrt(fan_in(g)) > 1.2]
    if found and 2 * len(found) > len(groups):
        yield Fault(
            "root-for-std",
            "at-risk",
            tuple(n for g in found for n in g.names),
            "the std is too large: it is the root of 0.02, as if that were a variance",
            "a std of 0.02",
            f"a std of {found[0].std:.3g}",
            "do not take the root",
        )


def _xavier(group: Group) -> float:
    return math.sqrt(2 / (fan_in(group) + fan_out(group)))


def _stacked(group: Group) -> list[tuple[str, float]]:
    """What torch's rules give for a whole (experts, ...) tensor: the second axis counts as inputs."""
    shape = group.members[0].contents.shape
    if len(shape) < 3 or shape[0] < 2:
        return []
    field = math.prod(shape[2:])
    inputs, outputs = shape[1] * field, shape[0] * field
    return [
        ("Xavier's rule", math.sqrt(2 / (inputs + outputs))),
        ("the fan-in rule", inputs**-0.5),
        ("Kaiming's rule", math.sqrt(2 / inputs)),
        ("torch's default rule", (3 * inputs) ** -0.5),
    ]


def _formulas(group: Group, width: int) -> list[tuple[str, float]]:
    found = [("0.02^2", 0.0004), ("2/(in + out)", _xavier(group) ** 2), ("1/in", 1 / fan_in(group))]
    return [(f"2/(5d) of d = {width}", small_std(width) ** 2), *found] if width else found


def _by_outputs(evidence: Evidence, scheme: Scheme | None) -> Iterator[Fault]:
    """Rules of the fan-in on the number of outputs: of a transposed matrix, or by a wrong index of its shape."""
    groups = [g for g in evidence.of("matrix", "projection") if g in inner(evidence.groups) or g.part == "projection"]
    groups = [g for g in groups if g.matrix is not None and len(g.members[0].contents.shape) == 2]
    for factor in (1.0, math.sqrt(2), 3**-0.5):
        found = [g for g in groups if close(g.std, factor * fan_out(g) ** -0.5, g.error)]
        uneven = [g for g in found if not 0.9 < fan_in(g) / fan_out(g) < 1.1]
        followed = scheme is not None and all(close(g.std, scheme.std(g), g.error) for g in uneven)
        if len(found) < 2 or 2 * len(found) <= len(groups) or not uneven or followed:
            continue
        yield Fault(
            "fan",
            "note",
            tuple(n for g in uneven for n in g.names),
            "the std goes with the number of outputs, 1/sqrt(out): the fan-out was taken for the fan-in, or the matrix"
            " is stored transposed",
            f"a std of {factor * fan_in(uneven[0]) ** -0.5:.3g}, by the {fan_in(uneven[0])} inputs",
            f"a std of {uneven[0].std:.3g}, by the {fan_out(uneven[0])} outputs",
            "take the number of inputs of each matrix",
        )
        return


def _uneven(evidence: Evidence) -> Iterator[Fault]:
    """One half or third of a matrix at another std: a fused matrix of which a part follows another rule."""
    for group in evidence.of("matrix", "projection"):
        found = [m for m in group.members if m.contents.uneven > _UNEVEN]
        if found:
            yield Fault(
                "uneven",
                "note",
                tuple(m.name for m in found),
                f"one half or third of the matrix has {found[0].contents.uneven:.3g} times the std of another: a part"
                " of a fused matrix follows another rule",
                "one std",
                f"a std of {found[0].contents.std:.3g}, {found[0].contents.uneven:.3g} times between its parts",
                "right where it was meant so",
            )


def _fused(evidence: Evidence) -> Iterator[Fault]:
    """Xavier on several matrices as one tensor, q, k and v or gate and up: its fan-out is that of all."""
    readers: dict[int, list[Group]] = {}
    for group in evidence.of("matrix"):
        if group.matrix is not None and group.matrix.reads_stream:
            readers.setdefault(group.matrix.sublayer, []).append(group)
    behind = {g.matrix.sublayer: fan_in(g) for g in evidence.of("projection") if g.matrix is not None}
    for sublayer, groups in readers.items():
        for group in groups:
            inputs, outputs = fan_in(group), fan_out(group)
            if group.kind == "attention" and len(groups) == 1 and outputs >= 1.2 * inputs:
                what, own = "queries, keys and values", inputs**-0.5
            elif group.kind in {"mlp", "moe"} and outputs == 2 * behind.get(sublayer, 0):
                what, own = "gate and up", math.sqrt(2 / (inputs + outputs / 2))
            else:
                continue
            if close(group.std, _xavier(group), group.error) and not close(group.std, small_std(inputs)):
                yield Fault(
                    "fused-fan",
                    "note",
                    group.names,
                    f"Xavier's fan is that of the fused tensor: {what} are smaller than if drawn apart",
                    f"a std of {own:.3g} (Xavier, of one matrix)",
                    f"a std of {group.std:.3g} = sqrt(2 / ({inputs} + {outputs}))",
                    "draw the parts by themselves",
                )


def other_layers(evidence: Evidence) -> Iterator[Fault]:
    """Layers whose std is not what the rest of their group says."""
    found: dict[tuple[int, ...], list[tuple[Group, list[Member], float, float]]] = {}
    for group in evidence.of("matrix", "other", "projection"):
        if group.members[0].contents.elements < 64 or len(group.members) < 3:
            continue
        law = law_of(group)
        if law is None or not law.outliers:
            continue
        if tuple(sorted({m.layer for m in group.members if m not in law.outliers})) in found:  # two halves
            law = Law(law.outliers[0].contents.std, 0.0, tuple(m for m in group.members if m not in law.outliers))
        first = law.outliers[0]
        layers = tuple(sorted({m.layer for m in law.outliers}))
        found.setdefault(layers, []).append((group, list(law.outliers), first.contents.std, law.at(first.layer)))
    for layers, entries in found.items():
        names = tuple(m.name for _, members, _, _ in entries for m in members)
        _, _, measured, expected = entries[0]
        few_steps = evidence.touched and all(abs(math.log(m / e)) < math.log(_TRAINED) for _, _, m, e in entries)
        listed = ", ".join(map(str, layers[:6])) + (" ..." if layers[6:] else "")
        yield Fault(
            "layers",
            "note" if few_steps else "at-risk",
            names,
            f"layer{'s' if len(layers) > 1 else ''} {listed}: the std is {measured / expected:.3g} times what the other"
            " layers' law says, so the scaling of another code path applies there, or none",
            f"a std of {expected:.3g}",
            f"a std of {measured:.3g}",
            "one initialiser for all layers",
        )


def other_groups(evidence: Evidence, scheme: Scheme, with_reason: set[str]) -> Iterator[Fault]:
    """Groups that do not follow the scheme of most; not those whose patterns are ``with_reason``."""
    for group in inner(evidence.groups):
        law = law_of(group)
        if law is None or group.pattern in scheme.followers | with_reason:
            continue
        expected = scheme.std(group)
        ratio = law.std / expected
        if close(ratio, 1.0, group.error) or carries_head_size(evidence, group, ratio):
            continue
        yield odd_group(group, scheme, law.std)


def odd_group(group: Group, scheme: Scheme, std: float) -> Fault:
    """It has another std than the scheme says."""
    expected = scheme.std(group)
    return Fault(
        "group",
        "note",
        group.names,
        f"the std is {std / expected:.3g} times what the scheme of the other matrices says ({scheme.text})",
        f"a std of {expected:.3g}",
        f"a std of {std:.3g}",
        "right where it was meant so",
    )


def carries_head_size(evidence: Evidence, group: Group, ratio: float) -> bool:
    """1/sqrt(size of a head) in the weight of the queries, in place of a factor in the attention (T5)."""
    sizes = {evidence.queries.get(name, 0) for name in group.names}
    return len(sizes) == 1 and 0 not in sizes and close(ratio, sizes.pop() ** -0.5, group.error)


def _product(evidence: Evidence, group: Group) -> float:
    """std of the product of a unit input, with the number that it is multiplied by."""
    return group.std * math.sqrt(fan_in(group)) * evidence.factors.get(group.members[0].name, 1.0)


def sizes(evidence: Evidence) -> Iterator[Fault]:
    """Stds that no scheme has, whatever the others are."""
    large: list[Group] = []
    little: list[Group] = []
    for group in evidence.of("matrix", "projection"):
        if group.matrix is None or (group.kind == "mixer" and not group.matrix.reads_stream):
            continue
        size = _product(evidence, group)
        if size > _LARGE:
            large.append(group)
        elif 0 < size < _SMALL and group.part == "matrix":
            little.append(group)
    for groups, word, why in (
        (large, "large", "attention and activations saturate at the first step"),
        (little, "small", "what it computes is lost beside the biases and the eps of norms"),
    ):
        if groups:
            first = groups[0]
            size = _product(evidence, first)
            yield Fault(
                "size",
                "at-risk",
                tuple(n for g in groups for n in g.names),
                f"the std is too {word}: {why}",
                "std times sqrt(in) about 0.5 to 1",
                f"a std of {first.std:.3g}, times sqrt({fan_in(first)}): {size:.3g}",
                "draw it with a std of sqrt(2/(5d)), or 0.02",
            )
