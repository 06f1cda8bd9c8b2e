"""What all parts have in common: where they run, rows of the table, and what is left of a part's time."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Place:
    """``device``: as torch names it. ``tiny``: sizes that a CPU manages in seconds. ``folder``: for files."""

    device: str
    tiny: bool
    folder: Path

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Memory that nobody holds; peaks begin anew."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        """GiB."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None


@dataclass(frozen=True)
class Finding:
    """A row of the table. ``ok``: whether it is as it should be; None where that is not said."""

    part: str
    what: str
    found: str
    ok: bool | None = None
    values: dict[str, Any] = field(default_factory=dict)


class Budget:
    """Seconds of a part."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


#: Dense bf16, in FLOP/s, from the data sheets; the first name that is part of the device's.
PEAKS = {
    "B200": 2.25e15, "H200": 9.89e14, "H100": 9.89e14, "A100": 3.12e14, "L40S": 3.62e14, "L4": 1.21e14,
    "4090": 1.65e14, "A10": 1.25e14, "V100": 1.25e14,
}  # fmt: skip


def peak_of(device: str) -> float | None:
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name()
    return next((flops for part, flops in PEAKS.items() if part in name), None)
