"""Untie: the head gets a matrix of its own.

With a tied head and a large shortcut the stream at initialisation is mostly the token's own embedding, so the head
predicts the current token with a logit of about sqrt(2/5) sqrt(d): an initial loss of 17.7 instead of log V = 10.8 for
GPT-2 at d = 1024. With fresh weights the head is drawn as ``small_init`` says; beside kept weights it starts as an
exact copy, or, with ``fresh``, as N(0, 2 / (5 d)).

Refuses: a model without a head, whose head is its own already, or which has no separate head to give a matrix to. What
a model's class cannot load again untied is refused when the plan is applied.
Preserves: with a copy the function exactly. Source: derived and measured for this project.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, Edit, Fill, Skip, Untie, small_std
from spikepatch.residual.map import ResidualMap


@dataclass(frozen=True)
class UntieHead:
    """``Untie(head, embedding)``.

    ``fresh``: draw the head afresh even where learned weights are kept. ``if_tied``: where no head is tied, do nothing.
    """

    fresh: bool = False
    if_tied: bool = False

    def __call__(self, residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        if context.stream:
            return  # only the stream that feeds the output has a head
        head, token = residual.head, residual.token_embedding
        if head is None or not head.tied:
            if self.if_tied:
                return
            raise Refused(
                what="there is no tied head to untie",
                where=residual.source,
                why="the model has no head" if head is None else "its head has its own matrix already",
                remedy="leave --untie out",
            )
        assert token is not None, "a tied head shares an embedding"
        if head.parameter == token.parameter:
            raise Refused(
                what="this model's head cannot be untied",
                where=residual.source,
                why=f"its code multiplies by {token.parameter} itself; there is no head module to own a matrix",
                remedy="leave --untie out, or give the model's code a head of its own",
            )
        yield Untie(head.parameter, token.parameter)
        if self.fresh and context.reinit != "all":
            yield Fill(head.parameter, small_std(residual.width), fan=residual.width)
