"""The log's numbers for TensorBoard, Weights & Biases and others, through accelerate's ``init_trackers``."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, filter_trackers

from spikepatch.errors import Refused

_PROJECT = "spikepatch"

#: What accelerate knows, by its names, which are those of their packages -> what their run is called by.
TRACKERS: Mapping[str, str | None] = {
    "aim": None, "clearml": "task_name", "comet_ml": None, "dvclive": None, "mlflow": "run_name",
    "swanlab": "experiment_name", "tensorboard": None, "trackio": "name", "wandb": "name",
}  # fmt: skip


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
    accelerator: Accelerator, names: Sequence[str], run: str, folder: Path, about: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields what is to be called with each record of the run's log; on the main process.

    A tracker that keeps files has them in a folder of its name in ``folder``; others get a run called ``run``, if they
    can be told so, in the project spikepatch.
    """
    config = {name: value for name, value in about.items() if not isinstance(value, dict)}
    trackers: list[GeneralTracker] = []
    for name in names:
        called = TRACKERS.get(name)
        title = {} if called is None else {called: run}
        files = {"wandb": {"dir": str(folder)}, "dvclive": {"dir": str(folder / name)}}.get(name, {})
        accelerator.log_with = filter_trackers([name], logging_dir=folder)
        accelerator.project_configuration.logging_dir = folder
        accelerator.trackers = []
        project = name if name == "tensorboard" else _PROJECT if title else f"{_PROJECT}/{run}"
        accelerator.init_trackers(project, config, {name: {**title, **files}})
        trackers += accelerator.trackers

    def observe(record: Mapping[str, Any]) -> None:
        if record["type"] in ("step", "eval"):
            prefix = "" if record["type"] == "step" else "eval_"
            values = {f"{prefix}{k}": v for k, v in record.items() if isinstance(v, float)}
            for tracker in trackers:
                tracker.log(values, step=record["step"])

    try:
        yield observe
    finally:
        accelerator.trackers = []
        for tracker in trackers:
            tracker.finish()
