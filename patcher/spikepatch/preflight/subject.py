"""What is measured: a structure without memory and where its weights come from, as it is or with a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from spikepatch.apply.generated.patched_source import build_as_it_is, check_known, check_replaced
from spikepatch.apply.generated.structure import restructure
from spikepatch.errors import Refused
from spikepatch.plans.plan import Reinit
from spikepatch.preflight.program import Weights
from spikepatch.preflight.values import cached, fresh, live, load_buffers, planned, stored
from spikepatch.recipes.plan_of import Mapped, plan_on
from spikepatch.recipes.request import Request
from spikepatch.residual.example import Given
from spikepatch.residual.inspect import Followed, followed, inspect
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.ops import shape
from spikepatch.residual.trace import Trace, trace
from spikepatch.source.layout import persistent
from spikepatch.source.match import Match, match_source
from spikepatch.source.meta import build_meta, skeleton
from spikepatch.source.private import is_transformers_model

if TYPE_CHECKING:
    from spikepatch.source.open import Source

#: Elements; smaller models are drawn or read once and kept, larger ones twice.
_KEPT = 500_000_000


@dataclass(frozen=True)
class Subject:
    """``structure``: parameters on meta or real, buffers real. ``weights``: by name. ``about``: whose they are.
    ``match``: where in a checkpoint they are. ``request``: what was made of it, and ``recipe``: as shown.
    """

    structure: nn.Module
    weights: Weights
    about: str
    match: Match | None = None
    request: Request | None = None
    recipe: str | None = None


def of_model(model: nn.Module, seed: int) -> Subject:
    """A live model as it is; one on the meta device as its own initialiser makes it.

    Raises:
        Refused: some of its weights are not in memory.
    """
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing and len(missing) < len(list(model.parameters())):
        raise Refused(
            what="some weights are not in memory",
            where=type(model).__name__,
            why=f"{len(missing)} parameters are on the meta device, such as {missing[0]}",
            remedy="load the whole model, or check the folder that it came from: that needs little memory",
        )
    if missing:
        return Subject(model, _kept(model, fresh(model, seed)), "by the architecture's own initialiser")
    return Subject(model, live(model), "of the model in memory")


def of_source(source: Source, seed: int, *, patched: bool = True) -> Subject:
    """The checkpoint's weights; where it has none, those of the architecture's own initialiser.

    Args:
        patched: a source that is patched is measured with its patch, or else without it.

    Raises:
        BadSource: the checkpoint does not fit the model, or the patch is not one of ours.
        Refused: it is patched and has no weights.
    """
    check_known(source)
    if patched and source.patched is not None and source.checkpoint is None:
        raise Refused(
            what="it is patched, and has no weights",
            where=source.name,
            why="its config records a patch, which is made together with the weights",
            remedy="check what it was made from, with --recipe",
        )
    structure = build_as_it_is(source) if patched else build_meta(source.model_class, source.config, where=source.name)
    if source.checkpoint is None:
        return of_model(structure, seed)
    match = match_source(source, structure)
    source.fetch_weights()
    load_buffers(structure, match)
    return Subject(structure, _kept(structure, stored(structure, match)), f"stored in {source.name}", match=match)


def proven(subject: Subject, inputs: Given, name: str) -> Followed:
    """The streams of a model and their map, for what it is measured on.

    Raises:
        Refused: the map is not proven.
    """
    found = followed(subject.structure, trace(subject.structure, inputs), name)
    if not found.residual.proven:
        raise Refused(
            what="its residual stream is not proven, so what would be measured is not known",
            where=name,
            why="; ".join(found.residual.leaks[:3]),
            remedy="`spikepatch inspect` shows the map; please report the architecture",
        )
    return found


def to_plan_on(
    base: Subject, found: Followed | None, source: Source | None, *, reinit: Reinit, example: Given
) -> Mapped:
    """What recipes are planned on: ``base``, and where nothing is kept, with all buffers as the constructor makes them.

    Args:
        base: without a patch.
        found: its map, where there is one already; it is not made again but for another structure.
    """
    model: Any = base.structure
    as_built = source is not None and (base.match is None or not persistent(model, dict(model.named_buffers())))
    if reinit == "all" and not as_built and is_transformers_model(model):
        found, model = None, build_meta(type(model), model.config, where=type(model).__name__)
    name = source.name if source is not None else type(model).__name__
    residual = found.residual if found is not None else inspect(model, example_inputs=example, source=name)
    return Mapped(model, residual, source, base.match, example)


def with_recipe(base: Subject, mapped: Mapped, request: Request) -> Subject:
    """The same model with a recipe planned and applied; ``base`` is not changed.

    Args:
        mapped: see ``to_plan_on``.

    Raises:
        SpikepatchError: the recipe does not apply.
    """
    found = plan_on(mapped, request)
    if mapped.source is not None:
        check_replaced(mapped.source, found)
    patched = skeleton(mapped.model, keep_buffers=True)
    restructure(patched, found)
    weights = planned(patched, found, base.weights, mapped.model)
    about = {
        "all": "fresh, towers kept" if found.kept else "fresh",
        "residual": f"{base.about}, residual projections fresh",
        "none": base.about,
    }[request.reinit]
    return Subject(patched, _kept(patched, weights), about, request=request)


def vocabulary_of(model: nn.Module) -> int | None:
    """Number of tokens, as the model's config has it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config  # it may be the model's own
    return getattr(text, "vocab_size", None)


def logits_over(model: nn.Module, residual: ResidualMap, graph: Trace) -> int | None:
    """Length of the output's last axis, where that is a vocabulary: the config's, or else the rows of the table. A
    model that gives its loss alone, or the logits of the last token, has none.
    """
    length, vocabulary = (shape(graph.output) or (0,))[-1], vocabulary_of(model)
    if vocabulary is None:
        tables = [model.get_parameter(e.parameter) for e in residual.embeddings if e.kind == "token"]
        vocabulary = next((len(table) for table in tables if len(table) == length), None)
    ids = [x for x in graph.inputs.values() if not x.is_floating_point()][-1:]
    each = any(x.numel() == math.prod(shape(graph.output)[:-1]) for x in ids)  # not of the last token alone
    return length if each and residual.head is not None and vocabulary is not None and length >= vocabulary else None


def _kept(model: nn.Module, weights: Weights) -> Weights:
    return cached(weights) if sum(p.numel() for p in model.parameters()) <= _KEPT else weights
