"""Scaled embedding: x = c E[token], so that the stream starts with a std near 1.

c = sqrt(d) for a fresh model (with E ~ N(0, 2 / (5 d)) the stream starts at sqrt(2/5) = 0.632), 1 / std(E) for learned
weights that are kept, or a given number. The factor is applied to the output of the lookup, so a tied head keeps its
logits' scale, and Adam's relative step on a row is the unscaled table's.

Refuses: a model that already multiplies or normalises its embedding, one whose table is not as wide as the stream, a
post-norm model, and learned embeddings without a finite, positive std.
Preserves: with kept weights the tables exactly; the function only approximately (the stream's start is another one).
Source: "Scaled Embed" in Takase et al., arXiv 2312.16903.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from spikepatch.errors import Refused
from spikepatch.plans import Context, Edit, ScaleEmbedding, Skip
from spikepatch.residual.map import Embedding, ResidualMap


@dataclass(frozen=True)
class EmbedScale:
    """``ScaleEmbedding(module, c)`` on the token embedding; ``positions``: on learned positions as well."""

    factor: float | None = None
    positions: bool = False

    def __call__(self, residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        for embedding in plain_embeddings(residual, positions=self.positions):
            if self.factor is not None:
                yield ScaleEmbedding(embedding.module, self.factor)
            elif context.embedding_std is not None:
                yield ScaleEmbedding(embedding.module, _reciprocal(context.embedding_std, residual.source))
            else:
                yield ScaleEmbedding(embedding.module, math.sqrt(residual.width), per_width=True)


def _reciprocal(std: float, source: str) -> float:
    if not 0 < std < math.inf:
        raise Refused(
            what="the learned embedding has no usable scale",
            where=source,
            why=f"the std of its elements is {std}",
            remedy="give the factor with --factor, or use --reinit all",
        )
    return 1 / std


def plain_embeddings(residual: ResidualMap, *, positions: bool) -> Iterator[Embedding]:
    """The embeddings that a large shortcut is made of; refuses a model that has one already, or has no use for it."""
    if residual.placement == "post-norm":
        raise Refused(
            what="a large shortcut does not apply to a post-norm model",
            where=residual.source,
            why="a norm on the stream itself, after every addition, sets its size anew, whatever the embedding's scale",
            remedy="use the recipe on a pre-norm model",
        )
    token = residual.token_embedding
    if token is None:
        raise Refused(
            what="no token embedding enters the stream",
            where=residual.source,
            why=f"no table of the stream's width, {residual.width}, is indexed by the input ids",
            remedy="use the recipe vanilla; a large shortcut is made on a language model's own embedding",
        )
    if token.width != residual.width:
        raise Refused(
            what=f"the token embedding is {token.width} wide, the stream {residual.width}",
            where=residual.source,
            why=f"a projection stands between {token.parameter} and the stream, and sets its size",
            remedy="use the recipe vanilla for the small sub-layers alone",
        )
    if token.normed:
        raise Refused(
            what="the token embedding is already normalised",
            where=residual.source,
            why=f"a norm stands between {token.parameter} and the stream, which cancels any factor",
            remedy="the large shortcut is there; use the recipe vanilla for the small sub-layers alone",
        )
    if token.scale != 1.0:
        raise Refused(
            what=f"the token embedding is already multiplied by {token.scale:g}",
            where=residual.source,
            why=f"measured on the graph between {token.parameter} and the stream, at width {residual.width}",
            remedy="the large shortcut is there; use the recipe vanilla for the small sub-layers alone",
        )
    for embedding in residual.embeddings:
        if embedding is token or (positions and embedding.kind == "position"):
            yield embedding
