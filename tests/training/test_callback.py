"""The monitor in real ``Trainer`` runs of a tiny GPT-2."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from spikepatch import Refused, SpikeMonitor
from tests.spikes.curves import flat, ramp

pytestmark = pytest.mark.slow  # processes, trainings, or models at full size

STEPS, BAD, BATCH, LENGTH = 64, 50, 8, 16


class Counting(IterableDataset[dict[str, torch.Tensor]]):
    """Sequences that count, from a token and by a stride of their own, so they are soon learned; ``bad`` replaces the
    batch of step ``BAD``: by random tokens, or by one without any target, whose loss is 0 / 0 and
    whose gradient is 0."""

    def __init__(self, bad: str = "") -> None:
        self.bad = bad

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        draw = torch.Generator().manual_seed(0)
        for step in range(1, STEPS + 1):
            for _ in range(BATCH):
                start, stride = torch.randint(0, 32, (2,), generator=draw).tolist()
                tokens = (start + (1 + stride % 2) * torch.arange(LENGTH)) % 32
                if step == BAD and self.bad == "random":
                    tokens = torch.randint(0, 32, (LENGTH,), generator=draw)
                labels = torch.full_like(tokens, -100) if step == BAD and self.bad == "empty" else tokens
                yield {"input_ids": tokens, "labels": labels}


class Breaking(TrainerCallback):  # type: ignore[misc]
    """One weight becomes NaN before step ``BAD``."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == BAD - 1:
            model.transformer.wte.weight.data[0, 0] = math.nan


def trainer(folder: Path, bad: str, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=LENGTH, vocab_size=32, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    settings: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 1e-2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 0, **arguments,
    }  # fmt: skip
    return Trainer(
        model, TrainingArguments(str(folder), **settings), train_dataset=Counting(bad), callbacks=[*callbacks]
    )


def test_a_bad_batch_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = SpikeMonitor()
    run = trainer(tmp_path, "random", monitor)
    with caplog.at_level(logging.WARNING, logger="spikepatch"):
        run.train()
    assert run.state.global_step == STEPS
    event = next(e for e in monitor.events if e.kind == "loss")
    assert event.onset == BAD
    losses = {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}
    assert len(losses) == STEPS
    assert event.value == max(losses[step] for step in range(BAD, BAD + event.duration))
    assert f"step {BAD}: the loss rose from" in monitor.report()
    assert f"step {BAD}: the loss rose from" in caplog.text
    assert "set logging_steps=1 and logging_nan_inf_filter=False" in caplog.text


def test_a_run_without_one_is_free_of_events(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = SpikeMonitor()
    run = trainer(tmp_path, "", monitor, logging_steps=1, logging_nan_inf_filter=False)
    with caplog.at_level(logging.WARNING, logger="spikepatch"):
        run.train()
    assert monitor.events == ()
    assert monitor.report() == f"no spike in {STEPS} steps, the first 8 of which only make the baseline"
    assert "SpikeMonitor" not in caplog.text
    state = monitor.detector
    assert len(state.loss.baseline[0].values) == len(state.gradient_norm.baseline[0].values) == STEPS
    run.train()  # anew
    assert len(monitor.detector.loss.baseline[0].values) == STEPS


def test_stop(tmp_path: Path) -> None:
    monitor = SpikeMonitor(on_spike="stop")
    run = trainer(tmp_path, "random", monitor, logging_strategy="no")
    run.train()
    assert run.state.global_step == BAD
    assert {e.onset for e in monitor.events} == {BAD}


@pytest.mark.parametrize("height", [3.0, 11.0])
def test_a_slow_rise_stops_the_training(height: float, tmp_path: Path) -> None:
    """By what Trainer would log, over 800 steps."""
    monitor, control = SpikeMonitor(on_spike="stop"), TrainerControl()
    state, arguments = TrainerState(), TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    for step, loss in enumerate((flat(1500) + ramp(1500, 500, 800, height)).tolist(), start=1):
        state.global_step = step
        monitor.on_log(arguments, state, control, {"loss": loss, "grad_norm": 1.0})
        if control.should_training_stop:
            break
    assert 500 < step < 700
    assert "not back yet" in monitor.report()


def test_a_nan_that_breaks_the_weights(tmp_path: Path) -> None:
    monitor = SpikeMonitor()
    trainer(tmp_path, "", monitor, Breaking()).train()
    (event,) = monitor.events
    assert (event.kind, event.onset, event.back) == ("nonfinite", BAD, None)
    assert event.duration == STEPS - BAD + 1
    assert f"up for {event.duration} steps, not back yet" in monitor.report()


def test_a_nan_that_the_run_survives(tmp_path: Path) -> None:
    """Trainer's running loss stays NaN all the same; the gradient norm shows that the steps are finite."""
    monitor = SpikeMonitor()
    run = trainer(tmp_path, "empty", monitor)
    run.train()
    assert math.isnan(run.state.log_history[-2]["loss"])
    assert all(p.isfinite().all() for p in run.model.parameters())
    (event,) = monitor.events
    assert (event.kind, event.onset, event.duration, event.back) == ("nonfinite", BAD, 1, BAD + 1)
    assert f"losses after step {BAD} are not known" in monitor.report()


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_goes_on_with_the_same_state(tmp_path: Path, restore: bool) -> None:
    """Saved in the middle of an event, too."""
    save = {"save_strategy": "steps", "save_steps": BAD // 2, "restore_callback_states_from_checkpoint": restore}
    whole = SpikeMonitor()
    trainer(tmp_path, "random", whole, **save).train()
    for step in (BAD // 2, BAD):
        state = json.loads((tmp_path / f"checkpoint-{step}/trainer_state.json").read_text())
        assert state["stateful_callbacks"]["SpikeMonitor"]["attributes"]["_seen"] == step
        again = trainer(tmp_path / "again", "random", SpikeMonitor(), **save)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        (monitor,) = (c for c in again.callback_handler.callbacks if isinstance(c, SpikeMonitor))
        assert monitor.detector == whole.detector
        assert monitor.report() == whole.report()
    assert whole.events


def test_a_run_that_began_without_a_monitor(tmp_path: Path) -> None:
    save = {"save_strategy": "steps", "save_steps": 16}
    trainer(tmp_path, "random", **save).train()
    monitor = SpikeMonitor()
    again = trainer(tmp_path, "random", monitor, **save)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert "in 48 steps" in monitor.report()
    assert "not seen" not in monitor.report()
    assert BAD in {e.onset for e in monitor.events}
    state = json.loads((tmp_path / f"checkpoint-{STEPS}/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["SpikeMonitor"]["attributes"]["_seen"] == 48


class Silent(TrainerCallback):  # type: ignore[misc]
    """Forbids logging at some steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_log &= state.global_step % 10 != 0
        return control


def test_steps_that_another_callback_hides_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = SpikeMonitor()
    with caplog.at_level(logging.WARNING, logger="spikepatch"):
        trainer(tmp_path, "", monitor, Silent()).train()
    hidden = STEPS // 10
    assert f"not seen: {hidden} steps whose loss was not logged" in monitor.report()
    assert f"has not seen {hidden} steps" in caplog.text


def test_an_unknown_action_is_refused() -> None:
    with pytest.raises(Refused, match='"log" or "stop"'):
        SpikeMonitor(on_spike="rewind")  # type: ignore[arg-type]
