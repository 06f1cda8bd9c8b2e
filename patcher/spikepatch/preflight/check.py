"""``check(model) -> StabilityReport``: whether a model is at risk, before a cluster is spent on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from spikepatch.data.rows import Reading
from spikepatch.errors import Refused
from spikepatch.plans.plan import ModelPart, Reinit
from spikepatch.preflight.arguments import check_numbers, check_together, device_of
from spikepatch.preflight.audit import audit_subject
from spikepatch.preflight.inputs import random_tokens, text_tokens
from spikepatch.preflight.judge import Thresholds
from spikepatch.preflight.one_model import Judgement, Setting, about_a_part, cut, in_memory, measured
from spikepatch.preflight.remedies import of_a_model, of_a_source, of_a_tied_head
from spikepatch.preflight.result import Finding, StabilityReport
from spikepatch.preflight.subject import Subject, of_model, of_source, proven, to_plan_on, with_recipe
from spikepatch.progress import Progress, silent
from spikepatch.recipes.plan_of import Mapped
from spikepatch.recipes.request import Request, parse_requests
from spikepatch.residual.example import Given, given
from spikepatch.residual.inspect import followed
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.trace import trace
from spikepatch.source.meta import unwrapped

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
    tokens: int = 128,
    batch: int = 1,
    text: str | Path | None = None,
    text_column: str | None = None,
    split: str | None = None,
    token_dtype: Literal["uint16", "uint32"] | None = None,
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
        text: data to take the tokens from instead, as `train` reads them: a file, a glob, a data set.
        text_column, split, token_dtype: how they are read, as in ``spikepatch.train``.
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
    if isinstance(model, str):
        from spikepatch.source.open import open_source

        tell("reading the source", 0, 0)
        source = open_source(model, revision=revision, trust_remote_code=trust_remote_code, weights=True, report=tell)
        base = of_source(source, seed)
    else:
        model = unwrapped(model)
        base = of_model(model, seed)
    name = source.name if source is not None else type(base.structure).__name__
    setting = Setting(name, tokens, batch, seed, torch_device, deep, steps, lr)
    with in_memory(base, setting):
        how = Reading(text_column, split, token_dtype)
        inputs = _inputs(base, source, example_inputs, text, how, tokens=tokens, batch=batch, seed=seed)
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
        about = about_a_part(subject.recipe or "as it is", tell) if recipes else tell
        with in_memory(subject, setting):
            about("mapping the residual stream", 0, 0)
            judge = Judgement(limits, own, learned, partial(_remedy, subject, source, partial(ground, "all"), untie))
            mapped = found if subject is base else proven(subject, inputs, name)
            reports.append(measured(*cut(subject, mapped, layers, inputs, name), setting, judge, about))
    if example_inputs is None and 0 < reports[0].tokens < tokens:
        what = f"sequences of {reports[0].tokens} tokens, not {tokens}: the model has no more positions"
        findings = (*reports[0].findings, Finding("tokens", "note", what))
        reports[0] = dataclasses.replace(reports[0], findings=findings)
    return dataclasses.replace(reports[0], models=tuple(reports[1:]))


def _inputs(
    base: Subject,
    source: Source | None,
    example: Given,
    text: str | Path | None,
    reading: Reading,
    *,
    tokens: int,
    batch: int,
    seed: int,
) -> Given:
    """What is measured: a text, the caller's own, or random tokens; None for a plain module without any."""
    if text is not None:
        return text_tokens(text, source, tokens=tokens, batch=batch, reading=reading)
    if example is not None:
        return given(example, base.structure)
    has_config = hasattr(base.structure, "config")
    return random_tokens(base.structure, tokens=tokens, batch=batch, seed=seed) if has_config else None


def _names(requests: Sequence[Request]) -> list[str]:
    """What the compared recipes are called; as they were given, where several have the same name."""
    names = [request.base.name for request in requests]
    return [str(r.given) if names.count(r.base.name) > 1 else r.base.name for r in requests]


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
    untied: bool,
    whole: ResidualMap,
    *,
    untie: bool = False,
) -> str:
    """What makes a fresh model of it that is not at risk; planned for it, and empty where nothing can be.

    Args:
        fresh: what is planned on where nothing of the source is kept.
        untied: a head of its own was asked for.
        whole: the map of the subject.
        untie: the same recipe with a head of its own.
    """
    if untie:
        return of_a_tied_head(Mapped(subject.structure, whole, source), subject.request) if subject.request else ""
    if subject.request is not None or (source is not None and source.patched is not None):
        return "another recipe: `spikepatch recipes` lists them"
    if source is None:
        return of_a_model(Mapped(subject.structure, whole), untie=untied)
    return of_a_source(fresh(), source, untie=untied)
