"""``check(model) -> StabilityReport``: whether a model is at risk, before a cluster is spent on it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from spikepatch.auditing.fault import Audit
from spikepatch.errors import Refused, first_line
from spikepatch.plans.plan import ModelPart, Reinit
from spikepatch.preflight.arguments import check_numbers, check_together, device_of
from spikepatch.preflight.assemble import View, bound_product, growth
from spikepatch.preflight.audit import audit_subject
from spikepatch.preflight.estimate import estimate
from spikepatch.preflight.forward import measure
from spikepatch.preflight.inputs import random_tokens, text_tokens
from spikepatch.preflight.judge import Thresholds, judged, worst
from spikepatch.preflight.program import compile_program
from spikepatch.preflight.remedies import of_a_model, of_a_source, of_a_tied_head
from spikepatch.preflight.result import Finding, StabilityReport
from spikepatch.preflight.shorter import extended, in_words, shortened
from spikepatch.preflight.steps import run_steps
from spikepatch.preflight.subject import Subject, logits_over, of_model, of_source, proven, to_plan_on, with_recipe
from spikepatch.progress import Progress, silent
from spikepatch.recipes.plan_of import Mapped
from spikepatch.recipes.request import Request, parse_requests
from spikepatch.residual.example import Given, given
from spikepatch.residual.inspect import Followed, followed
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.stream import Stream
from spikepatch.residual.trace import trace
from spikepatch.source.meta import settings_read, unwrapped
from spikepatch.source.private import is_out_of_memory

if TYPE_CHECKING:
    from spikepatch.source.open import Source


def check(
    model: nn.Module | str,
    *,
    recipes: Sequence[str] = (),
    reinit: Reinit = "all",
    factor: float | None = None,
    positions: bool = False,
    replace: bool = False,
    untie: bool = False,
    part: ModelPart | None = None,
    tokens: int = 256,
    batch: int = 2,
    text: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    deep: bool = False,
    steps: int = 0,
    lr: float = 1e-3,
    layers: int | None = None,
    thresholds: Mapping[str, float] | None = None,
    example_inputs: Given = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> StabilityReport:
    """Measure how gradients and activations grow through the depth of a model, and judge it. Nothing is changed.

    Weights, stream, loss and gradients come from one forward and one backward pass in float32; with ``deep`` also the
    spectral norms of all sub-layers' Jacobians. Weights are read or drawn piece by piece, so that a model larger than
    memory can be checked.

    Args:
        model: a loaded model, or a SOURCE: a hub id, a folder, ``arch:TYPE``. Without weights (``arch:TYPE``, a model
            on the meta device) it is checked as its own initialiser makes it.
        recipes: to be compared with the model as it is.
        reinit, factor, positions, replace, untie, part: of the recipes; as in ``spikepatch.plan``. Recipes that scale
            no embedding are compared without ``factor``, ``positions`` and ``replace``, beside others that do.
        tokens, batch: length and number of the random sequences.
        text: a file to take the tokens from instead, by the source's tokenizer.
        seed: of random tokens and of every random weight.
        device: ``auto`` (a GPU where there is one) or as torch names it.
        deep: measure Jacobians.
        steps, lr: also run AdamW steps at this learning rate.
        layers: run the first layers only, at full width, and extrapolate by their growth; for what takes too long.
        thresholds: instead of the defaults of ``preflight.judge.Thresholds``, by name.
        example_inputs: keyword arguments of ``forward`` in place of random tokens, as in ``spikepatch.inspect``; needed
            for a plain module.
        revision, trust_remote_code: of a SOURCE.
        progress: told (step, done, total).

    Raises:
        SpikepatchError: the model cannot be read or mapped, or a recipe does not apply.
    """
    limits = Thresholds.changed(dict(thresholds or {}))
    check_numbers(tokens=tokens, batch=batch, seed=seed, steps=steps, lr=lr, layers=2 if layers is None else layers)
    check_together(steps, layers)
    torch_device = device_of(device)
    tell = progress or silent
    requests = parse_requests(
        recipes, reinit=reinit, seed=seed, factor=factor, positions=positions, replace=replace, untie=untie, part=part
    )
    source: Source | None = None
    with settings_read() as read:
        if isinstance(model, str):
            from spikepatch.source.open import open_source

            tell("reading the source", 0, 0)
            source = open_source(
                model, revision=revision, trust_remote_code=trust_remote_code, weights=True, report=tell
            )
            base = of_source(source, seed)
        else:
            model = unwrapped(model)
            base = of_model(model, seed)
        name = source.name if source is not None else type(base.structure).__name__
        setting = _Setting(name, tokens, batch, seed, torch_device, deep, steps, lr)
        with _in_memory(base, setting):
            inputs = _inputs(base, source, example_inputs, text, tokens=tokens, batch=batch, seed=seed)
            tell("mapping the residual stream", 0, 0)
            found = proven(base, inputs, name)
    # A text is ids alone; plans are made, and weights audited, by all that the model takes.
    whole = found if text is None else followed(base.structure, trace(base.structure, example_inputs), name)
    plain = base
    if recipes and source is not None and source.patched is not None:  # a recipe takes the place of the patch
        plain = of_source(source, seed, patched=False)
    known = whole if plain is base else None
    ground = cache(lambda reinit: to_plan_on(plain, known, source, reinit=reinit, example=example_inputs))
    subjects: list[Subject | StabilityReport] = [base]
    for request, shown in zip(requests, _names(requests), strict=True):
        tell(f"planning {shown}", 0, 0)  # whatever is refused is refused before anything is measured
        try:
            subjects.append(dataclasses.replace(with_recipe(plain, ground(request.reinit), request), recipe=shown))
        except Refused as error:
            subjects.append(_refused(error, name, shown, base))
    audit = audit_subject(base, whole, name, progress=tell)
    reports = []
    while subjects:  # one model's weights in memory at a time
        subject = subjects.pop(0)
        if isinstance(subject, StabilityReport):
            reports.append(subject)
            continue
        own = audit if subject is base else None
        learned = audit.learned and (own is not None or reinit != "all")
        about = _about(subject.recipe or "as it is", tell) if recipes else tell
        with _in_memory(subject, setting):
            about("mapping the residual stream", 0, 0)
            judge = _Judge(limits, own, learned, partial(_remedy, subject, source, partial(ground, "all"), read))
            mapped = found if subject is base else proven(subject, inputs, name)
            reports.append(_check(*_cut(subject, mapped, layers, inputs, name), setting, judge, about))
    if example_inputs is None and 0 < reports[0].tokens < tokens:
        what = f"sequences of {reports[0].tokens} tokens, not {tokens}: the model has no more positions"
        findings = (*reports[0].findings, Finding("tokens", "note", what))
        reports[0] = dataclasses.replace(reports[0], findings=findings)
    return dataclasses.replace(reports[0], models=tuple(reports[1:]))


def _inputs(
    base: Subject, source: Source | None, example: Given, text: str | Path | None, *, tokens: int, batch: int, seed: int
) -> Given:
    """What is measured: a text, the caller's own, or random tokens; None for a plain module without any."""
    if text is not None:
        return text_tokens(Path(text), source, tokens=tokens, batch=batch)
    if example is not None:
        return given(example, base.structure)
    has_config = hasattr(base.structure, "config")
    return random_tokens(base.structure, tokens=tokens, batch=batch, seed=seed) if has_config else None


