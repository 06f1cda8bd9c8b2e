"""What ``convert`` returns, and what is added to it once the weights are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikepatch.apply.disk.write import Written
from spikepatch.apply.folder import notes
from spikepatch.apply.folder.drift import Behaviour
from spikepatch.apply.folder.routes import RouteKind
from spikepatch.plans.plan import Plan
from spikepatch.residual.map import ResidualMap


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        out: the folder; nothing is there after a dry run.
        plan, residual: every edit and skip, and the proven map that they were planned on.
        storage: how it is stored; see ``routes.py``.
        trust: it loads with ``trust_remote_code=True`` only.
        auto_class: the class of transformers that loads it.
        dtype: of the float weights.
        parameters: number of elements written.
        bytes: of the weights.
        expected_loss: estimated initial loss where it is far from log V; see ``expected_initial_loss``.
        log_vocab: log V, the loss of a uniform guess.
        notes: what the user should know, one sentence each; the first says whose the weights are.
        casts: tensor name -> how many learned values overflowed and underflowed in the dtype asked for, where any did.
        discards: a sentence that says so, where the source has learned weights and none of them is used; else empty.
        drift: for learned weights, what the source does on a sample text and what the written model does; after a dry
            run, what the source would do with other factors. Empty where not measured.
    """

    out: Path
    plan: Plan
    residual: ResidualMap
    storage: RouteKind
    trust: bool
    auto_class: str
    dtype: str
    parameters: int
    bytes: int
    expected_loss: float | None
    log_vocab: float | None
    notes: tuple[str, ...]
    casts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    discards: str = ""
    drift: tuple[Behaviour, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``--json`` prints it."""
        known = dataclasses.asdict(self)
        del known["discards"]  # which is a note
        return known | {"out": str(self.out), "plan": self.plan.to_dict()}


def with_drift(result: Conversion, drift: tuple[Behaviour, ...] | str) -> Conversion:
    """With what was measured, or why it was not."""
    if isinstance(drift, str):
        return noted(result, f"what the patch does to the loss is not measured: {drift}")
    head, uniform, last = result.residual.head, result.log_vocab, drift[-1]
    above = uniform is not None and last.model == "written" and last.loss > 1.1 * uniform
    if above and head is not None and head.tied:
        result = noted(
            result,
            f"the loss is above log V = {uniform:.1f} now: the head is tied, so a stream that is mostly the token's own"
            " embedding makes it predict the current token",
        )
    return dataclasses.replace(result, drift=drift)


def with_casts(result: Conversion, written: Written) -> Conversion:
    """With what the values became that were written."""
    casts = {n: {"overflow": t.overflow, "underflow": t.underflow} for n, t in written.tallies.items()}
    casts = {name: counts for name, counts in casts.items() if any(counts.values())}
    result = noted(result, *notes.unsound_values(written.tallies, result.dtype), *written.notes)
    return dataclasses.replace(result, casts=casts)


def noted(result: Conversion, *notes: str) -> Conversion:
    """With further notes."""
    return dataclasses.replace(result, notes=(*result.notes, *notes))
