"""Images and sounds: features that enter the stream beside the tokens are to be as large as the tokens' embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, Edit, Fill, Skip
from spikepatch.residual.map import ResidualMap


def enlarge_entrances(residual: ResidualMap, context: Context, *, drawn: bool = True) -> Iterator[Edit | Skip]:
    """A ``Fill`` for each entrance of features, or the reason why it is left as it is; for transforms that make the
    embedding large.

    With fresh weights, W ~ N(0, 1 / (m r^2)) for the last matrix before the entrance, m its inputs and r their measured
    root mean square, so that its output has a std near 1.

    Args:
        residual: the stream's map.
        context: its ``feature_sizes`` are what the matrices read; with ``part="language"`` features may stay small.
        drawn: the recipe makes the embedding large by values or a factor, not by a norm.

    Raises:
        Refused: the features would stay smaller than the tokens, and it was not said that this is meant.
    """
    for entrance in residual.entrances:
        inputs = " and ".join(entrance.inputs)
        target = entrance.parameter or f"features of {inputs}"
        size = context.feature_sizes.get(entrance.parameter or "", 0.0)
        fresh = drawn and context.reinit == "all" and entrance.parameter not in context.kept
        if entrance.normed:
            yield Skip(target, "a norm stands between it and the stream")
        elif fresh and size > 0 and entrance.parameter is not None:
            yield Fill(entrance.parameter, 1 / (size * math.sqrt(entrance.fan_in)))
        elif context.part == "language":
            yield Skip(target, f"as small as it is, since {_why(entrance.parameter, context, drawn=drawn)}")
        else:
            raise Refused(
                what=f"features of {inputs} enter the stream beside the tokens, and would stay as small as they are",
                where=residual.source,
                why=_why(entrance.parameter, context, drawn=drawn),
                remedy='leave them small with --part language (part="language"), and see to them yourself: as large as'
                " the tokens' embeddings, a std near 1",
            )


def _why(parameter: str | None, context: Context, *, drawn: bool) -> str:
    if context.reinit != "all" or parameter in context.kept:
        return "their weights are kept"
    if not drawn:
        return "the recipe normalises what the token embedding puts out, and nothing else"
    if parameter is None:
        return "no single matrix computes them, or they were not traced"
    return f"the size of what {parameter} reads could not be measured"
