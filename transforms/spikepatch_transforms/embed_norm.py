"""Embedding norm: x = norm(E[token]), so that the stream starts with std 1: a LayerNorm, or an RMSNorm.

Affine by default, with gain 1 and bias 0 at first, on the token embedding alone, as in BLOOM; the paper does not say.
Refuses: a model that normalises its embedding or multiplies it by a number already, one whose table is not as wide as
the stream, and a post-norm model.
Preserves: with kept weights the tables exactly; the function only approximately.
Source: "Embed LN" in Takase et al., arXiv 2312.16903; Le Scao et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from spikepatch.errors import Refused
from spikepatch.plans.entrances import enlarge_entrances
from spikepatch.plans.plan import Context, Edit, NormEmbedding, Skip
from spikepatch.residual.map import NormKind, ResidualMap
from spikepatch_transforms.embed_scale import check_shortcut, multiplied, token_embedding


@dataclass(frozen=True)
class EmbedNorm:
    """``NormEmbedding(module, eps, norm, affine)`` on the token embedding."""

    eps: float = 1e-5
    norm: NormKind = "layernorm"
    affine: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.eps < math.inf:
            raise Refused(
                what="a norm's eps must be a positive number",
                where=type(self).__name__,
                why=f"it is {self.eps}",
                remedy="leave it out for 1e-5",
            )

    def __call__(self, residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        token = token_embedding(residual, context)
        if isinstance(token, Skip):
            yield token
            return
        check_shortcut(residual, token)
        if token.scale != 1.0:
            raise multiplied(residual, token)
        yield NormEmbedding(token.module, self.eps, self.norm, self.affine)
        yield from enlarge_entrances(residual, context, drawn=False)
