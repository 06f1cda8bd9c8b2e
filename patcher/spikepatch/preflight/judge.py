"""From measurements to a verdict. Every threshold is in one table, with where it comes from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from spikepatch.errors import Refused, did_you_mean
from spikepatch.preflight.result import Finding, Severity, Stability, StabilityReport
from spikepatch.residual.map import ResidualMap

PROMISE = (
    "Predicted from the weights alone: whether gradients explode through the depth of the model at the start. Not"
    " predicted: spikes that come from data, optimiser, learning rate or precision."
)


_ORDER: tuple[Stability, ...] = ("stable", "learned", "at-risk", "unstable", "unknown")

#: Sub-layers of the models that the thresholds are calibrated on.
CALIBRATED = 48

#: log V, from which a first loss is no matter of taste.
_MANY_TIMES = 2.0


@dataclass(frozen=True)
class Thresholds:
    """Calibrated on five initialisations of GPT-2 classes with 24 layers, d = 1024 (transformers' own, and the paper's
    Vanilla, Scaled Embed, Embed LN and Xavier), of which the paper trains four and calls the second and the last two
    conditions unmet.

    Attributes:
        stream_low, stream_high: sigma of the stream entering layer 1; outside, a note. The paper asks for "close to
            1"; its two remedies start at 0.632 = sqrt(2/5) and 1, Vanilla at 0.028. A factor of two either way, over
            units of the branch where the architecture norms or multiplies that.
        excess: of Eq. 15 at layer 1, for 48 sub-layers. At 1 the sub-layer may change the gradient as much as the
            shortcut carries; the remedies have 0.52 and 0.82, Vanilla 26, Xavier 576. What S sub-layers add to the
            squared gradient goes with S excess^2, so at another depth the limit is this times sqrt(48 / S): it moves as
            the excess of every recipe with depth scaling does.
        ratio_at_risk: gradient norm, first over last layer: the remedies have 1.1 and 1.2, Vanilla 13; about their
            geometric mean. Where all branches have norms, of the gradient times the stream's size.
        ratio_unstable: between Vanilla (13), which the paper trains up to 1.7 billion parameters, and Xavier (122).
        loss: initial loss over log V. A uniform guess has 1; logits of unit variance add 0.5 nats, 5 % of log V.
        gaussian: how far ||W|| may be from std (sqrt(in) + sqrt(out)): its fluctuation is a few n^(-2/3), 0.06 times a
            few at n = 64, and learned matrices are off by a factor.
    """

    stream_low: float = 0.5
    stream_high: float = 2.0
    excess: float = 1.0
    ratio_at_risk: float = 5.0
    ratio_unstable: float = 50.0
    loss: float = 1.1
    gaussian: float = 0.25

    @classmethod
    def changed(cls, changes: dict[str, float]) -> Thresholds:
        """The defaults with a user's own values.

        Raises:
            Refused: there is no such threshold, or the value is no positive number.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for name, value in changes.items():
            if name not in names or not 0 < value < math.inf:
                raise Refused(
                    what=f"no threshold {name}={value:g}",
                    where="--threshold",
                    why=f"they are {', '.join(names)}, each a positive number",
                    remedy=did_you_mean(name, set(names) - {name}, "such as --threshold ratio_at_risk=10"),
                )
        return cls(**changes)


def _no_remedy(*, untie: bool = False) -> str:
    return ""


def judged(
    report: StabilityReport,
    residual: ResidualMap,
    thresholds: Thresholds,
    *,
    finite: bool,
    learned: bool = False,
    remedy: Callable[..., str] = _no_remedy,
) -> StabilityReport:
    """The report with its findings and verdict, the audit's included.

    Args:
        finite: all weights, values and gradients are.
        learned: the audit says that the weights have been trained: no threshold of fresh weights holds for them.
        remedy: what has been tried on this model; asked only where it is needed, with ``untie`` for a tied head.
    """
    found = tuple(_learned(report, finite) if learned else _findings(report, residual, thresholds, remedy, finite))
    levels: set[str] = {f.severity for f in found}
    if report.audit is not None:
        levels |= {f.severity for f in report.audit.findings}
    verdict: Stability = "learned" if learned else "stable"
    if "at-risk" in levels:
        verdict = "at-risk"
    if "unstable" in levels:
        verdict = "unstable"
    return dataclasses.replace(report, findings=found, verdict=verdict)


