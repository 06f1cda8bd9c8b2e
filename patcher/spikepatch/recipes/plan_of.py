"""``plan(model_or_source, recipe) -> Plan``: from a loaded model or a SOURCE string to a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from spikepatch.errors import BadSource, Refused
from spikepatch.plans.plan import EmbeddingEdit, ModelPart, Plan, Recipe, Reinit
from spikepatch.plans.work_out import make_plan
from spikepatch.recipes import built_in
from spikepatch.residual.example import Given
from spikepatch.residual.feature_size import feature_sizes
from spikepatch.residual.inspect import inspect
from spikepatch.residual.map import ResidualMap
from spikepatch.source.layout import tensor_shapes
from spikepatch.source.match import Match, match_source
from spikepatch.source.meta import on_meta, unwrapped
from spikepatch.source.open import Source, build_meta, open_source
from spikepatch.source.pieces import loaded_pieces, pieces
from spikepatch.source.tokenizer import known_ids


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
    part: ModelPart | None = None,
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
            stds = embedding_stds(source, match_source(source, built), residual)
        return plan_on(built, residual, recipe, reinit=reinit, seed=seed, stds=stds, part=part, example=example_inputs)
    model = unwrapped(model)
    check_learned(model, reinit)
    residual = inspect(model, example_inputs=example_inputs)
    if reinit != "all":
        names = [each.token_embedding.parameter for each in (residual, *residual.streams) if each.token_embedding]
        tables = {name: model.get_parameter(name) for name in names}
        stds = {name: element_std(loaded_pieces(table), table.shape) for name, table in tables.items()}
    return plan_on(model, residual, recipe, reinit=reinit, seed=seed, stds=stds, part=part, example=example_inputs)


def plan_on(
    model: nn.Module,
    residual: ResidualMap,
    recipe: Recipe,
    *,
    reinit: Reinit,
    seed: int,
    stds: Mapping[str, float],
    part: ModelPart | None,
    example: Given,
) -> Plan:
    """``make_plan``, with what it must know of the model beside its map."""
    sizes = feature_sizes(model, example) if residual.entrances and reinit == "all" and part is None else {}
    found = make_plan(
        residual,
        tensor_shapes(model),
        recipe,
        reinit=reinit,
        seed=seed,
        embedding_stds=stds,
        part=part,
        feature_sizes=sizes,
    )
    modules = dict(model.named_modules(remove_duplicate=False))
    for edit in found.select(EmbeddingEdit):
        module = modules.get(edit.module)
        if not isinstance(module, nn.Embedding):
            raise Refused(
                what="the embedding is none that can be patched",
                where=edit.module or type(model).__name__,
                why=f"it is a {type(module).__name__}, and a patch changes what an nn.Embedding returns",
                remedy="use the recipe unit-embed, which draws the embedding large itself; or make it an nn.Embedding",
            )
    return found


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


def embedding_stds(source: Source, match: Match, residual: ResidualMap) -> dict[str, float]:
    """std of the elements of each stream's learned token embedding, in float64, by its parameter: of the rows that
    tokens use, as far as it can be told; see ``element_std``. Rows that no id of the source's tokenizer stands for are
    not.

    Raises:
        BadSource: one is not finite, so nothing can be derived from it.
    """
    tokens = [each.token_embedding for each in (residual, *residual.streams)]
    entries = {token.parameter: match.owners.get(token.parameter) for token in tokens if token is not None}
    ids = known_ids(source)
    stds = {name: element_std(pieces(entry), entry.shape, ids) for name, entry in entries.items() if entry is not None}
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


#: A row whose RMS is below this share of the usual row's has not been learned: padding of the vocabulary, decayed.
_UNUSED = 0.01


@np.errstate(invalid="ignore")
def element_std(values: Iterable[torch.Tensor], shape: Sequence[int], ids: Iterable[int] | None = None) -> float:
    """std of the elements of a table, given as ``pieces`` or ``loaded_pieces``, which have the same bits.

    Rows that no token uses are left out: those that are 0 or nearly so beside the others (an RMS below 0.01 of the
    median row's), and with ``ids`` those of other ids. In float64, by numpy: sums of torch depend on the number of
    threads. NaN for fewer than two elements, and where one is not finite.

    Args:
        shape: (rows, width); what has one dimension is one row.
    """
    rows, width = shape if len(shape) == 2 else (1, math.prod(shape))
    if rows * width < 2:
        return math.nan
    raw, total, squares = np.zeros(rows), np.zeros(rows), np.zeros(rows)
    done, middle = 0, None
    for piece in values:
        wide = piece.double().numpy()
        middle = wide.mean() if middle is None else middle  # so that little cancels
        starts = np.concatenate(([0], np.arange(-done % width or width, len(wide), width)))
        touched = slice(done // width, done // width + len(starts))
        raw[touched] += np.add.reduceat(wide**2, starts)
        wide = wide - middle
        total[touched] += np.add.reduceat(wide, starts)
        squares[touched] += np.add.reduceat(wide**2, starts)
        done += len(wide)
    if not np.isfinite(raw).all():
        return math.nan
    used = raw > 0
    used &= raw >= _UNUSED**2 * (np.median(raw[used]) if used.any() else 0)
    if ids is not None:
        named = np.zeros(rows, bool)
        named[[i for i in ids if i < rows]] = True
        used &= named
    if not used.any():
        used[:] = True
    count = int(used.sum()) * width
    variance = squares[used].sum() - total[used].sum() ** 2 / count
    return math.sqrt(max(float(variance), 0.0) / (count - 1))
