"""``plan(model_or_source, recipe) -> Plan``: from a loaded model or a SOURCE string to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spikepatch import recipes
from spikepatch.errors import BadSource, Refused
from spikepatch.meta import on_meta
from spikepatch.plans import REINITS, Plan, Reinit, Transform, make_plan
from spikepatch.residual.inspect import inspect

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spikepatch.source import Source


def plan(
    model: nn.Module | str,
    recipe: str = recipes.DEFAULT,
    *,
    reinit: Reinit,
    seed: int = 0,
    factor: float | None = None,
    positions: bool = False,
    untie: bool = False,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Work a recipe out for one model. Nothing is changed.

    Args:
        model: a loaded model, or a SOURCE: a hub id, a folder, or ``arch:TYPE``.
        recipe: a name that ``spikepatch recipes`` lists.
        reinit: ``all`` draws every weight afresh, ``residual`` the residual projections only, ``none`` nothing.
        seed: of all random fills, at least 0.
        factor: of the embedding, in place of sqrt(d) (fresh weights) or 1/std (kept weights).
        positions: scale learned position embeddings too.
        untie: give a tied head its own matrix.
        example_inputs: keyword arguments of ``forward``, for a module that is no transformers model.
        revision, trust_remote_code: of a SOURCE.

    Raises:
        SpikepatchError: the model cannot be read or mapped, or the recipe does not apply to it.
    """
    transforms = checked_transforms(recipe, reinit=reinit, seed=seed, factor=factor, positions=positions, untie=untie)
    std: float | None = None
    if isinstance(model, str):
        from spikepatch.apply.kept import embedding_std, match_source
        from spikepatch.source import build_meta, open_source

        source = open_source(model, revision=revision, trust_remote_code=trust_remote_code, weights=reinit != "all")
        check_weights(source, reinit)
        built = build_meta(source)
        residual = inspect(built, source=model)
        if reinit != "all":
            std = embedding_std(match_source(source, built), residual)
        return make_plan(residual, tensor_names(built), recipe, transforms, reinit=reinit, seed=seed, embedding_std=std)
    check_learned(model, reinit)
    residual = inspect(model, example_inputs=example_inputs)
    token = residual.token_embedding
    if reinit != "all" and token is not None:
        std = float(model.get_parameter(token.parameter).detach().double().std())
    return make_plan(residual, tensor_names(model), recipe, transforms, reinit=reinit, seed=seed, embedding_std=std)


def checked_transforms(
    recipe: str, *, reinit: str, seed: int, factor: float | None, positions: bool, untie: bool
) -> tuple[Transform, ...]:
    """The recipe's transforms, once all options are found to be sensible."""
    if reinit not in REINITS:
        raise Refused(
            what=f"there is no reinit mode {reinit!r}",
            where="reinit",
            why="the modes are " + ", ".join(REINITS),
            remedy="all: a fresh model to pre-train; residual or none: learned weights are kept",
        )
    if seed < 0:
        raise Refused(what="a negative seed", where=f"seed={seed}", why="seeds count from 0", remedy="give 0 or more")
    if factor is not None and not 0 < factor < float("inf"):
        raise Refused(
            what="the embedding factor must be a positive number",
            where=f"factor={factor}",
            why="the stream would vanish, flip or overflow",
            remedy="leave it out for sqrt(d)",
        )
    return recipes.transforms_of(recipe, factor=factor, positions=positions, untie=untie)


def tensor_names(model: nn.Module) -> tuple[str, ...]:
    """Every parameter and persistent buffer, tied ones once."""
    parameters = dict(model.named_parameters())
    everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return (*parameters, *(name for name in model.state_dict() if name not in everything))


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
