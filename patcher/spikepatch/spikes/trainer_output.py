"""The log that a Trainer leaves in its output folder."""

from __future__ import annotations

import json
import re
from pathlib import Path


def trainer_state(folder: Path) -> Path | None:
    """The trainer_state.json that knows most: of the last checkpoint, or the folder's own. Each has all of the history
    before it."""
    saved = [
        (int(number[1]), state)
        for state in folder.glob("checkpoint-*/trainer_state.json")
        if (number := re.fullmatch(r"checkpoint-(\d{1,15})", state.parent.name))
    ]
    own = folder / "trainer_state.json"
    if own.is_file() and (not saved or _reached(own) >= max(saved)[0]):
        return own
    return max(saved)[1] if saved else None


def _reached(state: Path) -> float:
    """The step of the state; -1 where it does not say."""
    try:
        document = json.loads(state.read_bytes())
    except (OSError, ValueError, RecursionError):
        return -1
    reached = document.get("global_step") if isinstance(document, dict) else None
    return reached if isinstance(reached, (int, float)) else -1
