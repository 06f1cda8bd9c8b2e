"""Embed Detach: x = E.detach() + g (E - E.detach()) with g = 0.1, for the rows E that the token embedding looks up.

The output is the same (bit-equal, a negative zero becoming zero: E - E.detach() is 0), the gradient that the lookup
passes to the table is g times as large. A tied head's own gradient on the shared matrix stays whole. It damps the
embedding's updates, and makes no larger shortcut; GLM-130B trained with it.

The paper writes g E + (1 - g) stop_grad(E), which is the same in exact arithmetic, and not bit-equal.

Refuses: a stream without a token embedding. It applies whatever the model does to the embedding's output afterwards.
Preserves: every value and the whole function; only training changes.
Sources: "Embed Detach" in Takase et al., arXiv 2312.16903; Zeng et al. 2022 (GLM-130B, embedding gradient shrink).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, DetachEmbedding, Edit, Skip
from spikepatch.residual.map import Embedding, ResidualMap
from spikepatch_transforms.embed_scale import token_embedding


@dataclass(frozen=True)
class EmbedDetach:
    """``DetachEmbedding(module, gradient)`` on the token embedding; ``gradient``: g, from 0 (frozen) to below 1."""

    gradient: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.gradient < 1:
            raise Refused(
                what="the share of the gradient must be from 0 to below 1",
                where=type(self).__name__,
                why=f"it is {self.gradient}",
                remedy="leave it out for 0.1",
            )

    def __call__(self, residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        token = token_embedding(residual, context)
        yield DetachEmbedding(token.module, self.gradient) if isinstance(token, Embedding) else token
