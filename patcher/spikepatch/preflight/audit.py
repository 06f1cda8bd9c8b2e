"""``audit(model_or_source) -> Audit``: the parameters at fault, from the weights alone; nothing is run or changed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spikepatch.auditing.contents import Contents, merged, of_entry, of_tensor
from spikepatch.auditing.examine import examine
from spikepatch.auditing.fault import Audit
from spikepatch.errors import Refused, SpikepatchError
from spikepatch.plans.plan import Plan, Recipe
from spikepatch.preflight.subject import Subject, of_model, of_source, vocabulary_of
from spikepatch.progress import Progress, silent
from spikepatch.recipes.plan_of import plan
from spikepatch.residual.example import Given
from spikepatch.residual.inspect import map_of
from spikepatch.residual.map import ResidualMap, pattern
from spikepatch.residual.ops import shape
from spikepatch.residual.stream import Stream, find
from spikepatch.residual.trace import trace
from spikepatch.source.layout import layout
from spikepatch.source.match import match_source
from spikepatch.source.meta import build_meta, check_module, on_meta, skeleton
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
    """Say which parameters were initialised wrongly, from the weights and the residual map alone.

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
    if isinstance(model, str):
        from spikepatch.source.open import open_source

        tell("reading the source", 0, 0)
        source = open_source(model, revision=revision, trust_remote_code=trust_remote_code, weights=True, report=tell)
        planned = _planned(model, expect, revision=revision, trust_remote_code=trust_remote_code)
        return audit_subject(of_source(source, seed), source.name, source=source, planned=planned, progress=tell)
    check_module(model)
    subject, name = of_model(model, seed), type(model).__name__
    planned = _planned(model, expect, example_inputs=example_inputs)
    return audit_subject(subject, name, example_inputs=example_inputs, planned=planned, progress=tell)


def _planned(model: nn.Module | str, recipe: str | Recipe | None, **options: Any) -> tuple[Plan, bool] | None:
    """What the recipe makes of the model, and whether a factor that the model has had to be taken out first."""
    if recipe is None:
        return None
    try:
        return plan(model, recipe, reinit="all", **options), False
    except Refused:
        with contextlib.suppress(Refused):
            return plan(model, recipe, reinit="all", replace=True, **options), True
        raise


def audit_subject(
    subject: Subject,
    name: str,
    *,
    source: Source | None = None,
    example_inputs: Given = None,
    planned: tuple[Plan, bool] | None = None,
    progress: Progress = silent,
) -> Audit:
    """The audit of what ``check`` measures, with the weights that it measures."""
    model: Any = subject.structure
    progress("mapping the residual stream", 0, 0)
    not_said: list[str] = []
    residual, stream = _mapped(model, name, example_inputs, not_said)
    stored = _stored(source, model) if source is not None and source.checkpoint is not None else None
    names = [each for each, p in model.named_parameters() if p.is_floating_point()]
    if stored is None and on_meta(model) and sum(p.numel() for p in model.parameters()) > _WHOLE:
        names, layers = _first_layers(model, names)
        which = "fourth on: the architecture's own initialiser was run on the first three"
        if layers == 1:
            which = "second on: the architecture's own initialiser was run on the first of each kind"
        not_said.append(f"layers from the {which}")
    of = stored or (lambda each: of_tensor(subject.weights(each)))
    contents = _contents(names, of, progress, threads=min(os.cpu_count() or 1, _THREADS) if stored else 1)
    vocabulary = vocabulary_of(model)
    logits = stream is not None and vocabulary is not None and shape(stream.facts.trace.output)[-1:] >= (vocabulary,)
    return examine(
        contents,
        source=name,
        architecture=type(model).__name__,
        weights=subject.about,
        residual=residual,
        stream=stream,
        vocabulary=vocabulary if logits else None,
        tied=promised_ties(model),
        live_buffers=dict(model.named_buffers()),
        built_buffers=_built_buffers(model),
        not_said=not_said,
        planned=planned,
    )


def _mapped(
    model: nn.Module, name: str, example_inputs: Given, not_said: list[str]
) -> tuple[ResidualMap | None, Stream | None]:
    try:
        graph = trace(model, example_inputs)
        residual = map_of(model, graph, name)
    except SpikepatchError as error:
        not_said.append(f"stds, gains and the head: {error.why}")
        return None, None
    streams = find(graph)
    assert not isinstance(streams, str)
    if not residual.proven:
        not_said.append(f"stds, gains and the head: the map is not proven ({residual.leaks[0]})")
        return None, None
    return residual, streams[0]


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


def _stored(source: Source, model: nn.Module) -> Callable[[str], Contents]:
    """Contents from the checkpoint: parts that are stored apart (an expert each) are read apart."""
    match = match_source(source, model)
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
