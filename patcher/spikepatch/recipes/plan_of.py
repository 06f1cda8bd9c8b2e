"""``plan(model_or_source, recipe) -> Plan``: from a loaded model or a SOURCE string to a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn

from spikepatch.errors import BadSource, Refused
from spikepatch.plans.plan import Part, Plan, Recipe, Reinit
from spikepatch.plans.work_out import make_plan
from spikepatch.recipes import built_in
from spikepatch.residual.example import Given
from spikepatch.residual.feature_size import feature_sizes
from spikepatch.residual.inspect import inspect
from spikepatch.residual.map import ResidualMap
from spikepatch.source.layout import tensor_shapes
from spikepatch.source.match import Match, match_source
from spikepatch.source.meta import check_module, on_meta
from spikepatch.source.open import Source, build_meta, open_source
from spikepatch.source.pieces import loaded_pieces, pieces


def plan(
    model: nn.Module | str,
    recipe: str | Recipe = built_in.DEFAULT,
    *,
    reinit: Reinit,
    seed: int = 0,
    factor: float | None = None,
    positions: bool = False,
    replace: bool = False,
    untie: bool = False,
    part: Part | None = None,
    example_inputs: Given = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Work a recipe out for one model. Nothing is changed.

    Args:
        model: a loaded model, or a SOURCE: a hub id, a folder, or ``arch:TYPE``.
        recipe: a name that ``spikepatch recipes`` lists, a TOML file, ``module:NAME``, or a ``Recipe``.
        reinit: ``all`` draws every weight afresh, ``residual`` the residual projections only, ``none`` nothing.
        seed: of all random fills, at least 0.
        factor: of the embedding, in place of sqrt(d) (fresh weights) or 1/std (kept weights).
        positions: scale learned position embeddings too.
        replace: divide out a factor that the architecture applies to its embedding already.
        untie: give a tied head its own matrix.
        part: ``language`` leaves what computes features of images and sounds as it is.
        example_inputs: as in ``spikepatch.inspect``.
        revision, trust_remote_code: of a SOURCE.

    Raises:
        SpikepatchError: the model cannot be read or mapped, or the recipe does not apply to it.
    """
    recipe = built_in.checked_recipe(
        recipe, reinit=reinit, seed=seed, factor=factor, positions=positions, replace=replace, untie=untie
    )
    stds: dict[str, float] = {}
    if isinstance(model, str):
        source = open_source(model, revision=revision, trust_remote_code=trust_remote_code, weights=reinit != "all")
        check_weights(source, reinit)
        built = build_meta(source)
        residual = inspect(built, example_inputs=example_inputs, source=model)
        if reinit != "all":
            stds = embedding_stds(match_source(source, built), residual)
        return plan_on(built, residual, recipe, reinit=reinit, seed=seed, stds=stds, part=part, example=example_inputs)
    check_module(model)
    check_learned(model, reinit)
    residual = inspect(model, example_inputs=example_inputs)
    if reinit != "all":
        names = [each.token_embedding.parameter for each in (residual, *residual.streams) if each.token_embedding]
        tables = {name: model.get_parameter(name) for name in names}
        stds = {name: element_std(loaded_pieces(table), table.numel()) for name, table in tables.items()}
    return plan_on(model, residual, recipe, reinit=reinit, seed=seed, stds=stds, part=part, example=example_inputs)


def plan_on(
    model: nn.Module,
    residual: ResidualMap,
    recipe: Recipe,
    *,
    reinit: Reinit,
    seed: int,
    stds: Mapping[str, float],
    part: Part | None,
    example: Given,
) -> Plan:
    """``make_plan``, with what it must know of the model beside its map."""
    sizes = feature_sizes(model, example) if residual.entrances and reinit == "all" and part is None else {}
    return make_plan(
        residual,
        tensor_shapes(model),
        recipe,
        reinit=reinit,
        seed=seed,
        embedding_stds=stds,
        part=part,
        feature_sizes=sizes,
    )


def check_learned(model: nn.Module, reinit: Reinit) -> None:
    """Refuse to keep the weights of a model that is structure only."""
    if reinit != "all" and on_meta(model):
        raise Refused(
            what=f"reinit={reinit} on a model without weights",
            where=type(model).__name__,
            why="its parameters are on the meta device: there is nothing learned to keep",
            remedy='use reinit="all", or load the weights first',
        )


def check_weights(source: Source, reinit: Reinit) -> None:
    """Refuse to keep weights that are not there."""
    if reinit != "all" and source.checkpoint is None:
        raise BadSource(
            "there are no learned weights to keep",
            where=source.name,
            why="it is an architecture without weights" if source.kind == "arch" else "the folder holds no safetensors",
            remedy="use --reinit all for a fresh model, or a source with weights",
        )


def embedding_stds(match: Match, residual: ResidualMap) -> dict[str, float]:
    """std of all elements of each stream's learned token embedding, in float64, by its parameter.

    Raises:
        BadSource: one is not finite, so nothing can be derived from it.
    """
    tokens = [each.token_embedding for each in (residual, *residual.streams)]
    entries = {token.parameter: match.owners.get(token.parameter) for token in tokens if token is not None}
    stds = {name: element_std(pieces(entry), entry.elements) for name, entry in entries.items() if entry is not None}
    for name, std in stds.items():
        if not math.isfinite(std):
            entry = match.owners[name]
            raise BadSource(
                f"{entry.name} holds NaN or infinite values",
                where=str(entry.file),
                why="the source's weights are not finite, and a learned embedding's factor is worked out from its std",
                remedy="use a sound checkpoint; --reinit all does not need it",
            )
    return stds


@np.errstate(invalid="ignore")
def element_std(values: Iterable[torch.Tensor], count: int) -> float:
    """std of ``count`` elements, given as ``pieces`` or ``loaded_pieces``, which have the same bits.

    In float64, by numpy: sums of torch depend on the number of threads. NaN for fewer than two elements, and where one
    is not finite.
    """
    if count < 2:
        return math.nan
    patterns = np.zeros(1 << 16, np.int64)
    total, squares, middle, short = 0.0, 0.0, None, None
    for piece in values:
        if piece.dtype.itemsize == 2:  # there are few values, so each is counted
            short = piece.dtype
            patterns += np.bincount(piece.view(torch.uint16).numpy(), minlength=1 << 16)
            continue
        wide = piece.numpy().astype(np.float64)
        middle = wide.mean() if middle is None else middle  # so that little cancels
        wide -= middle
        total, squares = total + float(wide.sum()), squares + float(np.square(wide, out=wide).sum())
    if short is not None:
        used = np.flatnonzero(patterns)
        found = torch.from_numpy(used.astype(np.uint16)).view(short).double().numpy()
        weights = patterns[used]
        mean = (weights * found).sum() / count
        return float(np.sqrt((weights * (found - mean) ** 2).sum() / (count - 1)))
    return math.sqrt(max(squares - total**2 / count, 0.0) / (count - 1)) if math.isfinite(squares) else math.nan
