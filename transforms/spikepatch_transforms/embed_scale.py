"""Scaled embedding: x = c E[token], so that the stream starts with a std near 1.

c = sqrt(d) for a fresh model (with E ~ N(0, 2 / (5 d)) the stream starts at sqrt(2/5) = 0.632), 1 / std(E) for learned
weights that are kept, or a given number. The factor is applied to the output of the lookup, so a tied head keeps its
logits' scale, and Adam's relative step on a row is the unscaled table's.

Refuses: a model that normalises its embedding; one that multiplies it by k, unless told to ``replace`` that factor: the
output is then multiplied by c / k; to replace a factor where there is none; a table not as wide as the stream, unless c
is given; a post-norm model; learned embeddings without a finite, positive std; a given c that is no positive number.
Preserves: with kept weights the tables exactly; the function only approximately (the stream's start is another one).
Source: "Scaled Embed" in Takase et al., arXiv 2312.16903.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from spikepatch.errors import Refused
from spikepatch.plans.entrances import enlarge_entrances
from spikepatch.plans.plan import Context, Edit, ScaleEmbedding, Skip
from spikepatch.residual.map import Embedding, ResidualMap

_ROUNDED = 1e-5  # as factors in the map are, to six digits


@dataclass(frozen=True)
class EmbedScale:
    """``ScaleEmbedding(module, c)`` on the token embedding; ``positions``: on learned positions as well."""

    factor: float | None = None
    positions: bool = False
    replace: bool = False

    def __post_init__(self) -> None:
        if self.factor is not None and not 0 < self.factor < math.inf:
            raise Refused(
                what="the embedding factor must be a positive number",
                where=f"factor={self.factor}",
                why="the stream would vanish, flip or overflow",
                remedy="leave it out for sqrt(d)",
            )

    def __call__(self, residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        token = token_embedding(residual, context)
        if isinstance(token, Skip):
            yield token
            return
        check_shortcut(residual, token, any_width=self.factor is not None)
        scaled = [e for e in residual.embeddings if e is token or (self.positions and e.kind == "position")]
        if self.replace and not context.stream and not any(multiplied_already(e, residual) for e in scaled):
            raise Refused(
                what="there is no factor to replace",
                where=residual.source,
                why=f"the architecture does not multiply what {token.parameter} looks up",
                remedy="leave --replace (replace) out",
            )
        for embedding in scaled:
            yield self._scaled(embedding, residual, context)
        yield from enlarge_entrances(residual, context)

    def _scaled(self, embedding: Embedding, residual: ResidualMap, context: Context) -> Edit | Skip:
        chosen = self.factor
        if chosen is None and context.embedding_std is not None:
            chosen = _reciprocal(context.embedding_std, residual.source)
        factor = math.sqrt(residual.width) if chosen is None else chosen
        if not multiplied_already(embedding, residual):
            return ScaleEmbedding(embedding.module, factor, per_width=chosen is None)
        if not self.replace:
            raise multiplied(residual, embedding, "; --replace divides that factor out")
        if abs(factor / embedding.scale - 1) < _ROUNDED:
            return Skip(f"{embedding.module} * {factor:g}", "the architecture multiplies by that already")
        return ScaleEmbedding(embedding.module, factor / embedding.scale)


def multiplied_already(embedding: Embedding, residual: ResidualMap) -> bool:
    """The architecture multiplies what it looks up by a number; a projection's is none."""
    return embedding.width == residual.width and embedding.scale != 1.0


def _reciprocal(std: float, source: str) -> float:
    if not 0 < std < math.inf:
        raise Refused(
            what="the learned embedding has no usable scale",
            where=source,
            why=f"the std of its elements is {std}",
            remedy="give the factor with --factor, or use --reinit all",
        )
    return 1 / std


def token_embedding(residual: ResidualMap, context: Context) -> Embedding | Skip:
    """The stream's token embedding. An encoder of sounds or images has none, and is left as it is."""
    token = residual.token_embedding
    if token is not None:
        return token
    if context.stream:
        first = residual.residual_projections[0].parameter
        return Skip(f"embedding of the stream of {first}", "no token embedding enters this stream")
    raise Refused(
        what="no token embedding enters the stream",
        where=residual.source,
        why=f"no table of the stream's width, {residual.width}, is indexed by the input ids",
        remedy="use the recipe vanilla; a large shortcut is made on a language model's own embedding",
    )


def check_shortcut(residual: ResidualMap, token: Embedding, *, any_width: bool = False) -> None:
    """Refuse a model that has no use for a large shortcut, or has a norm there already."""
    if residual.placement == "post-norm":
        raise Refused(
            what="a large shortcut does not apply to a post-norm model",
            where=residual.source,
            why="a norm on the stream itself, after every addition, sets its size anew, whatever the embedding's scale",
            remedy="use the recipe on a pre-norm model; the recipe vanilla makes the small sub-layers alone",
        )
    if token.normed and token.scale != 1.0:
        raise Refused(
            what=f"the token embedding is normalised to a std of {token.scale:.3g}, a small shortcut",
            where=residual.source,
            why=f"a norm stands between {token.parameter} and the stream, which cancels any factor of the table",
            remedy=f"multiply by {1 / token.scale:.4g} behind that norm, in the model's own code; the recipe vanilla"
            " makes the small sub-layers alone",
        )
    if token.normed:
        raise Refused(
            what="the token embedding is already normalised",
            where=residual.source,
            why=f"a norm stands between {token.parameter} and the stream, which cancels any factor",
            remedy="the large shortcut is there; use the recipe vanilla for the small sub-layers alone",
        )
    if token.width != residual.width and not any_width:
        raise Refused(
            what=f"the token embedding is {token.width} wide, the stream {residual.width}",
            where=residual.source,
            why=f"a projection stands between {token.parameter} and the stream, and its weights set the size",
            remedy="give a factor for the embedding with --factor, or use the recipe vanilla",
        )


def multiplied(residual: ResidualMap, embedding: Embedding, otherwise: str = "") -> Refused:
    """The error for an embedding whose output the architecture multiplies by a number already."""
    large = "the large" if embedding.scale > 0.5 * math.sqrt(residual.width) else "no large"
    return Refused(
        what=f"the {embedding.kind} embedding is already multiplied by {embedding.scale:g}",
        where=residual.source,
        why=f"measured on the graph between {embedding.parameter} and the stream, at width {residual.width}",
        remedy=f"{large} shortcut is there; use the recipe vanilla for the small sub-layers alone" + otherwise,
    )
