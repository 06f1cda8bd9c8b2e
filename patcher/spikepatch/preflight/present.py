"""A stability report for people: tables for the terminal, and the same with curves as a page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

from spikepatch.auditing.words import named
from spikepatch.preflight.judge import CALIBRATED, PROMISE, Thresholds
from spikepatch.preflight.result import LayerReport, Stability, StabilityReport
from spikepatch.report.document import Badge, Chart, Line, Page, Ranked, Section, Table, Tone, number

_TONES: dict[Stability, Tone] = {
    "stable": "good", "learned": "neutral", "at-risk": "warning", "unstable": "bad", "unknown": "neutral",
}  # fmt: skip
#: Rows that have a limit, or say what was measured: they come first.
_SHOWN = 7


def summary_table(report: StabilityReport, thresholds: Thresholds, *, details: bool = True) -> Table:
    """One column per compared model; without ``details`` only what the verdict rests on."""
    models = report.every
    excess = thresholds.excess * math.sqrt(CALIBRATED / max(report.sublayers, 1))
    rows: list[tuple[str, Callable[[StabilityReport], str]]] = [
        ("verdict", _verdict),
        ("weights", lambda m: m.weights),
        ("layers run", lambda m: f"{m.shortened.layers} of {m.shortened.of}" if m.shortened else "-"),
        ("stream entering layer 1, std (near 1)", lambda m: number(m.sigma_start)),
        *((f"of it, {', '.join(e)}", partial(_entrance, e)) for e in _inputs(models)),
        (f"gradient, first over last (below {thresholds.ratio_at_risk:g})", _ratio),
        (f"Eq. 15 excess at layer 1 (below {excess:.2g})", lambda m: number(m.eq15_excess_layer1)),
        ("initial loss (near log V)", _loss),
        ("stream after the last layer", lambda m: number(m.sigma_end)),
        ("gradient times the stream's size, first over last", lambda m: number(m.relative_gradient_ratio)),
        ("Eq. 15 excess, by the stream there", lambda m: number(m.eq15_excess_layer1_stream)),
        ("Eq. 7, product of the bounds (less is better)", lambda m: number(m.bound_product)),
        ("product of measured Jacobians", lambda m: number(m.jacobian_product)),
        ("growth exponent, activations (near 0)", lambda m: number(m.growth_activations)),
        ("growth exponent, gradients (near 0)", lambda m: number(m.growth_gradients)),
    ]
    groups = dict.fromkeys(name for m in models for name in m.gradients)
    rows += [(f"gradient of {group}", partial(_gradient, group)) for group in groups]
    rows = rows if details else rows[: _SHOWN + len(_inputs(models))]
    if report.steps:
        last = f"after {len(report.steps) - 1} steps"
        rows += [
            (f"loss {last}", lambda m: number(m.steps[-1].loss) if m.steps else "-"),
            (f"stream std {last}", lambda m: number(m.steps[-1].sigma_last) if m.steps else "-"),
            (f"largest attention logit {last}", lambda m: number(m.steps[-1].attention_logit) if m.steps else "-"),
        ]
    shown = [(label, *(value(m) for m in models)) for label, value in rows]
    kept = [row for row in shown if any(entry != "-" for entry in row[1:])]
    return Table("", ("", *(m.name for m in models)), tuple(kept))


def _inputs(models: Iterable[StabilityReport]) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(entrance.inputs for model in models for entrance in model.entrances))


def _entrance(inputs: tuple[str, ...], report: StabilityReport) -> str:
    """The size at the features' positions, and at the others."""
    found = next((e for e in report.entrances if e.inputs == inputs), None)
    return f"{number(found.sigma)} (others {number(found.others)})" if found is not None else "-"


def _gradient(group: str, report: StabilityReport) -> str:
    return number(report.gradients.get(group))


def _ratio(report: StabilityReport) -> str:
    """Where norms on the branches set it, no limit is held against it."""
    free = any(f.name == "gradient-ratio" and f.limit is None for f in report.findings)
    return number(report.gradient_ratio) + (" (no limit)" if free else "")


def _loss(report: StabilityReport) -> str:
    return f"{number(report.initial_loss)} ({number(report.log_vocab)})" if report.initial_loss is not None else "-"


def _verdict(report: StabilityReport) -> str:
    return f"refused: {report.refused}" if report.refused else report.verdict


def layer_table(report: StabilityReport) -> Table:
    """One row per sub-layer."""
    rows = [
        (
            str(layer.layer + 1),
            s.kind,
            number(s.sigma_in),
            number(s.sigma_branch),
            number(s.ratio),
            number(s.gradient_norm),
            number(s.bound),
            number(s.jacobian),
        )
        for layer in report.layers
        for s in layer.sublayers
    ]
    headers = ("layer", "sub-layer", "std in", "std added", "ratio", "gradient", "bound", "Jacobian")
    return Table(f"{report.name}: sub-layers", headers, tuple(rows))


def embedding_table(report: StabilityReport) -> Table:
    """One row per table of embeddings."""
    rows = [
        (
            e.parameter,
            e.kind,
            number(e.std),
            number(e.small_init),
            "through a norm" if e.normed else f"times {number(e.scale)}",
        )
        for e in report.embeddings
    ]
    return Table(f"{report.name}: embeddings", ("table", "kind", "std", "small init", "on the way"), tuple(rows))


