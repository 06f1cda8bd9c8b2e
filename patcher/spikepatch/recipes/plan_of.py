"""``plan(model_or_source, recipe) -> Plan``: the one path from a loaded model or a SOURCE to a plan."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from spikepatch.errors import BadSource, Refused
from spikepatch.plans.plan import EmbeddingEdit, ModelPart, Plan, Recipe, Reinit
from spikepatch.plans.work_out import make_plan
from spikepatch.recipes import built_in
from spikepatch.recipes.request import Request, parse_request
from spikepatch.residual.example import Given
from spikepatch.residual.feature_size import feature_sizes
from spikepatch.residual.inspect import inspect
from spikepatch.residual.map import ResidualMap
from spikepatch.source.apart import stored_apart
from spikepatch.source.checkpoint import read_tensor
from spikepatch.source.layout import tensor_shapes
from spikepatch.source.match import Match, match_source
from spikepatch.source.meta import on_meta, unwrapped
from spikepatch.source.open import Source, build_meta, open_source, with_weights
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
        part: of a model of several modalities, ``all`` is all of it; ``language`` leaves towers, which compute features
            of images and sounds, as they are, and says that features may stay smaller than the tokens. By default
            towers with weights (in memory, or in the source) are left as they are, and features are made as large.
        example_inputs: as in ``spikepatch.inspect``.
        revision, trust_remote_code: of a SOURCE.

    Raises:
        SpikepatchError: the model cannot be read or mapped, or the recipe does not apply to it.
    """
    request = parse_request(
        recipe, reinit=reinit, seed=seed, factor=factor, positions=positions, replace=replace, untie=untie, part=part
    )
    if isinstance(model, str):
        source = open_source(model, revision=revision, trust_remote_code=trust_remote_code, weights=reinit != "all")
        return plan_on(map_asked(source, request, example_inputs), request)
    return plan_model(model, request, example_inputs)


def plan_model(model: nn.Module, request: Request, example_inputs: Given = None) -> Plan:
    """The plan of a loaded model."""
    model = unwrapped(model)
    return plan_on(Mapped(model, inspect(model, example_inputs=example_inputs), example=example_inputs), request)


@dataclass(frozen=True)
class Mapped:
    """A model and its map: what plans are worked out on. What else they need is read once.

    Attributes:
        model: its learned values in memory, or in the checkpoint of ``source``.
        residual: its map.
        source: where it comes from, if not from memory.
        match: its tensors in the source's checkpoint.
        example: what it was mapped with, where the caller gave it.
    """

    model: nn.Module
    residual: ResidualMap
    source: Source | None = None
    match: Match | None = None
    example: Given = None

    @functools.cached_property
    def embedding_stds(self) -> dict[str, float]:
        """std of the elements of each stream's learned token embedding, in float64, by its parameter: of the rows that
        tokens use, as far as it can be told; see ``element_std``. Rows that no id of the source's tokenizer stands for
        are not.

        Raises:
            BadSource: one in a checkpoint is not finite, so nothing can be derived from it.
        """
        residual = self.residual
        names = [each.token_embedding.parameter for each in (residual, *residual.streams) if each.token_embedding]
        if self.source is None:
            tables = {name: self.model.get_parameter(name) for name in names}
            return {name: element_std(loaded_pieces(table), table.shape) for name, table in tables.items()}
        owners = {} if self.match is None else self.match.owners
        entries = {name: owners[name] for name in names if name in owners}
        ids = known_ids(self.source) if entries else None
        stds = {name: element_std(pieces(entry), entry.shape, ids) for name, entry in entries.items()}
        for name in (name for name, std in stds.items() if not math.isfinite(std)):
            raise BadSource(
                f"{entries[name].name} holds NaN or infinite values",
                where=str(entries[name].file),
                why="the source's weights are not finite, and a learned embedding's factor is worked out from its std",
                remedy="use a sound checkpoint; --reinit all does not need it",
            )
        return stds

    @property
    def learned(self) -> bool:
        """It has weights that could be kept."""
        return not on_meta(self.model) if self.source is None else self.match is not None

    def feature_sizes(self, kept: Collection[str]) -> dict[str, float]:
        """What the matrices before entrances of features read, with fresh weights but for those that are ``kept``; see
        ``feature_size.py``.
        """
        return feature_sizes(self.model, self.example, self._learned(kept)) if self.residual.entrances else {}

    def _learned(self, kept: Collection[str]) -> Callable[[str], torch.Tensor | None]:
        """A function from a name to its learned value in float32: of what is ``kept``, None of all else."""

        def value(name: str) -> torch.Tensor | None:
            if name not in kept:
                return None
            if self.match is None:
                return self.model.get_parameter(name).detach().float().cpu()
            entry = self.match.owners.get(name)
            return None if entry is None else read_tensor(entry).float()

        return value


def map_asked(source: Source, request: Request, example_inputs: Given = None) -> Mapped:
    """``map_source``; where towers are kept that have learned weights, with the weights of ``source`` looked at."""
    mapped = map_source(source, example_inputs)
    if not mapped.residual.towers or request.part == "all" or source.checkpoint is not None or not source.has_weights:
        return mapped
    source = with_weights(source)
    assert source.checkpoint is not None
    if stored_apart(source.checkpoint):  # it is another structure then
        return map_source(source, example_inputs)
    return dataclasses.replace(mapped, source=source, match=match_source(source, mapped.model))


def map_source(source: Source, example_inputs: Given = None) -> Mapped:
    """The source's model, without weights and without a patch of ours, and its map."""
    model = build_meta(source)
    residual = inspect(model, example_inputs=example_inputs, source=source.name)
    match = None if source.checkpoint is None else match_source(source, model)
    return Mapped(model, residual, source, match, example_inputs)


def plan_on(mapped: Mapped, request: Request) -> Plan:
    """Work a request out; see ``make_plan``.

    Raises:
        SpikepatchError: weights are to be kept that are not there, or the recipe does not apply.
    """
    if mapped.source is None:
        check_learned(mapped.model, request.reinit)
    else:
        check_weights(mapped.source, request.reinit)
    fresh = request.reinit == "all"
    kept = mapped.residual.towers if mapped.learned and request.part != "all" else ()
    found = make_plan(
        mapped.residual,
        tensor_shapes(mapped.model),
        request.recipe,
        reinit=request.reinit,
        seed=request.seed,
        embedding_stds={} if fresh else mapped.embedding_stds,
        part=request.part,
        kept=kept,
        feature_sizes=mapped.feature_sizes(kept) if fresh else {},
    )
    modules = dict(mapped.model.named_modules(remove_duplicate=False))
    for edit in found.select(EmbeddingEdit):
        module = modules.get(edit.module)
        if not isinstance(module, nn.Embedding):
            raise Refused(
                what="the embedding is none that can be patched",
                where=edit.module or type(mapped.model).__name__,
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
