"""What ``check`` cannot measure, in words."""

from __future__ import annotations

import torch

from spikepatch.errors import Refused, first_line
from spikepatch.preflight.result import Finding, StabilityReport
from spikepatch.preflight.subject import Subject
from spikepatch.residual.map import ResidualMap


def not_proven(residual: ResidualMap, source: str) -> Refused:
    """There is no map to measure along."""
    return Refused(
        what="its residual stream is not proven, so what would be measured is not known",
        where=source,
        why="; ".join(residual.leaks[:3]),
        remedy="`spikepatch inspect` shows the map; please report the architecture",
    )


def refused_column(error: Refused, source: str, recipe: str, base: Subject) -> StabilityReport:
    """The column of a recipe that does not apply."""
    return StabilityReport(
        source=source,
        recipe=recipe,
        architecture=type(base.structure).__name__,
        weights="-",
        placement="-",
        width=0,
        sublayers=0,
        device="-",
        tokens=0,
        batch=0,
        seed=0,
        refused=f"{error.what}: {error.why}",
        findings=(Finding("refused", "note", f"refused: {error.what}: {error.why}", remedy=error.remedy),),
    )


def too_large(
    subject: Subject, source: str, device: torch.device, *, batch: int, tokens: int, error: BaseException
) -> Refused:
    """It takes more memory than there is."""
    elsewhere = "" if device.type == "cpu" else ", or --device cpu"
    return Refused(
        what="it does not fit into memory",
        where=source + (f" with {subject.recipe}" if subject.recipe else ""),
        why=f"{batch} x {tokens} tokens on {device}: {first_line(error)}",
        remedy=f"give fewer sequences or shorter ones: --batch 1, --tokens {max(2, tokens // 4)}{elsewhere}",
    )
