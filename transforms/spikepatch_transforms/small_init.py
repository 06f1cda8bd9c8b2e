"""Small initialisation: W ~ N(0, 2 / (5 d)) for sub-layer matrices and embeddings, or another distribution of them.

d is the width of the residual stream; ``distributions.py`` has the other rules. Residual projections are left to
``residual_init``, which divides the same std. A sub-layer matrix is a matmul weight: in attention, MLP and MoE all of
them, the router included; in mixers those that read the stream. Convolutions, state-space parameters and inner
projections of mixers keep the architecture's own initialiser, since their scale is part of what makes them work.

Preserves: nothing learned; it acts with ``reinit="all"`` only.
Source: Takase et al., "Spike No More", arXiv 2312.16903 (the initialisation of Nguyen and Salazar, 2019).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spikepatch.plans.plan import Context, Edit, Skip
from spikepatch.residual.map import ResidualMap
from spikepatch_transforms.distributions import Drawn


@dataclass(frozen=True)
class SmallInit(Drawn):
    """A ``Fill`` for embeddings, an untied head, and sub-layer matrices.

    ``token_embedding``: draw the token embedding too; without, another transform does (``embed_init``).
    """

    token_embedding: bool = True

    def __call__(self, residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        if context.reinit != "all":
            return
        tables = [e.parameter for e in residual.embeddings if self.token_embedding or e.kind != "token"]
        if residual.head is not None and context.untied:
            tables.append(residual.head.parameter)
        for table in tables:
            yield self.fill(table, residual.width, context.shapes[table])
        projections = {projection.parameter for projection in residual.residual_projections}
        for matrix in residual.matrices:
            if matrix.parameter in projections:
                continue
            if matrix.kind == "mixer" and not matrix.reads_stream:
                yield Skip(matrix.parameter, "inner projection of a mixer: the architecture's own initialiser")
            else:
                yield self.fill(matrix.parameter, residual.width, context.shapes[matrix.parameter], matrix)
