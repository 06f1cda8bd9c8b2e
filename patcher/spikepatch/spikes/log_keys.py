"""What logs call their step, their loss and the norm of their gradient, and which of a log's keys these are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikepatch.errors import Refused, did_you_mean

#: Keys by which a log calls its step, its loss and the norm of its gradient; the first that is there.
STEP_KEYS = ("step", "global_step", "current_steps", "iteration", "iter", "trainer/global_step", "Step", "_step")
LOSS_KEYS = (
    "loss", "train_loss", "train/loss", "train loss", "training loss", "train_loss_step", "train/train_loss", "lm loss",
    "train/CE loss", "loss_metrics/global_avg_loss", "training/loss", "Loss/train",
)  # fmt: skip
NORM_KEYS = (
    "grad_norm", "gradient_norm", "train/grad_norm", "grad-norm", "norm", "grad norm", "optim/total grad norm",
    "train/global_grad_norm",
)  # fmt: skip

#: How deep mappings in mappings are looked into.
_DEPTH = 8


@dataclass(frozen=True)
class Keys:
    """What the user calls step, loss and norm; None: as in the tables above."""

    loss: str | None = None
    norm: str | None = None
    step: str | None = None


def flat(record: Mapping[str, Any], depth: int = _DEPTH) -> dict[str, Any]:
    """A record with the leaves of mappings in it by dotted keys: {"train": {"loss": 1}} is {"train.loss": 1}."""
    leaves = {key: value for key, value in record.items() if not isinstance(value, Mapping)}
    if depth and len(leaves) < len(record):
        for key, value in record.items():
            if isinstance(value, Mapping):
                for inner, leaf in flat(value, depth - 1).items():
                    leaves.setdefault(f"{key}.{inner}", leaf)
    return leaves


def chosen(path: Path, here: Iterable[str], keys: Keys) -> tuple[str, str | None]:
    """The keys of loss and norm."""
    names = list(here)
    loss = key_of(path, "--loss", keys.loss, LOSS_KEYS, names, needed=True)
    assert loss is not None
    return loss, key_of(path, "--norm", keys.norm, NORM_KEYS, names, needed=False)


def key_of(
    path: Path, option: str, wanted: str | None, known: Sequence[str], here: Iterable[str], *, needed: bool
) -> str | None:
    """The key that is ``wanted``, where "/" and "." are the same, or that is ``known``.

    Raises:
        Refused: it is not there, and wanted or ``needed``; the message lists those that are.
    """
    names = list(here)
    if wanted is not None:
        if wanted in names:
            return wanted
        same = [name for name in names if name.replace("/", ".") == wanted.replace("/", ".")]
        if len(same) == 1:
            return same[0]
        raise Refused(
            f"it has no {wanted!r}",
            where=str(path),
            why=f"its keys are {listed(names)}",
            remedy=did_you_mean(wanted, names, f"{option} with one of these"),
        )
    for name in known:
        if name in names:
            return name
    ending = [name for name in names if _ends(name, known)]
    if len(ending) == 1:
        return ending[0]
    if not needed:
        return None
    likely = [
        f', such as {option} "{name[:60]}"' for name in ending or names if name in ending or "loss" in name.lower()
    ]
    raise Refused(
        "its loss is not found" if not ending else f"{len(ending)} columns may be its loss",
        where=str(path),
        why=f"its keys are {listed(names)}",
        remedy=f"{option} with the one of these that it is{likely[0] if likely else ''}",
    )


def _ends(name: str, known: Sequence[str]) -> bool:
    """Whether the last part of ``name`` is ``known``, or its last two are, and none is of an evaluation."""
    parts = re.split(r" - |[/.]", name)
    if len(parts) == 1 or any(part.startswith(("val", "eval")) for part in parts):
        return False
    nested = "." in name  # a norm within something may be any norm
    return "_".join(parts[-2:]) in known or any(
        name.endswith((f" - {key}", f"/{key}")) or (nested and key != "norm" and name.endswith(f".{key}"))
        for key in known
    )


def listed(names: Iterable[str]) -> str:
    """Names, as a message has them."""
    return ", ".join(str(name)[:60] for name in sorted(names)[:40]) or "none"
