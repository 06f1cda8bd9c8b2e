"""``audit(model_or_source) -> Audit``: the parameters at fault, from the weights alone; nothing is run or changed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spikepatch.auditing.contents import Contents, merged, of_entry, of_tensor
from spikepatch.auditing.examine import examine
from spikepatch.auditing.fault import Audit
from spikepatch.errors import Refused, SpikepatchError
from spikepatch.plans.plan import Plan, Recipe
from spikepatch.preflight.forward import logits_std
from spikepatch.preflight.program import compile_program
from spikepatch.preflight.subject import Subject, logits_over, of_model, of_source, to_plan_on
from spikepatch.progress import Progress, silent
from spikepatch.recipes.plan_of import plan_on
from spikepatch.recipes.request import parse_request
from spikepatch.residual.example import Given
from spikepatch.residual.inspect import Followed, followed
from spikepatch.residual.map import pattern
from spikepatch.residual.stream import Stream
from spikepatch.residual.trace import trace
from spikepatch.source.layout import layout
from spikepatch.source.match import Match
from spikepatch.source.meta import build_meta, on_meta, skeleton, unwrapped
from spikepatch.source.private import is_transformers_model, promised_ties

if TYPE_CHECKING:
    from spikepatch.source.open import Source


def audit(
    model: nn.Module | str,
    example_inputs: Given = None,
    *,
    expect: str | Recipe | None = None,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Audit:
    """Say which parameters were initialised wrongly, from the weights and the residual map.

    Nothing is run but for the size of the logits, in one forward pass, where it has no closed form or is to be called
    too large.

    Args:
        model: a loaded model, or a SOURCE: a hub id, a folder, ``arch:TYPE``. The weights of a folder are read once, a
            block at a time; without weights it is audited as its own initialiser makes it.
        example_inputs: as in ``spikepatch.inspect``; needed for a plain module.
        expect: a recipe that the weights are to follow: what does not is at-risk.
        seed: of an initialiser that has to be run.
        revision, trust_remote_code: of a SOURCE.
        progress: told (step, done, total).

    Raises:
        SpikepatchError: the model cannot be read, or ``expect`` does not apply to it. Where it cannot be mapped, the
            audit says so and reads the values.
    """
    tell = progress or silent
    source: Source | None = None
    if isinstance(model, str):
        from spikepatch.source.open import open_source

        tell("reading the source", 0, 0)
        source = open_source(model, revision=revision, trust_remote_code=trust_remote_code, weights=True, report=tell)
        subject, name = of_source(source, seed), source.name
    else:
        model = unwrapped(model)
        subject, name = of_model(model, seed), type(model).__name__
    tell("mapping the residual stream", 0, 0)
    found: Followed | str
    try:
        found = followed(subject.structure, trace(subject.structure, example_inputs), name)
    except SpikepatchError as error:
        found = error.why
    planned = None if expect is None else _planned(subject, found, source, expect, example_inputs)
    return audit_subject(subject, found, name, planned=planned, progress=tell)


def _planned(
    subject: Subject, found: Followed | str, source: Source | None, recipe: str | Recipe, example: Given
) -> tuple[Plan, bool]:
    """What the recipe makes of the model, and whether a factor that the model has had to be taken out first."""
    known = None if isinstance(found, str) else found
    if source is not None and source.patched is not None:
        subject, known = of_source(source, 0, patched=False), None
    mapped = to_plan_on(subject, known, source, reinit="all", example=example)
    try:
        return plan_on(mapped, parse_request(recipe, reinit="all")), False
    except Refused:
        with contextlib.suppress(Refused):
            return plan_on(mapped, parse_request(recipe, reinit="all", replace=True)), True
        raise


def audit_subject(
    subject: Subject,
    found: Followed | str,
    name: str,
    *,
    planned: tuple[Plan, bool] | None = None,
    progress: Progress = silent,
) -> Audit:
    """The audit of what ``check`` measures, with the weights that it measures.

    Args:
        found: the subject's map; or why there is none.
    """
    model: Any = subject.structure
    not_said: list[str] = []
    residual, stream = None, None
    if isinstance(found, str):
        not_said.append(f"stds, gains and the head: {found}")
    elif not found.residual.proven:
        not_said.append(f"stds, gains and the head: the map is not proven ({found.residual.leaks[0]})")
    else:
        residual, stream = found.residual, found.streams[0]
    stored = None if subject.match is None else _stored(subject.match, model)
    names = [each for each, p in model.named_parameters() if p.is_floating_point()]
    if stored is None and on_meta(model) and sum(p.numel() for p in model.parameters()) > _WHOLE:
        names, layers = _first_layers(model, names)
        which = "fourth on: the architecture's own initialiser was run on the first three"
        if layers == 1:
            which = "second on: the architecture's own initialiser was run on the first of each kind"
        not_said.append(f"layers from the {which}")
    of = stored or (lambda each: of_tensor(subject.weights(each)))
    contents = _contents(names, of, progress, threads=min(os.cpu_count() or 1, _THREADS) if stored else 1)
    vocabulary = None
    if residual is not None and stream is not None:
        vocabulary = logits_over(model, residual, stream.facts.trace)
    return examine(
        contents,
        source=name,
        architecture=type(model).__name__,
        weights=subject.about,
        residual=residual,
        stream=stream,
        vocabulary=vocabulary,
        tied=promised_ties(model),
        live_buffers=dict(model.named_buffers()),
        built_buffers=_built_buffers(model),
        not_said=not_said,
        logits=partial(_first_logits, subject, stream, vocabulary, progress),
        planned=planned,
    )


def _first_logits(subject: Subject, stream: Stream | None, vocabulary: int | None, progress: Progress) -> float | None:
    """From one forward pass; None of a model that is large, or whose graph cannot be run."""
    if stream is None or vocabulary is None or sum(p.numel() for p in subject.structure.parameters()) > _WHOLE:
        return None
    progress("one forward pass: the size of the logits", 0, 0)
    with contextlib.suppress(SpikepatchError):
        return logits_std(compile_program(stream, torch.device("cpu")), subject.weights, vocabulary)
    return None


#: Elements; of a larger model without weights, drawing all of it takes as long as the rest of a check.
_WHOLE = 500_000_000
#: Layers that tell whether a std goes with depth; one, where three take minutes to draw.
_LAYERS = 3
#: Tensors of a checkpoint that are read at a time, a block of each in memory.
_THREADS = 8


def _first_layers(model: nn.Module, names: list[str]) -> tuple[list[str], int]:
    """Of each group of parameters the first few, and how many."""
    groups: dict[tuple[str, torch.Size], list[str]] = {}
    for name in names:
        groups.setdefault((pattern(name), model.get_parameter(name).shape), []).append(name)
    drawn = sum(shape.numel() * min(len(group), _LAYERS) for (_, shape), group in groups.items())
    layers = _LAYERS if drawn <= 2 * _WHOLE else 1
    kept = {name for group in groups.values() for name in group[:layers]}
    return [name for name in names if name in kept], layers


def _contents(
    names: list[str], of: Callable[[str], Contents], progress: Progress, *, threads: int
) -> dict[str, Contents]:
    """In the order of ``names``, whatever the number of threads."""
    found = {}
    with ThreadPoolExecutor(threads) as pool:
        for i, (name, contents) in enumerate(zip(names, (pool.map if threads > 1 else map)(of, names), strict=True)):
            progress("auditing the weights", i, len(names))
            found[name] = contents
    return found


def _stored(match: Match, model: nn.Module) -> Callable[[str], Contents]:
    """Contents from the checkpoint: parts that are stored apart (an expert each) are read apart."""
    twin = skeleton(model)
    shapes = {name: tuple(p.shape) for name, p in twin.named_parameters()}
    parts: dict[str, list[str]] = {}
    for target in layout(twin):
        parts.setdefault(target.owner, []).append(target.name)

    def of(name: str) -> Contents:
        return merged([of_entry(match.targets[part]) for part in parts[name]], shapes[name])

    return of


def _built_buffers(model: Any) -> dict[str, torch.Tensor]:
    """Those that the constructor makes of the config; none where it cannot be called so."""
    if not is_transformers_model(model):
        return {}
    try:
        return dict(build_meta(type(model), model.config, where=type(model).__name__).named_buffers())
    except SpikepatchError:
        return {}
