"""Embedding LayerNorm: x = LN(E[token]), with gain 1 and bias 0 at first, so that the stream starts with std 1.

Affine, on the token embedding alone, as BLOOM has it; the paper does not say. Refuses what ``embed_scale`` refuses.
Preserves: with kept weights the tables exactly; the function only approximately.
Source: "Embed LN" in Takase et al., arXiv 2312.16903; Le Scao et al. 2022.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spikepatch.plans import Context, Edit, NormEmbedding, Skip
from spikepatch.residual.map import ResidualMap
from spikepatch_transforms.embed_scale import plain_embeddings


@dataclass(frozen=True)
class EmbedNorm:
    """``NormEmbedding(module, eps)`` on the token embedding."""

    eps: float = 1e-5

    def __call__(self, residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        for embedding in plain_embeddings(residual, positions=False):
            yield NormEmbedding(embedding.module, self.eps)
