"""How far long work is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told what is going on: a step's name, how much of it is done, how much there is (bytes; 0: not known)."""

    def __call__(self, step: str, done: int = 0, total: int = 0) -> None: ...


def silent(step: str, done: int = 0, total: int = 0) -> None:
    """Nobody is told."""
