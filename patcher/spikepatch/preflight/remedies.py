"""Remedies that were tried: a command, or a call, is printed only once its plan has been made for this very model."""

from __future__ import annotations

import contextlib

from spikepatch.apply.disk.manifest import command_line
from spikepatch.apply.generated.structure import restructure
from spikepatch.errors import SpikepatchError
from spikepatch.plans.plan import Recipe
from spikepatch.recipes.plan_of import Mapped, plan_on
from spikepatch.recipes.request import Request, parse_request
from spikepatch.source.open import Source, build_meta
from spikepatch.source.private import is_transformers_model
from spikepatch_transforms.untie import UntieHead

#: In this order: the recipe, and whether a factor of the architecture's own is to be taken out first.
_TRIED = (("scaled-embed", False), ("scaled-embed", True), ("embed-ln", False), ("vanilla", False))


def of_a_source(mapped: Mapped, source: Source, *, untie: bool) -> str:
    """``spikepatch convert SOURCE OUT --recipe R``, R the first recipe that can be planned and built; else empty.

    Args:
        mapped: the source's structure without weights.
        untie: with a head of its own, as was asked for; left out where the head has its own matrix.
    """
    untie &= bool(mapped.residual.head and mapped.residual.head.tied)
    for recipe, replace in _TRIED:
        with contextlib.suppress(SpikepatchError):
            plan = plan_on(mapped, parse_request(recipe, reinit="all", replace=replace, untie=untie))
            restructure(build_meta(source), plan)  # what can be built can be stored: as code, if by nothing else
            return command_line(
                ("convert", source.name, "OUT"),
                recipe=recipe,
                replace=replace,
                untie=untie,
                revision=source.revision,
                trust_remote_code=source.needs_code,
            )
    return ""


def of_a_model(mapped: Mapped, *, untie: bool) -> str:
    """``spikepatch.patch(model, R, reinit="all")``, with the first recipe that can be planned; else empty."""
    untie &= bool(mapped.residual.head and mapped.residual.head.tied)
    for recipe, replace in _TRIED:
        with contextlib.suppress(SpikepatchError):
            plan_on(mapped, parse_request(recipe, reinit="all", replace=replace, untie=untie))
            options = (", replace=True" if replace else "") + (", untie=True" if untie else "")
            options += "" if is_transformers_model(mapped.model) else ", example_inputs=example_inputs"
            return f'spikepatch.patch(model, "{recipe}", reinit="all"{options})'
    return ""


def of_a_tied_head(mapped: Mapped, request: Request) -> str:
    """The same comparison with ``--untie``, where the head can be given a matrix of its own; else empty.

    Args:
        mapped: what was made of the model as ``request`` asks.
    """
    with contextlib.suppress(SpikepatchError):
        plan_on(mapped, parse_request(Recipe("untie", (UntieHead(),)), reinit="all"))
        options = {**request.options, "untie": True}
        if (source := mapped.source) is None:
            given = "".join(f", {name}={value!r}" for name, value in options.items())
            return f'spikepatch.check(model, recipes=["{request.given}"]{given})'
        options |= {"revision": source.revision, "trust_remote_code": source.needs_code}
        return command_line(("check", source.name), recipe=request.given, **options)
    return ""