_NOT_FINITE = "a weight, a value of the stream or a gradient is NaN or infinite"


def _learned(report: StabilityReport, finite: bool) -> Iterator[Finding]:
    """Of trained weights: what was measured, and what continued training can do. Their stream has grown, and a gradient
    shrinks as its stream grows; the limits of fresh weights say nothing of them.
    """
    if not finite:
        yield Finding("non-finite", "unstable", _NOT_FINITE)
    ratio = report.gradient_ratio
    profile = f"; the gradient is {ratio:.3g} times as large at the first layer as at the last" if ratio else ""
    yield Finding(
        "learned",
        "note",
        f"the weights are learned: limits for fresh weights do not hold, and there is no verdict by them{profile}",
        ratio,
        remedy="what keeps continued training stable: a warm-up to a smaller learning rate, Adam's beta2 of 0.95, a"
        " gradient clipped at 1, a z-loss, skipping batches whose gradient is far off",
    )
    yield from _steps(report)


def _findings(
    report: StabilityReport, residual: ResidualMap, limits: Thresholds, remedy: Callable[..., str], finite: bool
) -> Iterator[Finding]:
    if not finite:
        yield Finding("non-finite", "unstable", _NOT_FINITE)
    yield from _stream(report, residual, limits)
    yield from _entrances(report, residual, limits, remedy)
    excess, limit = report.eq15_excess_layer1, limits.excess * math.sqrt(CALIBRATED / report.sublayers)
    if excess is not None and excess >= limit:
        yield Finding(
            "eq15",
            "at-risk",
            f"the first MLP may multiply the gradient by 1 + {excess:.3g}: too large for its shortcut",
            excess,
            limit,
            "Eq. 15",
            remedy(),
        )
    yield from _gradient(report, residual, limits, remedy)
    yield from _loss(report, residual, limits, remedy)
    yield from _steps(report)


def _gradient(
    report: StabilityReport, residual: ResidualMap, limits: Thresholds, remedy: Callable[..., str]
) -> Iterator[Finding]:
    """With norms on all branches a sub-layer adds its gain m, whatever its weights: sigma_k^2 = sigma_1^2 + k m^2, and
    a gradient that goes with 1/sigma_k has a ratio of sqrt(1 + S m^2 / sigma_1^2). The limits are of models in which
    weights set what is added, and such a ratio is no sign of large ones; what exceeds it is.
    """
    ratio, relative = report.gradient_ratio, report.relative_gradient_ratio
    if ratio is None or ratio < limits.ratio_at_risk:
        return
    what = f"the gradient is {ratio:.3g} times as large at the first layer as at the last"
    if relative is not None and all(p.branch_norm is not None for p in residual.residual_projections):
        if relative < limits.ratio_at_risk:
            yield Finding(
                "gradient-ratio",
                "note",
                f"{what}, and the stream {ratio / relative:.3g} times as small: norms on the branches make it grow so,"
                " whatever the weights, and no limit is known for that",
                ratio,
                equation="Eq. 7",
            )
            return
        ratio, what = relative, f"{what}, {relative:.3g} times relative to the stream's size"
    unstable = ratio >= limits.ratio_unstable
    yield Finding(
        "gradient-ratio",
        "unstable" if unstable else "at-risk",
        what,
        ratio,
        limits.ratio_unstable if unstable else limits.ratio_at_risk,
        "Eq. 7",
        remedy(),
    )


def _stream(report: StabilityReport, residual: ResidualMap, limits: Thresholds) -> Iterator[Finding]:
    """A note: whether a small shortcut matters is what the gradient and the bound say."""
    start = report.sigma_start
    if start is None or not math.isfinite(start) or not residual.residual_projections:
        return
    if residual.placement == "post-norm":
        yield Finding("stream", "note", "post-norm: norms on the stream set its size, whatever the embedding's", start)
        return
    unit, of = _unit(report, residual)
    if limits.stream_low <= start / unit <= limits.stream_high:
        return
    small = start / unit < limits.stream_low
    yield Finding(
        "stream",
        "note",
        f"the stream enters the first layer with a std of {start:.3g}{of}:"
        + (" a small shortcut, whose gradient the first sub-layers may multiply" if small else " far above 1"),
        start / unit,
        limits.stream_low if small else limits.stream_high,
        "Eq. 14",
        "" if small else "give the embedding a std near 1",
    )


