"""The log's numbers for TensorBoard, trackio or Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from spikepatch.errors import Refused

_PROJECT = "spikepatch"

#: Name -> a tracker of the run called so, with its files in a folder.
TRACKERS: Mapping[str, Callable[[str, Path], GeneralTracker]] = {
    "tensorboard": lambda run, folder: TensorBoardTracker("tensorboard", folder),
    "trackio": lambda run, folder: TrackioTracker(_PROJECT, name=run),
    "wandb": lambda run, folder: WandBTracker(_PROJECT, name=run, dir=str(folder)),
}


def check_installed(names: Sequence[str]) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(
            what=f"{' and '.join(missing)} cannot be logged to",
            where="--log-with",
            why="not installed here",
            remedy=f"pip install {' '.join(missing)}",
        )


@contextlib.contextmanager
def tracking(
    names: Sequence[str], run: str, folder: Path, about: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields what is to be called with each record of the run's log; on the main process."""
    trackers = [TRACKERS[name](run, folder) for name in names]
    for tracker in trackers:
        tracker.start()
        tracker.store_init_configuration({name: value for name, value in about.items() if not isinstance(value, dict)})

    def observe(record: Mapping[str, Any]) -> None:
        if record["type"] in ("step", "eval"):
            prefix = "" if record["type"] == "step" else "eval_"
            values = {f"{prefix}{k}": v for k, v in record.items() if isinstance(v, float)}
            for tracker in trackers:
                tracker.log(values, step=record["step"])

    try:
        yield observe
    finally:
        for tracker in trackers:
            tracker.finish()
