"""Small initialisation: W ~ N(0, 2 / (5 d)) for sub-layer matrices and embeddings.

d is the width of the residual stream. Residual projections are left to ``residual_init``, which divides the same std.
A sub-layer matrix is a matmul weight: in attention, MLP and MoE all of them, the router included; in mixers those that
read the stream. Convolutions, state-space parameters and inner projections of mixers keep the architecture's own
initialiser, since their scale is part of what makes them work.

Preserves: nothing learned; it acts with ``reinit="all"`` only.
Source: Takase et al., "Spike No More", arXiv 2312.16903 (the initialisation of Nguyen and Salazar, 2019).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spikepatch.plans import Context, Edit, Fill, Skip, small_std
from spikepatch.residual.map import ResidualMap


@dataclass(frozen=True)
class SmallInit:
    """``Fill(parameter, sqrt(2 / (5 d)))`` for embeddings, an untied head, and sub-layer matrices."""

    def __call__(self, residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        if context.reinit != "all":
            return
        std = small_std(residual.width)
        for embedding in residual.embeddings:
            yield Fill(embedding.parameter, std)
        if residual.head is not None and context.untied:
            yield Fill(residual.head.parameter, std)
        projections = {projection.parameter for projection in residual.residual_projections}
        for matrix in residual.matrices:
            if matrix.parameter in projections:
                continue
            if matrix.kind == "mixer" and not matrix.reads_stream:
                yield Skip(matrix.parameter, "inner projection of a mixer: the architecture's own initialiser")
            else:
                yield Fill(matrix.parameter, std)