def _entrances(
    report: StabilityReport, residual: ResidualMap, limits: Thresholds, remedy: Callable[..., str]
) -> Iterator[Finding]:
    """Where tokens have a large shortcut and features none: the ratios above are of all positions together."""
    unit, _ = _unit(report, residual) if residual.residual_projections else (1.0, "")
    for entrance in report.entrances:
        size, others = entrance.sigma, entrance.others
        if size is None or others is None or not size / unit < limits.stream_low <= others / unit:
            continue
        yield Finding(
            "entrance",
            "at-risk",
            f"features of {' and '.join(entrance.inputs)} enter the stream with a std of {size:.3g}, where tokens have"
            f" {others:.3g}: a small shortcut at their positions",
            size / unit,
            limits.stream_low,
            "Eq. 14",
            remedy(),
        )


def _unit(report: StabilityReport, residual: ResidualMap) -> tuple[float, str]:
    """What the stream's size is relative to: 1, the size that a norm on the branch sets, or a constant factor on it.

    With a factor m on every branch, x + m g(norm(x)) is m (x/m + g(norm(x/m))): the plain stream in units of m.
    """
    first = residual.residual_projections[0]
    if first.branch_norm is not None and report.layers and report.layers[0].sigma_branch > 0:
        unit = report.layers[0].sigma_branch
        return unit, f", where the norm on the branch makes its sub-layers add {unit:.3g}"
    if first.multiplier != 1 and first.multiplier > 0:
        return first.multiplier, f", where the sub-layers are multiplied by {first.multiplier:.3g}"
    return 1.0, ""


def _loss(
    report: StabilityReport, residual: ResidualMap, limits: Thresholds, remedy: Callable[..., str]
) -> Iterator[Finding]:
    """At-risk where it is many times log V. A tied head predicts the current token once the shortcut is large, which
    passes within steps; whether its table is too large as well, the audit says.
    """
    loss, uniform = report.initial_loss, report.log_vocab
    if loss is None or uniform is None or not loss > limits.loss * uniform:
        return
    tied = residual.head is not None and residual.head.tied
    why = (
        ": the head is tied, so a stream that is mostly the token's own embedding makes it predict the current token"
        if tied
        else ""
    )
    yield Finding(
        "initial-loss",
        "at-risk" if loss > _MANY_TIMES * uniform and not tied else "note",
        f"the initial loss is {loss:.3g}, log V is {uniform:.3g}{why}",
        loss,
        limits.loss * uniform,
        remedy=remedy(untie=True) if tied else "smaller head weights",
    )


def _steps(report: StabilityReport) -> Iterator[Finding]:
    if not report.steps:
        return
    first, last = report.steps[0], report.steps[-1]
    values = [v for s in report.steps for v in (s.loss, s.gradient_norm, s.sigma_last)]
    if not all(map(math.isfinite, values)):
        yield Finding("steps", "unstable", "a value became NaN or infinite during the optimiser steps")
    elif last.loss > first.loss:
        yield Finding(
            "steps",
            "unstable",
            f"the loss rose from {first.loss:.4g} to {last.loss:.4g} in {len(report.steps) - 1} optimiser steps",
            last.loss,
            first.loss,
            remedy="a smaller learning rate, a warm-up, or a recipe",
        )


def at_or_above(report: StabilityReport, severity: Severity) -> bool:
    """The verdict is ``severity`` or worse; ``unknown`` counts as worse than anything."""
    return _ORDER.index(report.verdict) >= _ORDER.index(severity)


def worst(reports: Iterable[StabilityReport]) -> Stability:
    """The verdict on all of them together."""
    return max((report.verdict for report in reports), key=_ORDER.index)
