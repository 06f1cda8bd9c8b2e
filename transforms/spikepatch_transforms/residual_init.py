"""Residual scaling: residual projections ~ N(0, (s / (m sqrt(S)))^2) with s = sqrt(2 / (5 d)).

S is the number of sub-layers, counted from the map (2 N in a classic decoder of N layers), and m the size of a factor
that the architecture itself applies between the product and the addition: it is divided out, so that the branch ends
at the recipe's scale and the two are not applied on top of each other.

Skips: behind a branch norm the product is divided by its own size, so the scale of the weight does not reach the
stream; such projections get s. Preserves: nothing learned in the projections; acts with ``reinit`` all and residual.
Source: Radford et al. 2019 (GPT-2); "small sub-layers" in Takase et al., arXiv 2312.16903.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from spikepatch.plans import Context, Edit, Fill, Skip, small_std
from spikepatch.residual.map import ResidualMap


@dataclass(frozen=True)
class ResidualInit:
    """``Fill(projection, sqrt(2 / (5 d)) / (m sqrt(S)))``."""

    def __call__(self, residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        if context.reinit == "none":
            return
        std = small_std(residual.width)
        for projection in residual.residual_projections:
            if projection.branch_norm is None:
                scaled = std / (abs(projection.multiplier) * math.sqrt(residual.sublayers))
                yield Fill(projection.parameter, scaled, residual=True)
            else:
                yield Fill(projection.parameter, std)
                yield Skip(
                    f"{projection.parameter} * 1/sqrt({residual.sublayers})",
                    f"scale-invariant: {projection.branch_norm} divides the product by its own size",
                )
