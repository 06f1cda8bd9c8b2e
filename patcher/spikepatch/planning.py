"""``plan(model_or_source, recipe) -> Plan``: from a loaded model or a SOURCE string to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spikepatch import recipes
from spikepatch.errors import BadSource, Refused, did_you_mean
from spikepatch.meta import check_module, on_meta
from spikepatch.planner import make_plan
from spikepatch.plans import REINITS, Plan, Recipe, Reinit
from spikepatch.residual.inspect import inspect

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spikepatch.source import Source


def plan(
    model: nn.Module | str,
    recipe: str | Recipe = recipes.DEFAULT,
    *,
    reinit: Reinit,
    seed: int = 0,
    factor: float | None = None,
    positions: bool = False,
    replace: bool = False,
    untie: bool = False,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
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
        example_inputs: keyword arguments of ``forward``, for a module that is no transformers model.
        revision, trust_remote_code: of a SOURCE.

    Raises:
        SpikepatchError: the model cannot be read or mapped, or the recipe does not apply to it.
    """
    recipe = checked_recipe(
        recipe, reinit=reinit, seed=seed, factor=factor, positions=positions, replace=replace, untie=untie
    )
    stds: dict[str, float] = {}
    if isinstance(model, str):
        from spikepatch.apply.kept import embedding_stds, match_source
        from spikepatch.source import build_meta, open_source

        source = open_source(model, revision=revision, trust_remote_code=trust_remote_code, weights=reinit != "all")
        check_weights(source, reinit)
        built = build_meta(source)
        residual = inspect(built, source=model)
        if reinit != "all":
            stds = embedding_stds(match_source(source, built), residual)
        return make_plan(residual, tensor_shapes(built), recipe, reinit=reinit, seed=seed, embedding_stds=stds)
    check_module(model)
    check_learned(model, reinit)
    residual = inspect(model, example_inputs=example_inputs)
    if reinit != "all":
        from spikepatch.apply.kept import element_std
        from spikepatch.storage.pieces import loaded_pieces

        names = [each.token_embedding.parameter for each in (residual, *residual.streams) if each.token_embedding]
        tables = {name: model.get_parameter(name) for name in names}
        stds = {name: element_std(loaded_pieces(table), table.numel()) for name, table in tables.items()}
    return make_plan(residual, tensor_shapes(model), recipe, reinit=reinit, seed=seed, embedding_stds=stds)


def checked_recipe(
    recipe: str | Recipe,
    *,
    reinit: str,
    seed: int,
    factor: float | None,
    positions: bool,
    replace: bool,
    untie: bool,
) -> Recipe:
    """The recipe with the options in its transforms, once all are found to be sensible.

    Raises:
        Refused: they are not, or there is no such recipe.
    """
    if reinit not in REINITS:
        raise Refused(
            what=f"there is no reinit mode {reinit!r}",
            where="reinit",
            why="the modes are " + ", ".join(REINITS),
            remedy=did_you_mean(
                reinit, REINITS, "all: a fresh model to pre-train; residual or none: learned weights are kept"
            ),
        )
    if seed < 0:
        raise Refused(what="a negative seed", where=f"seed={seed}", why="seeds count from 0", remedy="give 0 or more")
    return recipes.with_options(recipes.find(recipe), factor=factor, positions=positions, replace=replace, untie=untie)


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter and persistent buffer, tied ones once, by its first name."""
    everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors = dict(model.named_parameters())
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if name not in everything}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


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
