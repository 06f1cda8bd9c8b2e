"""What the user should know of a conversion, one sentence each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from spikepatch.plans.plan import recorded_edit
from spikepatch.source.apart import stored_apart
from spikepatch.source.formats import some

if TYPE_CHECKING:
    from spikepatch.apply.disk.pipeline import Tally
    from spikepatch.apply.folder.routes import Route
    from spikepatch.plans.plan import Plan
    from spikepatch.source.match import Match
    from spikepatch.source.open import Source


def whose_weights(source: Source, plan: Plan) -> Iterator[str]:
    """Whose weights the output has; and of a patched source, what becomes of its patch."""
    if plan.reinit == "none":
        yield f"learned weights of {source.name}"
    elif plan.reinit == "residual":
        yield f"learned weights of {source.name}, residual projections drawn afresh: the learned function is lost"
    elif plan.kept:
        yield (
            f"learned weights of {source.name} in its towers, which compute features of images and sounds; fresh"
            " weights in all else: --part all draws all, --reinit none keeps all"
        )
    elif source.has_weights:
        yield unused(source.name)
    else:
        yield "fresh weights: a model to pre-train"
    if source.patched is not None and source.patched.embeddings:
        edits = (recorded_edit(name, entry, plan.width) for name, entry in source.patched.embeddings.items())
        old = ", ".join([source.patched.recipe, *(f"{edit.module}: {edit.words}" for edit in edits)])
        note = f"{source.name} is patched already ({old}): the new plan takes the old one's place"
        yield note + (", and the learned weights were trained with the old one" if plan.reinit != "all" else "")
    if apart := sorted(stored_apart(source.checkpoint)):
        yield f"the config ties {', '.join(apart)}, the checkpoint does not: kept apart, as transformers loads them"


def unused(source: str) -> str:
    """Learned weights of ``source`` are there, and none of them goes into the output."""
    return f"fresh weights: the learned weights of {source} are NOT used; --reinit none keeps them"


def how_it_loads(plan: Plan, route: Route, *, trust: bool) -> str:
    """What loading the folder takes, and what ``from_config`` makes of its config."""
    loads = "loads with trust_remote_code=True" if trust else f"loads as the plain {route.model_class.__name__}"
    if route.kind == "code" and plan.reinit == "all":
        fresh = "from_config draws the recipe's stds"
    elif route.kind == "plain":
        fresh = "from_config would restore the architecture's own initialisation"
    else:
        fresh = "from_config has the factor or norm, and the architecture's own initialisation"
    return f"storage {route.kind}: {route.why}; {loads}; {fresh}"


def others(
    settings: Mapping[str, Any], match: Match | None, expected_loss: float | None, log_vocab: float | None
) -> Iterator[str]:
    """A tied head's initial loss, config values against rescaling on load, and tensors that are left out."""
    if expected_loss is not None and log_vocab is not None and expected_loss > 1.1 * log_vocab:
        yield (
            f"expected initial loss about {expected_loss:.1f}, against log V = {log_vocab:.1f}: the head is tied, so a"
            " large shortcut makes it predict the current token; --untie gives it its own matrix"
        )
    for name, value in settings.items():
        yield f"config.json sets {name} to {json.dumps(value)}: else transformers rescales the weights when it loads"
    if match is not None and match.unused:
        names = ", ".join(match.unused[:3]) + (" ..." if match.unused[3:] else "")
        yield f"{len(match.unused)} tensors of the source are not part of the architecture and left out: {names}"


def unsound_values(tallies: Mapping[str, Tally], dtype: str) -> Iterator[str]:
    """Learned values that the cast to ``dtype`` made 0, and those that are not finite; after writing."""
    if lost := [f"{name!r} ({tally.underflow})" for name, tally in tallies.items() if tally.underflow]:
        yield f"values that became 0 in {dtype}, too small for it: {some(lost)}"
    if nonfinite := [f"{name!r} ({tally.nonfinite})" for name, tally in tallies.items() if tally.nonfinite]:
        yield f"NaN or infinite values, as in the source: {some(nonfinite)}"


def load_test(outcome: str, *, asked: bool) -> Iterator[str]:
    """Of a test that was not made as it was not ``asked`` for, or not whole."""
    if not asked:
        yield "not tried whether it loads: the load test was left out"
    elif outcome not in ("passed", "left out"):
        yield f"load test: {outcome}, since the model is too large to be run on this machine"
