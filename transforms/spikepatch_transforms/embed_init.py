"""Embedding initialisation: E ~ N(0, s^2), so that the stream starts with std s without a factor or a norm.

With s = 1 the large shortcut is in the weights themselves. Adam's relative step on a row is then lr / s, some 76 times
smaller than behind a factor at d = 2304, and weight decay pulls the rows to zero: leave embeddings out of it.

Refuses: a tied head where s sqrt(d) > 3. The head reads a stream of std 1 with the same matrix, so the first logits
have a std of s sqrt(d), which costs s^2 d / 2 nats above log V; no usual std comes near 3. Also a model whose
stream would not start with s: it has a norm, a projection or a factor on its embedding (sqrt(d) makes 64 at d = 4096);
a post-norm model; learned embeddings that are to be kept; and an s that is no positive number.
Preserves: nothing. Goes with ``SmallInit(token_embedding=False)``.
Sources: footnote of Takase et al., arXiv 2312.16903; BioNeMo and Megatron-LM's ``--embedding-init-method-std`` (std 1,
untied, no weight decay on embeddings).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from spikepatch.errors import Refused
from spikepatch.plans.entrances import enlarge_entrances
from spikepatch.plans.plan import Context, Edit, Fill, Skip
from spikepatch.residual.map import ResidualMap
from spikepatch_transforms.embed_scale import check_shortcut, multiplied, multiplied_already

#: std of the initial logits of a tied head that is refused.
_LOGITS = 3.0


@dataclass(frozen=True)
class EmbedInit:
    """``Fill(table, std)`` for the token embedding."""

    std: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise Refused(
                what="the std of an embedding must be a positive number",
                where=type(self).__name__,
                why=f"it is {self.std}",
                remedy="leave it out for 1",
            )

    def __call__(self, residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        if context.reinit != "all":
            raise Refused(
                what="the recipe draws the token embedding afresh, and learned weights are to be kept",
                where=residual.source,
                why=f"with reinit={context.reinit} the learned embedding stays",
                remedy="use --reinit all, or scaled-embed",
            )
        tokens = [embedding for embedding in residual.embeddings if embedding.kind == "token"]
        for token in tokens:
            check_shortcut(residual, token)
            if multiplied_already(token, residual):
                raise multiplied(residual, token, "; scaled-embed with --replace (replace) divides that factor out")
        logits = self.std * math.sqrt(residual.width)
        if tokens and not context.untied and logits > _LOGITS:
            raise Refused(
                what=f"embeddings of std {self.std:g} do not fit a tied head",
                where=residual.source,
                why=f"the head uses the same matrix, so the initial logits would have a std of about {logits:.1f}",
                remedy="give the head its own matrix with --untie (the transform untie), or use scaled-embed",
            )
        for token in tokens:
            yield Fill(token.parameter, self.std)
        yield from enlarge_entrances(residual, context)
