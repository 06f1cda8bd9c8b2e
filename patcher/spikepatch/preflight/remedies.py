"""Remedies that were tried: a command, or a call, is printed only once its plan has been made for this very model."""

from __future__ import annotations

import contextlib
import shlex
from typing import TYPE_CHECKING

from torch import nn

from spikepatch.apply.folder.routes import choose
from spikepatch.apply.generated.patched_source import check_known, check_replaced
from spikepatch.apply.generated.structure import restructure
from spikepatch.errors import SpikepatchError
from spikepatch.plans.plan import Recipe
from spikepatch.plans.work_out import make_plan
from spikepatch.recipes.built_in import checked_recipe
from spikepatch.residual.inspect import inspect
from spikepatch.residual.map import ResidualMap
from spikepatch.source.layout import tensor_shapes
from spikepatch.source.meta import settings_read
from spikepatch.source.open import Source, build_meta
from spikepatch.source.private import is_transformers_model
from spikepatch_transforms.untie import UntieHead

if TYPE_CHECKING:
    from spikepatch.plans.plan import Plan

#: In this order: the recipe, and whether a factor of the architecture's own is to be taken out first.
_TRIED = (("scaled-embed", False), ("scaled-embed", True), ("embed-ln", False), ("vanilla", False))


def of_a_source(source: Source) -> str:
    """``spikepatch convert SOURCE OUT --recipe R``, R the first recipe that can be planned and stored; else empty."""
    with contextlib.suppress(SpikepatchError), settings_read() as read:
        check_known(source)
        model = build_meta(source)
        residual = inspect(model, source=source.name)
        for recipe, replace in _TRIED:
            with contextlib.suppress(SpikepatchError):
                plan = _plan(residual, model, recipe, replace)
                check_replaced(source, plan)
                patched = build_meta(source)
                restructure(patched, plan)
                choose(source, plan, patched, "auto", read=read)
                name = shlex.quote(source.name)
                options = f" --revision {shlex.quote(source.revision)}" if source.revision else ""
                options += " --trust-remote-code" if source.needs_code else ""
                return f"spikepatch convert {name} OUT --recipe {recipe}{' --replace' if replace else ''}{options}"
    return ""


def of_a_model(model: nn.Module, residual: ResidualMap) -> str:
    """``spikepatch.patch(model, R, reinit="all")``, with the first recipe that can be planned; else empty."""
    for recipe, replace in _TRIED:
        with contextlib.suppress(SpikepatchError):
            _plan(residual, model, recipe, replace)
            options = ", replace=True" if replace else ""
            options += "" if is_transformers_model(model) else ", example_inputs=example_inputs"
            return f'spikepatch.patch(model, "{recipe}", reinit="all"{options})'
    return ""


def of_a_tied_head(recipe: str, source: Source | None, model: nn.Module, residual: ResidualMap) -> str:
    """The same comparison with ``--untie``, where the head can be given a matrix of its own; else empty."""
    with contextlib.suppress(SpikepatchError):
        untied = Recipe("untie", (UntieHead(),))
        make_plan(residual, tensor_shapes(model), untied, reinit="all", seed=0, embedding_stds={})
        if source is not None:
            return f"spikepatch check {shlex.quote(source.name)} --recipe {shlex.quote(recipe)} --untie"
        return f'spikepatch.check(model, recipes=["{recipe}"], untie=True)'
    return ""


def _plan(residual: ResidualMap, model: nn.Module, recipe: str, replace: bool) -> Plan:
    chosen = checked_recipe(recipe, reinit="all", seed=0, factor=None, positions=False, replace=replace, untie=False)
    return make_plan(residual, tensor_shapes(model), chosen, reinit="all", seed=0, embedding_stds={})