def findings(report: StabilityReport) -> Iterable[str]:
    """One line each, with the limit; then remedies, once each. The audit's come first."""
    if report.audit is not None:
        for fault in report.audit.findings:
            yield f"{fault.severity}: {', '.join(named(fault)[:4])}: {fault.what} ({fault.measured})"
    for f in report.findings:
        compared = f"{number(f.measured)}, the limit is {number(f.limit)}" if f.limit is not None else ""
        rests_on = "; ".join(filter(None, (f.equation, compared)))
        yield f"{f.severity}: {f.what}" + (f" ({rests_on})" if rests_on else "")
    yield from (f"remedy: {remedy}" for remedy in dict.fromkeys(f.remedy for f in report.findings if f.remedy))
    yield from (f"not measured: {reason}" for reason in report.not_measured)


def ranked(report: StabilityReport) -> tuple[Ranked, ...]:
    """The same, the worst first."""
    ranks: dict[str, Tone] = {
        "unstable": "bad", "at-risk": "warning", "note": "neutral", "remedy": "good", "not measured": "neutral",
    }  # fmt: skip
    lines = sorted((line.split(": ", 1) for line in findings(report)), key=lambda line: [*ranks].index(line[0]))
    return tuple(Ranked(rank, text, ranks[rank]) for rank, text in lines)


def not_covered(report: StabilityReport) -> Iterable[str]:
    """Why bounds are not given, each reason once for all compared models."""
    reasons: dict[str, list[str]] = {}
    for model in report.every:
        found = Counter(s.not_covered for layer in model.layers for s in layer.sublayers if s.not_covered)
        for reason, count in found.items():
            reasons.setdefault(reason, []).append(f"{model.name} ({count} of {model.sublayers} sub-layers)")
    for reason, models in reasons.items():
        yield f"bounds not covered: {reason}: {', '.join(models)}"


def page(report: StabilityReport, thresholds: Thresholds) -> Page:
    """The whole report, with per-layer curves of all compared models."""
    models = report.every
    badges = tuple(Badge(m.name, m.verdict, _TONES[m.verdict]) for m in models)
    sections = [Section("Compared", (PROMISE, *not_covered(report)), (summary_table(report, thresholds),))]
    for m in models:
        found = ranked(m)
        sections.append(Section(f"Findings: {m.name}", () if found else ("none",), (embedding_table(m),), ranked=found))
    sections.append(Section("Along the layers", charts=tuple(_layer_charts(models, thresholds))))
    if any(m.steps for m in models):
        sections.append(Section("Optimiser steps", charts=tuple(_step_charts(models))))
    sections.append(Section("Sub-layers", tables=tuple(layer_table(m) for m in models if m.layers)))
    about = (
        f"{report.architecture}, {report.placement}, width {report.width}, {report.sublayers} sub-layers;"
        f" {report.batch} x {report.tokens} tokens, seed {report.seed}, float32 on {report.device}"
    )
    footer = "Equations: Takase et al., Spike No More, arXiv 2312.16903. Bounds use the least std over the tokens."
    return Page(f"Pre-flight: {report.source}", about, badges, tuple(sections), footer)


def figure(report: StabilityReport) -> tuple[Chart, ...]:
    """The risk at a glance: the bound of Eq. 15, the paper's Figure 2, where it covers the MLPs, and the gradient."""
    wanted = ("Bound of the MLP, Eq. 15", "Gradient at each layer's input")
    charts = {chart.title: chart for chart in _layer_charts(report.every, Thresholds())}
    return tuple(charts[title] for title in wanted if title in charts)


def _layer_charts(models: tuple[StabilityReport, ...], limits: Thresholds) -> Iterable[Chart]:
    curves: list[tuple[str, str, Callable[[LayerReport], float | None], tuple[tuple[str, float], ...]]] = [
        ("Stream at each layer's input", "std", lambda x: x.sigma_in, (("at-risk below", limits.stream_low),)),
        ("What a layer adds", "std of its largest sub-layer", lambda x: x.sigma_branch, ()),
        ("Gradient at each layer's input", "||dL/dx||", lambda x: x.gradient_norm, ()),
        ("Bound of the MLP, Eq. 15", "bound", lambda x: x.bound_mlp, ()),
        ("Bound of the attention, Eq. 20", "bound", lambda x: x.bound_attention, ()),
        ("Measured Jacobian of a layer", "spectral norm", lambda x: x.jacobian, ()),
    ]
    for title, label, value, marks in curves:
        series = [Line(m.name, tuple((x.layer + 1, value(x)) for x in m.layers)) for m in models]
        drawn = tuple(s for s in series if any(y is not None for _, y in s.points))
        if drawn:
            yield Chart(title, "layer", label, drawn, log=True, marks=marks)


def _step_charts(models: tuple[StabilityReport, ...]) -> Iterable[Chart]:
    for title, label, name, log in (
        ("Loss", "nats", "loss", False),
        ("Gradient norm", "norm", "gradient_norm", True),
        ("Stream after the last layer", "std", "sigma_last", True),
        ("Largest attention logit", "logit", "attention_logit", False),
    ):
        series = tuple(Line(m.name, tuple((s.step, getattr(s, name)) for s in m.steps)) for m in models if m.steps)
        yield Chart(title, "step", label, series, log=log)
