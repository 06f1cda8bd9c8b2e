"""Folders of trainings that never ran: run.json and logs as ``spikepatch train`` writes them, curves as told."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spikepatch.spikes.detector import SpikeDetector, news
from spikepatch.training.log import open_log
from spikepatch.training.run_identity import run_folder

#: (model, learning rate, seed, step) -> loss; None ends the log there, as a kill does.
Curve = Callable[[str, float, int, int], float | None]

VERSIONS = {"spikepatch": "0.1.0", "torch": "2.13.0"}
LAYERS = 4


def calm(model: str, lr: float, seed: int, step: int) -> float:
    """A smooth fall with Gaussian noise, the same for each model: identical batches."""
    noise = random.Random(f"{seed} {step}").gauss(0, 0.02)
    return 2 + 6 * math.exp(-step / 60) + 20 * lr + noise


def folder(
    path: Path,
    models: Sequence[str] = ("vanilla", "patched"),
    *,
    curve: Curve = calm,
    lr: float = 1e-3,
    multipliers: Sequence[float] = (1.0,),
    seeds: Sequence[int] = (0,),
    steps: int = 200,
    begun: int | None = None,
    ended: bool = True,
) -> Path:
    """Write the folder; of all runs the first ``begun``, the last of which has not ``ended``."""
    path.mkdir(parents=True, exist_ok=True)
    record = {
        "settings": {"steps": steps, "batch_tokens": 1024, "seq_len": 64, "schedule": "cosine"},
        "lr": lr, "multipliers": list(multipliers), "seeds": list(seeds),
        "models": {name: entry(name) | {"config": "abc"} for name in models},
        "data": {"files": ["builtin:stdlib"], "evaluation": [], "tokens": 10_000, "fingerprint": "f" * 64},
        "ranks": 1, "sharded": False, "versions": VERSIONS, "commands": [f"spikepatch train --out {path.name}"],
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(record))
    runs = [(m, seed, name) for m in multipliers for seed in seeds for name in models]
    runs = runs[: len(runs) if begun is None else begun]
    for i, (multiplier, seed, name) in enumerate(runs):
        log = path / run_folder(name, lr * multiplier, seed) / "log.jsonl"
        log.parent.mkdir(parents=True)
        whole = ended or i < len(runs) - 1
        write_log(log, name, curve, lr * multiplier, multiplier, seed, steps, ended=whole)
    return path


def entry(name: str) -> dict[str, Any]:
    patched = name.startswith("patched")
    return {"name": name, "source": "arch:x", "recipe": "embed-ln" if patched else None, "patched": patched}


def write_log(
    path: Path, name: str, curve: Curve, lr: float, multiplier: float, seed: int, steps: int, *, ended: bool
) -> None:
    """What the loop would write of these losses; the gradient norm follows the loss."""
    about: Mapping[str, Any] = {
        **entry(name), "lr": lr, "multiplier": multiplier, "seed": seed, "steps": steps,
        "warmup_steps": 10, "parameters": 1000, "versions": VERSIONS, "command": "spikepatch train",
        "points": [f"h.{i}.ln_{j}" for i in range(LAYERS) for j in (1, 2)],
        "layers": [f"h.{i}" for i in range(LAYERS)], "notes": [],
    }  # fmt: skip
    detector = SpikeDetector()
    with open_log(path, resume_at=None) as log:
        log.write({"type": "run", **about})
        for step in range(1, steps + 1):
            loss = curve(name, lr, seed, step)
            if loss is None:
                return
            before, norm = detector, abs(loss) / 4
            detector = detector.observe(step, loss, norm)
            log.write(
                {
                    "type": "step", "step": step, "batch": step - 1, "loss": loss, "gradient_norm": norm, "lr": lr,
                    "tokens": 1024 * step, "seconds": 0.125, "applied": math.isfinite(loss), "flags": detector.flags,
                }
            )  # fmt: skip
            for event in news(before, detector):
                log.write({"type": "event", "step": step, **dataclasses.asdict(event)})
            if step % 20 == 1:
                stream = [0.1 * (1 + i) * norm for i in range(2 * LAYERS)]
                log.write({"type": "layers", "step": step, "stream": stream, "gradients": [norm / 2] * LAYERS})
        if ended:
            log.write({"type": "eval", "step": steps, "loss": curve(name, lr, seed, steps)})
