"""One model of a ``check``: run on numbers, measured, and judged; each of its streams by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from spikepatch.auditing.fault import Audit
from spikepatch.errors import Refused, first_line
from spikepatch.preflight.assemble import View, bound_product, growth
from spikepatch.preflight.estimate import estimate
from spikepatch.preflight.forward import measure
from spikepatch.preflight.judge import Thresholds, judged, worst
from spikepatch.preflight.program import compile_program
from spikepatch.preflight.result import Finding, StabilityReport
from spikepatch.preflight.shorter import extended, in_words, shortened
from spikepatch.preflight.steps import run_steps
from spikepatch.preflight.subject import Subject, logits_over, proven
from spikepatch.progress import Progress
from spikepatch.residual.example import Given
from spikepatch.residual.inspect import Followed
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.stream import Stream
from spikepatch.source.private import is_out_of_memory


def about_a_part(model: str, progress: Progress) -> Progress:
    """``progress``, told which of several models, or of its streams, a step belongs to."""
    return lambda step, done=0, total=0: progress(f"{model}: {step}", done, total)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a measured model is judged by. ``remedy`` is asked where one is needed."""

    limits: Thresholds
    audit: Audit | None
    learned: bool
    remedy: Callable[..., str]


@dataclasses.dataclass(frozen=True)
class Setting:
    source: str
    tokens: int
    batch: int
    seed: int
    device: torch.device
    deep: bool
    steps: int
    lr: float


def cut(
    subject: Subject, found: Followed, layers: int | None, inputs: Given, name: str
) -> tuple[Subject, Followed, ResidualMap]:
    """What is run, its streams, and the map of the whole."""
    whole = found.residual
    if layers is not None and layers < whole.layers:
        subject = shortened(subject, whole, layers, name)
        found = proven(subject, inputs, name)
    return subject, found, whole


def measured(
    subject: Subject, found: Followed, whole: ResidualMap, setting: Setting, judge: Judgement, progress: Progress
) -> StabilityReport:
    """Run a model, measure and judge it; where an operation of it cannot be run, the report says so."""
    residual, graph = found.residual, found.streams[0].facts.trace
    ids = next((x for x in graph.inputs.values() if not x.is_floating_point()), None)
    draft = StabilityReport(
        source=setting.source,
        recipe=subject.recipe,
        architecture=residual.architecture,
        weights=subject.about + (", learned" if judge.learned else ""),
        audit=judge.audit,
        placement=residual.placement,
        width=residual.width,
        sublayers=residual.sublayers,
        device=str(setting.device),
        tokens=ids.shape[1] if ids is not None else 0,
        batch=ids.shape[0] if ids is not None else 1,
        seed=setting.seed,
    )
    try:
        return _measured_all(draft, subject, found, whole, setting, judge, progress)
    except (RuntimeError, NotImplementedError, IndexError) as error:  # an operation of the model
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        finding = Finding("not-measured", "note", f"the traced graph cannot be run on numbers: {reason}")
        return dataclasses.replace(draft, findings=(finding,), not_measured=(reason,))


@contextlib.contextmanager
def in_memory(subject: Subject, setting: Setting) -> Iterator[None]:
    """Out of memory is a refusal."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        elsewhere = "" if setting.device.type == "cpu" else ", or --device cpu"
        less = f"--batch 1, --tokens {max(2, setting.tokens // 4)}{elsewhere}"
        raise Refused(
            what="it does not fit into memory",
            where=setting.source + (f" with {subject.recipe}" if subject.recipe else ""),
            why=f"{setting.batch} x {setting.tokens} tokens on {setting.device}: {first_line(error)}",
            remedy=f"give fewer sequences or shorter ones: {less}",
        ) from error


def _measured_all(
    draft: StabilityReport,
    subject: Subject,
    found: Followed,
    whole: ResidualMap,
    setting: Setting,
    judge: Judgement,
    progress: Progress,
) -> StabilityReport:
    """The stream that feeds the output with all others; the verdict is the worst of them."""
    streams, residual = found.streams, found.residual
    graph = streams[0].facts.trace
    vocabulary = logits_over(subject.structure, residual, graph)
    judge = dataclasses.replace(judge, remedy=cache(partial(judge.remedy, whole=whole)))
    main = _measured(draft, subject, streams[0], residual, whole, setting, judge, progress, vocabulary)
    further = []
    for stream, part, of in zip(streams[1:], residual.streams, whole.streams, strict=True):
        blank = dataclasses.replace(
            draft, stream="encoder", audit=None, placement=part.placement, width=part.width, sublayers=part.sublayers
        )
        once = dataclasses.replace(setting, steps=0)
        about = about_a_part(blank.stream, progress)
        own = _measured(blank, subject, stream, part, of, once, judge, about, vocabulary)
        further.append(dataclasses.replace(own, initial_loss=None, log_vocab=None, gradients={}))  # the same
    return dataclasses.replace(main, streams=tuple(further), verdict=worst([main, *further]))


def _measured(
    draft: StabilityReport,
    subject: Subject,
    stream: Stream,
    residual: ResidualMap,
    whole: ResidualMap,
    setting: Setting,
    judge: Judgement,
    progress: Progress,
    vocabulary: int | None,
) -> StabilityReport:
    program = compile_program(stream, setting.device)
    if long := estimate(program, subject.weights, setting.tokens * setting.batch, of=whole.layers):
        progress(long)
    found = measure(program, residual, subject.weights, deep=setting.deep, vocabulary=vocabulary, progress=progress)
    view = View(program, residual, found, judge.limits)
    layers = view.layers()
    first, second = view.excesses()
    norms = [layer.gradient_norm for layer in layers]
    relative = [layer.gradient_norm * layer.sigma_in for layer in layers]
    jacobians = [layer.jacobian for layer in layers]
    start, end = found.start, found.end
    steps = run_steps(
        program, residual, subject.weights,
        steps=setting.steps, lr=setting.lr, vocabulary=vocabulary, progress=progress,
    )  # fmt: skip
    report = dataclasses.replace(
        draft,
        embeddings=tuple(view.embeddings()),
        layers=layers,
        entrances=tuple(found.entrances),
        sigma_start=start.mean if start is not None else None,
        sigma_end=end.mean if end is not None else None,
        initial_loss=found.loss,
        log_vocab=math.log(vocabulary) if vocabulary is not None else None,
        gradient_ratio=norms[0] / norms[-1] if norms[-1] else None,
        relative_gradient_ratio=relative[0] / relative[-1] if relative[-1] else None,
        growth_activations=growth(start.mean, end.mean, len(layers)) if start is not None and end is not None else None,
        growth_gradients=growth(norms[-1], norms[0], len(layers)),
        eq15_excess_layer1=first,
        eq15_excess_layer1_stream=second,
        bound_product=bound_product(layers).value,
        jacobian_product=math.prod(j for j in jacobians if j is not None) if None not in jacobians else None,
        gradients=found.gradients,
        steps=tuple(steps) if setting.steps else (),  # nothing is run before
        not_measured=tuple(found.problems),
    )
    report = extended(report, whole, setting.source)
    finite = found.finite and all(w.finite for w in found.weights.values())
    report = judged(report, residual, judge.limits, finite=finite, learned=judge.learned, remedy=judge.remedy)
    if report.shortened is None:
        return report
    notes = tuple(Finding("layers", "note", words) for words in in_words(report.shortened))
    return dataclasses.replace(report, findings=(*report.findings, *notes))
