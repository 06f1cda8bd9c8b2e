"""Where a run is, and how it is read from a checkpoint, which somebody may have damaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spikepatch.errors import on_one_line
from spikepatch.source.typed import parsed
from spikepatch.spikes.detector import SpikeDetector
from spikepatch.training.checkpoints import damaged


@dataclass(frozen=True)
class Position:
    """Where a run is; with weights, optimiser and random states all that it takes to go on from there.

    Attributes:
        step: steps done.
        shift: batches skipped by rewinds: step n trains on batch n - 1 + shift.
        rewinds: how many there were.
        idle: steps without a change of the weights, in a row, up to now.
        tokens: trained on so far.
    """

    step: int = 0
    shift: int = 0
    rewinds: int = 0
    idle: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class _Resumed:
    position: Position
    detector: SpikeDetector
    log: int | None


def restored(
    saved: Path, state: Mapping[str, Any], scaler: torch.amp.GradScaler | None
) -> tuple[Position, SpikeDetector, int | None]:
    """Position, detector and length of the log, as the loop has put them into ``saved``; the scaler is set to it.

    Raises:
        BadSource: they are not there, or not as they were.
    """
    try:
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
        found = parsed(_Resumed, {field.name: state[field.name] for field in dataclasses.fields(_Resumed)})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise damaged(saved, f"state.json: {on_one_line(error)}") from error
    return found.position, found.detector, found.log
