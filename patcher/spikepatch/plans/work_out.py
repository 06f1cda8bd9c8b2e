"""A recipe worked out on a residual map, stream by stream. Planning is pure: nothing is read or changed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from posixpath import commonpath

from spikepatch.errors import Refused
from spikepatch.plans.part_shapes import part_shapes
from spikepatch.plans.plan import (
    Context,
    Edit,
    EmbeddingEdit,
    ModelPart,
    Plan,
    Recipe,
    Reinit,
    Skip,
    StreamShape,
    Untie,
    ValueEdit,
)
from spikepatch.residual.map import ResidualMap

#: Why a tensor is left alone that ``kept`` names.
KEPT = "of a tower, kept as it is; with --part all it is as any other tensor"


def make_plan(
    residual: ResidualMap,
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    *,
    reinit: Reinit,
    seed: int,
    embedding_stds: Mapping[str, float] | None = None,
    part: ModelPart | None = None,
    kept: Collection[str] = (),
    feature_sizes: Mapping[str, float] | None = None,
) -> Plan:
    """Work ``recipe`` out on ``residual``, for each of its streams. Pure: equal arguments give an equal plan.

    Args:
        residual: a proven map.
        shapes: of every parameter and persistent buffer of the model; those that no transform fills become skips.
        recipe: its transforms are applied in order.
        reinit: which weights are drawn afresh.
        seed: at least 0.
        embedding_stds: std of each learned token embedding by its parameter, where learned weights are kept.
        part, kept, feature_sizes: as in ``Context``.

    Raises:
        Refused: a map is not proven, a transform does not fit, edits contradict each other, or nothing would change.
    """
    maps = (residual, *residual.streams)
    for each in maps:
        _check_proven(each)
    edits: dict[tuple[str, str], Edit] = {}
    skips: dict[str, Skip] = {}
    for index, each in enumerate(maps):
        token = each.token_embedding
        context = Context(
            reinit,
            embedding_std=(embedding_stds or {}).get(token.parameter) if token is not None else None,
            untied=each.head is None or not each.head.tied,
            shapes=shapes,
            stream=index,
            part=part,
            kept=frozenset(kept),
            feature_sizes=feature_sizes or {},
        )
        found, left = _leave(context.kept, *_of_stream(each, recipe, context))
        _merge(edits, found, residual.source)
        skips = {skip.target: skip for skip in left} | skips
    if not edits:
        raise Refused(
            what=f"the recipe {recipe.name} changes nothing with reinit={reinit}",
            where=residual.source,
            why="its transforms find nothing to change in this model"
            if reinit == "all"
            else "it only draws weights that are to be kept",
            remedy="use --reinit all or residual, or a recipe that changes the embedding: scaled-embed, embed-ln",
        )
    if reinit != "none" and any(isinstance(edit, ValueEdit) for edit in edits.values()):
        _check_whole(residual)
    skips |= {name: Skip(name, KEPT) for name in shapes if name in kept}
    written = {edit.parameter for edit in edits.values() if isinstance(edit, ValueEdit)}
    named = written | skips.keys()
    reason = "not a weight that this recipe draws" if reinit == "all" else "learned, kept"
    no_decay = [name for each in maps for name in _no_matrices(each, shapes)]
    if recipe.no_decay_embeddings:
        no_decay += [embedding.parameter for each in maps for embedding in each.embeddings]
    return Plan(
        recipe=recipe.name,
        source=residual.source,
        architecture=residual.architecture,
        model_type=residual.model_type,
        streams=tuple(_stream(each) for each in maps),
        reinit=reinit,
        seed=seed,
        edits=tuple(edits.values()),
        skips=(*skips.values(), *(Skip(name, reason) for name in shapes if name not in named)),
        no_decay=tuple(dict.fromkeys(no_decay)),
        kept=tuple(name for name in shapes if name in kept) if reinit == "all" else (),
        parts=tuple(part_shapes(residual, shapes, reinit, written, kept)),
    )


def _leave(kept: Collection[str], edits: list[Edit], skips: list[Skip]) -> tuple[list[Edit], list[Skip]]:
    """Without edits of what is kept."""

    def touches(edit: Edit) -> bool:
        name = edit.parameter if isinstance(edit, ValueEdit) else ""
        return (f"{edit.module}.weight" if isinstance(edit, EmbeddingEdit) else name) in kept

    return [edit for edit in edits if not touches(edit)], skips


def _check_proven(residual: ResidualMap) -> None:
    if not residual.proven:
        raise Refused(
            what="the residual map is not proven, so nothing is changed",
            where=residual.source,
            why="; ".join(residual.leaks[:5]) + (f"; and {len(residual.leaks) - 5} more" if residual.leaks[5:] else ""),
            remedy="run `spikepatch inspect` for the whole list; a model whose sum cannot be followed is left alone",
        )


def _check_whole(residual: ResidualMap) -> None:
    """Weights are drawn only where no part of the blocks has been left out of the map."""
    if residual.conditions:
        raise Refused(
            what="the residual map holds for inputs like the traced ones only, so no weights are drawn by it",
            where=residual.source,
            why="; ".join(residual.conditions[:3]),
            remedy="give all that its forward takes: --example-inputs module:NAME (in Python: a dict of tensors as"
            " example_inputs); or keep its weights: --reinit none. What nothing reads can be left out of the model",
        )


def _of_stream(residual: ResidualMap, recipe: Recipe, context: Context) -> tuple[list[Edit], list[Skip]]:
    edits: list[Edit] = []
    skips: list[Skip] = []
    for transform in recipe.transforms:
        for item in transform(residual, context):
            if isinstance(item, Skip):
                skips.append(item)
            elif isinstance(item, ValueEdit):
                edits.append(dataclasses.replace(item, stream=context.stream))
            else:
                edits.append(item)
            if isinstance(item, Untie):
                shapes = {**context.shapes, item.head: context.shapes[item.embedding]}
                context = dataclasses.replace(context, untied=True, shapes=shapes)
    counts = Counter(edit.target for edit in edits)
    twice = [f"{name} ({kind})" for (kind, name), count in counts.items() if count > 1]
    if twice:
        raise Refused(
            what="two transforms of the recipe edit the same tensor",
            where=residual.source,
            why=", ".join(twice[:5]),
            remedy="keep one of them",
        )
    return edits, skips


def _merge(edits: dict[tuple[str, str], Edit], found: list[Edit], source: str) -> None:
    """Add a further stream's edits; of what it shares with an earlier one (a table, say) both must want the same."""
    for edit in found:
        first = edits.setdefault(edit.target, edit)
        if _anywhere(first) != _anywhere(edit):
            raise Refused(
                what="two residual streams share a tensor, and the recipe would treat it differently in each",
                where=source,
                why=f"{first} for one, {edit} for the other",
                remedy="use a recipe that does not depend on what the streams differ in (width, number of sub-layers)",
            )


def _anywhere(edit: Edit) -> Edit:
    return dataclasses.replace(edit, stream=0) if isinstance(edit, ValueEdit) else edit


def _no_matrices(residual: ResidualMap, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Parameters with two dimensions that are inside a sub-layer's module, and that nothing is multiplied with as a
    matrix: biases of experts, relative positions, what a state-space model decays by.
    """
    owners: dict[int, list[str]] = {}
    for matrix in residual.matrices:
        owners.setdefault(matrix.sublayer, []).append(matrix.parameter.rpartition(".")[0].replace(".", "/"))
    modules = {commonpath(paths).replace("/", ".") for paths in owners.values()}
    prefixes = tuple(f"{module}." for module in modules if module)
    matrices = {matrix.parameter for matrix in residual.matrices}
    for name, shape in shapes.items():
        if len(shape) == 2 and name.startswith(prefixes) and name not in matrices:
            yield name


def _stream(residual: ResidualMap) -> StreamShape:
    first = {p.sublayer: p.parameter for p in reversed(residual.residual_projections)}
    sublayers = tuple(first.values())[::-1]
    axis = next(matrix.out_axis for matrix in residual.matrices if matrix.parameter == sublayers[0])
    return StreamShape(residual.width, sublayers, axis)
