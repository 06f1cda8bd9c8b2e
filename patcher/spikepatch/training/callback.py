"""The detector inside transformers' ``Trainer``, and whatever is built on it."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from spikepatch.errors import Refused
from spikepatch.spikes.detector import SpikeDetector, news
from spikepatch.spikes.events import Event
from spikepatch.spikes.statistic import WARMUP

_log = logging.getLogger(__name__)


class SpikeMonitor(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Spikes in your own ``Trainer`` or TRL run, by ``spikepatch.SpikeDetector``.

        monitor = spikepatch.SpikeMonitor(on_spike="stop")
        trainer = Trainer(model, arguments, train_dataset=..., callbacks=[monitor])
        trainer.train()
        print(monitor.report())

    It reads the loss and ``grad_norm`` (before clipping) that Trainer logs, both reduced over all processes, so all of
    them decide alike; it needs those of every step, NaN too. When training begins it therefore sets
    ``logging_strategy="steps"``, ``logging_steps=1`` and ``logging_nan_inf_filter=False`` where they are otherwise, and
    says so with a warning in the log; steps whose loss does not reach it, because another callback forbids logging, are
    told in the log and in the report.

    What Trainer does is not changed: it applies gradients that are not finite, and its running loss stays NaN once it
    was. From then on only the gradient norm shows whether a step was finite. With fp16, a gradient that overflows under
    a finite loss is the loss scaler at work and no event.

    Its state is saved with Trainer's checkpoints, and ``resume_from_checkpoint`` goes on with it. (With
    ``restore_callback_states_from_checkpoint=True`` Trainer puts a new monitor in the place of the one it was given:
    take it from ``trainer.callback_handler.callbacks``.) ``monitor.detector`` is the state after the last step.

    Args:
        on_spike: ``log`` a warning, or also ``stop`` the training after that step. The gradient norm alone is logged.

    Raises:
        Refused: ``on_spike`` is neither; a checkpoint holds the states of several monitors.
    """

    def __init__(self, on_spike: Literal["log", "stop"] = "log") -> None:
        if on_spike not in ("log", "stop"):
            raise Refused(
                what=f"on_spike={on_spike!r}",
                where="SpikeMonitor",
                why="a callback can log a spike, or stop the training",
                remedy='"log" or "stop"',
            )
        self.on_spike: Literal["log", "stop"] = on_spike
        self._begin()

    def _begin(self, step: int = 0) -> None:
        self.detector: SpikeDetector = SpikeDetector()
        self._seen = 0  # steps observed
        self._last = step  # the last of them
        self._missed = 0
        self._nan_since: int | None = None  # Trainer's running loss is NaN from this step on

    @property
    def events(self) -> tuple[Event, ...]:
        """Spikes so far, in the order of their onsets."""
        return self.detector.events

    def report(self) -> str:
        """What was seen, a line for each event."""
        events = self.events
        count = f"{len(events)} event{'' if len(events) == 1 else 's'}" if events else "no spike"
        lines = [f"{count} in {self._seen:,} steps, the first {WARMUP} of which only make the baseline"]
        lines += [f"  {event}" for event in events]
        if self._missed:
            lines.append(f"  not seen: {self._missed:,} steps whose loss was not logged")
        if self._nan_since is not None:
            lines.append(f"  losses after step {self._nan_since} are not known: Trainer's running loss stays NaN")
        return "\n".join(lines)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Makes sure that every loss is logged; goes on from a checkpoint."""
        if state.global_step == 0:
            self._begin()
        else:
            self._resume(state)
        changed = []
        if args.logging_strategy != IntervalStrategy.STEPS or state.logging_steps != 1:
            args.logging_strategy, args.logging_steps, state.logging_steps = IntervalStrategy.STEPS, 1, 1
            changed.append("logging_steps=1")
        if args.logging_nan_inf_filter:
            args.logging_nan_inf_filter = False
            changed.append("logging_nan_inf_filter=False")
        if changed and state.is_world_process_zero:
            _log.warning("SpikeMonitor has set %s: it needs every step's loss, NaN too", " and ".join(changed))
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> TrainerControl:
        """Observes a step."""
        if logs is None or "loss" not in logs:
            return control  # an evaluation, or the summary at the end
        step, loss, norm = state.global_step, float(logs["loss"]), logs.get("grad_norm")
        known: float | None = loss
        if self._nan_since is not None and norm is not None and not math.isfinite(loss):
            known = None
        elif not math.isfinite(loss):
            self._nan_since = step
        if args.fp16 and math.isfinite(loss) and norm is not None and not math.isfinite(norm):
            norm = None
        before, self.detector = self.detector, self.detector.observe(step, known, norm)
        self._missed += step - self._last - 1
        self._seen, self._last = self._seen + 1, step
        for event in news(before, self.detector):
            if state.is_world_process_zero:
                _log.warning("%s", event)
        if self.on_spike == "stop" and set(self.detector.flags) - {"gradient_norm"}:
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Says what was not seen."""
        self._missed += state.global_step - self._last
        self._last = state.global_step
        if self._missed and state.is_world_process_zero:
            _log.warning("SpikeMonitor has not seen %d steps: their loss was not logged", self._missed)
        return control

    def state(self) -> dict[str, Any]:
        """What Trainer writes to ``trainer_state.json``."""
        names = ("_seen", "_last", "_missed", "_nan_since")
        attributes = {"_saved": self.detector.to_dict(), **{name: getattr(self, name) for name in names}}
        return {"args": {"on_spike": self.on_spike}, "attributes": attributes}

    def _resume(self, state: TrainerState) -> None:
        """Go on from a checkpoint's state; one that was written without a monitor begins here."""
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name)
        if isinstance(saved, list):
            raise Refused(
                what=f"{len(saved)} monitors",
                where="Trainer's callbacks",
                why="the checkpoint does not say whose state is whose",
                remedy="give Trainer one SpikeMonitor",
            )
        if saved is None:
            self._begin(state.global_step)
            state.stateful_callbacks[name] = self.state()  # Trainer updates, but does not add, entries when it saves
            return
        for attribute, value in saved["attributes"].items():
            setattr(self, attribute, value)

    @property
    def _saved(self) -> dict[str, Any]:
        return self.detector.to_dict()

    @_saved.setter
    def _saved(self, data: dict[str, Any]) -> None:
        self.detector = SpikeDetector.from_dict(data)
