"""What all runs of one command have in common, and what is asked for by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from spikepatch.data.rows import Reading
from spikepatch.data.tokenizing import Bos


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: number of optimiser steps.
        batch_tokens: of all ranks together, in one step; a multiple of ranks times ``seq_len``.
        seq_len: T.
        micro_batch: sequences of one forward pass on one rank; None: all of the rank's share.
        warmup: steps of linear warm-up; below 1, a share of all steps.
        schedule: cosine (to 0), constant, or wsd (constant, then linearly to 0 over the last fifth).
        grad_clip: largest norm of the gradient that reaches the optimiser; 0: any.
        z_loss: factor of mean(logsumexp(logits)^2), added to the loss that is trained on, and not to the one shown.
        checkpoint_every: steps; 0: none but what a rewind needs.
        on_spike: what a flagged step leads to. log: nothing. skip: its gradients are dropped. rewind: back to the last
            checkpoint before it, and the batches since then are left out. stop: the run ends. Gradients that are not
            finite are always dropped.
        reset_positions: documents that share a sequence do not see each other, and each begins at position 0; the first
            token of a document is no target.
        watch_every: steps between two measurements inside the model; 0: none.
    """

    steps: int
    batch_tokens: int = 65536
    seq_len: int = 512
    micro_batch: int | None = None
    warmup: float = 0.05
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    precision: Literal["no", "bf16", "fp16"] = "no"
    grad_clip: float = 1.0
    z_loss: float = 0.0
    checkpoint_every: int = 500
    on_spike: Literal["log", "skip", "rewind", "stop"] = "log"
    reset_positions: bool = False
    watch_every: int = 50
    activation_checkpointing: bool = False
    compile: bool = False

    @property
    def sequences(self) -> int:
        """Sequences in a batch, of all ranks together."""
        return self.batch_tokens // self.seq_len

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.steps if self.warmup < 1 else self.warmup)


@dataclass(frozen=True)
class TrainingCommand:
    """A command, as ``run.json`` keeps it, so that it can be gone on with.

    Attributes:
        models, data, eval_data: as given.
        lr, multipliers, seeds: every model is trained at each product of the first two with each of the third.
        reading, bos: how the data become tokens.
        log_with: names of trackers.
        options: of the models' recipes, those that are given.
    """

    models: tuple[str, ...]
    data: tuple[str, ...]
    settings: Settings
    lr: float
    multipliers: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    eval_data: tuple[str, ...] = ()
    reading: Reading = field(default_factory=Reading)
    bos: Bos = "auto"
    log_with: tuple[str, ...] = ()
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
