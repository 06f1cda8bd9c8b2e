"""Untie: the head gets a matrix of its own.

With a tied head and a large shortcut the stream at initialisation is mostly the token's own embedding, so the head
predicts the current token with a logit of about sqrt(2/5) sqrt(d): an initial loss of 17.7 instead of log V = 10.8 for
GPT-2 at d = 1024. A fresh head is drawn like the embedding; beside kept weights it starts as an exact copy.

Refuses: a model without a head, or whose head is its own already. Source: derived and measured for this project.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spikepatch.errors import Refused
from spikepatch.plans import Context, Edit, Skip, Untie
from spikepatch.residual.map import ResidualMap


@dataclass(frozen=True)
class UntieHead:
    """``Untie(head, embedding)``."""

    def __call__(self, residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        if residual.head is None or not residual.head.tied:
            raise Refused(
                what="there is no tied head to untie",
                where=residual.source,
                why="the model has no head" if residual.head is None else "its head has its own matrix already",
                remedy="leave --untie out",
            )
        token = residual.token_embedding
        assert token is not None, "a tied head shares an embedding"
        yield Untie(residual.head.parameter, token.parameter)
