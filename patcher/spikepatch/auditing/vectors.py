"""Gains, biases, and the steps and decays of state-space models: values that are set, not drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spikepatch.auditing.fault import Fault, FaultLevel
from spikepatch.auditing.groups import Evidence, Group, Member
from spikepatch.auditing.laws import close
from spikepatch.residual.map import Norm

#: Steps of state-space models begin between 0.001 and 0.1 (Gu and Dao 2023); three times as much either way.
_STEPS = (3e-4, 0.3)

#: log of the fastest decay per unit of time: S4 and Mamba begin with rates of 1 to some hundreds, at steps below 0.1.
_FAST = 7.0


def vectors(evidence: Evidence) -> Iterator[Fault]:
    """What is wrong with the vectors of a fresh model."""
    yield from _gains(evidence)
    if not evidence.learned:
        yield from _biases(evidence)
        yield from _steps(evidence)
        yield from _decays(evidence)


def _gains(evidence: Evidence) -> Iterator[Fault]:
    norms = {n.parameter: n for stream in evidence.streams for n in stream.norms if n.parameter is not None}
    for group in evidence.of("norm"):
        norm = norms[group.members[0].name]
        offset = 1.0 if norm.gain == "1+w" else 0.0
        neutral = "0 (the norm multiplies by 1 + w)" if offset else "1"
        sound = [m for m in group.members if not m.contents.nonfinite]
        silent = [m for m in sound if m.contents.is_constant and m.contents.mean + offset == 0]
        if silent:
            design = norm.role == "branch" and len(silent) == len(group.members)
            yield Fault(
                "gain",
                "note" if design else "at-risk",
                tuple(m.name for m in silent),
                "the gain of the norm is zero: what follows it sees nothing",
                f"a gain of 1, w = {neutral}",
                f"w = {silent[0].contents.mean:g} everywhere",
                "set w to " + neutral.split()[0],
            )
        if evidence.learned:
            continue
        drawn = [m for m in sound if not m.contents.is_constant and _is_drawn(m, offset)]
        if drawn:
            yield Fault(
                "gain",
                "at-risk",
                tuple(m.name for m in drawn),
                "the gain of the norm is drawn as if it were a matrix: the norm puts out next to nothing",
                f"a gain of 1, w = {neutral}",
                f"w has a mean of {drawn[0].contents.mean:.3g} and a std of {drawn[0].contents.std:.3g}",
                "set w to " + neutral.split()[0],
            )
        uneven = [m for m in sound if not m.contents.is_constant and m not in drawn and m.contents.elements >= 4]
        if uneven:
            yield Fault(
                "gain",
                "note",
                tuple(m.name for m in uneven),
                "the gain of the norm differs from channel to channel, as after training, or drawn around its value",
                f"a gain of 1, w = {neutral}",
                f"w has a mean of {uneven[0].contents.mean:.3g} and a std of {uneven[0].contents.std:.3g}",
                "set w to " + neutral.split()[0] + ", if the model is fresh",
            )
        other = [
            m for m in sound if m.contents.is_constant and m not in silent and not _is_meant(evidence, norm, m, offset)
        ]
        if other:
            value = other[0].contents.mean
            far = not 2 / 3 < abs(value + offset) < 1.5
            yield Fault(
                "gain",
                "at-risk" if far else "note",
                tuple(m.name for m in other),
                f"the norm puts out {value + offset:.4g} times its normal size: "
                + ("it multiplies by 1 + w" if offset else "its gain is not 1"),
                f"a gain of 1, w = {neutral}",
                f"w = {value:.4g} everywhere",
                "set w to " + neutral.split()[0],
            )


def _is_drawn(member: Member, offset: float) -> bool:
    """Around zero. A gain that has trained for a while is still around 1."""
    gain = member.contents.mean + offset
    return abs(gain) < max(3 * member.contents.std, 0.1) and member.contents.elements >= 4


def _is_meant(evidence: Evidence, norm: Norm, member: Member, offset: float) -> bool:
    """The gain is 1, or that of a branch norm with a factor for depth, 1 / (m sqrt(S))."""
    gain = member.contents.mean + offset
    if abs(gain - 1) < 1e-3:
        return True
    for stream in evidence.streams:
        for p in stream.residual_projections:
            if norm.role == "branch" and p.branch_norm == norm.module:
                return close(abs(gain * p.multiplier), stream.sublayers**-0.5)
    return False


def _biases(evidence: Evidence) -> Iterator[Fault]:
    matrices: dict[str, Member] = {}
    fans: dict[str, int] = {}
    for group in evidence.of("matrix", "projection", "head"):
        for member in group.members:
            module = member.name.rpartition(".")[0]
            matrices[module] = member
            fans[module] = group.matrix.fan_in if group.matrix is not None else member.contents.columns
    of_norms = {n.bias for stream in evidence.streams for n in stream.norms if n.bias is not None}
    for group in evidence.of("bias"):
        left, drawn = [], []
        for member in group.members:
            c, module = member.contents, member.name.rpartition(".")[0]
            if c.is_zero or c.nonfinite:
                continue
            weight, fan = matrices.get(module), fans.get(module)
            if weight is not None and fan is not None and is_torch_default(member, fan):
                if not is_torch_default(weight, fan):
                    left.append(member)
            else:
                drawn.append(member)
        if left:
            yield Fault(
                "bias",
                "at-risk",
                tuple(m.name for m in left),
                "the bias is left at nn.Linear's default, the weight beside it is not",
                "a bias of 0",
                f"uniform, a std of {left[0].contents.std:.3g}",
                "set it to 0",
            )
        if drawn:
            yield _drawn_bias(group, drawn, matrices, fans, of_norms)


def _drawn_bias(
    group: Group, drawn: list[Member], matrices: dict[str, Member], fans: dict[str, int], of_norms: set[str]
) -> Fault:
    first = drawn[0]
    module = first.name.rpartition(".")[0]
    size = math.hypot(first.contents.std, first.contents.mean)
    weight = matrices.get(module)
    usual = weight.contents.std * math.sqrt(fans[module]) if weight is not None else 1.0
    gate = abs(first.contents.mean) > first.contents.std / 2  # forget gates begin open
    large = size > usual > 0 and weight is not None and not gate
    large |= first.name in of_norms and size > 0.5  # what it is added to has a size of 1
    constant = (
        f"{first.contents.mean:.3g} everywhere" if first.contents.is_constant else f"a std of {first.contents.std:.3g}"
    )
    return Fault(
        "bias",
        "at-risk" if large else "note",
        tuple(m.name for m in drawn),
        "the bias is not 0" + (": it is as large as what it is added to, or larger" if large else ""),
        "a bias of 0",
        constant,
        "set it to 0, if it was not meant",
    )


def is_torch_default(member: Member, *fans: int) -> bool:
    """As ``nn.Linear`` leaves weights and biases: uniform on +- 1 / sqrt(fan)."""
    c = member.contents
    if c.elements < 32 or c.is_constant:
        return False
    for fan in fans:
        bound = fan**-0.5
        inside = 0.85 * bound < c.largest <= bound * 1.005
        if inside and c.kurtosis < 2.1 + 10 / math.sqrt(c.sampled) and close(c.std, bound / math.sqrt(3), c.error):
            return True
    return False


def _steps(evidence: Evidence) -> Iterator[Fault]:
    for group in evidence.of("step"):
        wrong = [m for m in group.members if not _STEPS[0] < _softplus(m.contents.mean) < _STEPS[1]]
        if wrong:
            yield Fault(
                "step",
                "at-risk",
                tuple(m.name for m in wrong),
                f"the time step dt of the state space is softplus({wrong[0].contents.mean:.3g}) ="
                f" {_softplus(wrong[0].contents.mean):.3g}: what the state holds is gone after a few tokens",
                "steps between 0.001 and 0.1",
                f"{_softplus(wrong[0].contents.mean):.3g}",
                "b = log(exp(dt) - 1), dt log-uniform on 0.001 to 0.1",
            )


def _softplus(x: float) -> float:
    return x if x > 30 else math.log1p(math.exp(x))


def _decays(evidence: Evidence) -> Iterator[Fault]:
    for group in evidence.of("decay"):
        severity: FaultLevel = "at-risk"
        fast = [m for m in group.members if m.contents.edges[1] > _FAST]
        if fast:
            yield Fault(
                "decay",
                severity,
                tuple(m.name for m in fast),
                "the state space forgets at once: it decays at a rate of exp(w), and w is as large as a rate itself",
                f"w below {_FAST:g}, such as the logarithms of 1, 2, ...",
                f"w is up to {fast[0].contents.edges[1]:.3g}",
                "store the logarithm of the rates",
            )
        flat = [m for m in group.members if m.contents.elements >= 4 and m.contents.std < 0.1 and m not in fast]
        if flat:
            yield Fault(
                "decay",
                severity,
                tuple(m.name for m in flat),
                "all decays of the state space are equal: w of -exp(w) was overwritten, or drawn as a matrix",
                "rates that differ, such as w = log(1), log(2), ...",
                f"w has a mean of {flat[0].contents.mean:.3g} and a std of {flat[0].contents.std:.3g}",
                "write the architecture's own decays",
            )