def _names(requests: Sequence[Request]) -> list[str]:
    """What the compared recipes are called; as they were given, where several have the same name."""
    names = [request.base.name for request in requests]
    return [str(r.given) if names.count(r.base.name) > 1 else r.base.name for r in requests]


def _about(model: str, progress: Progress) -> Progress:
    """``progress``, told which of several models, or of its streams, a step belongs to."""
    return lambda step, done=0, total=0: progress(f"{model}: {step}", done, total)


def _refused(error: Refused, source: str, recipe: str, base: Subject) -> StabilityReport:
    """The column of a recipe that does not apply."""
    return StabilityReport(
        source=source,
        recipe=recipe,
        architecture=type(base.structure).__name__,
        weights="-",
        placement="-",
        width=0,
        sublayers=0,
        device="-",
        tokens=0,
        batch=0,
        seed=0,
        refused=f"{error.what}: {error.why}",
        findings=(Finding("refused", "note", f"refused: {error.what}: {error.why}", remedy=error.remedy),),
    )


def _remedy(
    subject: Subject,
    source: Source | None,
    fresh: Callable[[], Mapped],
    read: Collection[str],
    whole: ResidualMap,
    *,
    untie: bool = False,
) -> str:
    """What makes a fresh model of it that is not at risk; planned for it, and empty where nothing can be.

    Args:
        fresh: what is planned on where nothing of the source is kept.
        whole: the map of the subject.
        untie: the same recipe with a head of its own.
    """
    if untie:
        return of_a_tied_head(Mapped(subject.structure, whole, source), subject.request) if subject.request else ""
    if subject.request is not None or (source is not None and source.patched is not None):
        return "another recipe: `spikepatch recipes` lists them"
    return of_a_model(Mapped(subject.structure, whole)) if source is None else of_a_source(fresh(), source, read)


@dataclasses.dataclass(frozen=True)
class _Judge:
    """What a measured model is judged by. ``remedy`` is asked where one is needed."""

    limits: Thresholds
    audit: Audit | None
    learned: bool
    remedy: Callable[..., str]


@dataclasses.dataclass(frozen=True)
class _Setting:
    source: str
    tokens: int
    batch: int
    seed: int
    device: torch.device
    deep: bool
    steps: int
    lr: float


def _cut(
    subject: Subject, found: Followed, layers: int | None, inputs: Given, name: str
) -> tuple[Subject, Followed, ResidualMap]:
    """What is run, its streams, and the map of the whole."""
    whole = found.residual
    if layers is not None and layers < whole.layers:
        subject = shortened(subject, whole, layers, name)
        found = proven(subject, inputs, name)
    return subject, found, whole


def _check(
    subject: Subject, found: Followed, whole: ResidualMap, setting: _Setting, judge: _Judge, progress: Progress
) -> StabilityReport:
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
def _in_memory(subject: Subject, setting: _Setting) -> Iterator[None]:
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
    setting: _Setting,
    judge: _Judge,
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
        about = _about(blank.stream, progress)
        own = _measured(blank, subject, stream, part, of, once, judge, about, vocabulary)
        further.append(dataclasses.replace(own, initial_loss=None, log_vocab=None, gradients={}))  # the same
    return dataclasses.replace(main, streams=tuple(further), verdict=worst([main, *further]))


def _measured(
    draft: StabilityReport,
    subject: Subject,
    stream: Stream,
    residual: ResidualMap,
    whole: ResidualMap,
    setting: _Setting,
    judge: _Judge,
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
