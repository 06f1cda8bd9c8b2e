"""What is measured: a structure without memory and where its weights come from, as it is or with a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from spikepatch.apply.generated.patched_source import build_as_it_is, check_known, check_replaced
from spikepatch.apply.generated.structure import restructure
from spikepatch.errors import Refused
from spikepatch.plans.plan import Reinit
from spikepatch.preflight.program import Weights
from spikepatch.preflight.values import cached, fresh, live, load_buffers, planned, stored
from spikepatch.recipes.plan_of import check_weights, plan
from spikepatch.source.match import match_source
from spikepatch.source.meta import build_meta, skeleton
from spikepatch.source.private import is_transformers_model

if TYPE_CHECKING:
    from spikepatch.source.open import Source

#: Elements; smaller models are drawn or read once and kept, larger ones twice.
_KEPT = 500_000_000


@dataclass(frozen=True)
class Subject:
    """``structure``: parameters on meta or real, buffers real. ``weights``: by name. ``about``: whose they are."""

    structure: nn.Module
    weights: Weights
    about: str
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
    return Subject(structure, _kept(structure, stored(structure, match)), f"of {source.name}")


def with_recipe(
    base: Subject, recipe: str, *, source: Source | None, reinit: Reinit, seed: int, options: Mapping[str, Any]
) -> Subject:
    """The same model with a recipe planned and applied; ``base`` has no patch, and is not changed.

    Raises:
        SpikepatchError: the recipe does not apply.
    """
    structure: Any = base.structure
    if source is not None:
        check_weights(source, reinit)
    if reinit == "all" and is_transformers_model(structure):  # nothing learned survives, persistent buffers included
        structure = build_meta(type(structure), structure.config, where=type(structure).__name__)
    if source is not None and reinit != "all":  # the plan reads the learned embedding
        found = plan(source.name, recipe, reinit=reinit, seed=seed, revision=source.revision, **options)
        check_replaced(source, found)
    else:
        found = plan(structure, recipe, reinit=reinit, seed=seed, **options)
    patched = skeleton(structure, keep_buffers=True)
    restructure(patched, found)
    weights = planned(patched, found, base.weights, structure)
    about = {
        "all": "fresh",
        "residual": f"{base.about}, residual projections fresh",
        "none": base.about,
    }[reinit]
    return Subject(patched, _kept(patched, weights), about, recipe)


def vocabulary_of(model: nn.Module) -> int | None:
    """Number of tokens, as the model's config has it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config  # it may be the model's own
    return getattr(text, "vocab_size", None)


def _kept(model: nn.Module, weights: Weights) -> Weights:
    return cached(weights) if sum(p.numel() for p in model.parameters()) <= _KEPT else weights
