"""Speed and memory of the training loop, printed: ``python -m tests.benchmarks.bench_train [small] [large] [bf16]``.

Targets: tokens per second at least 0.97 of a bare PyTorch loop's and 1.0 of transformers' Trainer's, same model, batch
and precision; a step of a patched model at most 1.01 of the unpatched one's; peak memory at most 1.05 of the bare
loop's; the spike detector at most 0.01 of a step.

Every loop is a process of its own, on one thread, and they take turns, a step each, in another order each round: what
else happens on the machine meets all of them alike. A ratio is the median over rounds of two steps of the same round,
with the quartiles. Time of the processor, which other programs disturb less than that by the clock; both are printed.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click

WARM = 5

Done = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """GPT-2 classes of this size, ``rounds`` steps that count."""

    width: int
    layers: int
    sequences: int
    length: int
    rounds: int
    precision: str = "no"

    @property
    def steps(self) -> int:
        return WARM + self.rounds


SETTINGS = {
    "small": Setting(128, 12, 8, 64, 120),  # of the reproduction of the paper
    "large": Setting(512, 8, 8, 128, 40),
    "bf16": Setting(256, 4, 8, 128, 60, "bf16"),
}

#: The command measures inside the model at one step of so many; the benchmark has a rival that does so at every step.
WATCH_EVERY = 50

#: name -> (loop, recipe)
RIVALS: dict[str, tuple[str, str | None]] = {
    "harness": ("harness", None),
    "bare loop": ("bare", None),
    "Trainer": ("trainer", None),
    "harness, scaled-embed": ("harness", "scaled-embed"),
    "harness, embed-ln": ("harness", "embed-ln"),
    "harness, watching": ("watching", None),
}


def harness(
    model: Any, tokens: Any, folder: Path, setting: Setting, done: Done, *, watch_every: int = 0, points: Any = None
) -> None:
    """With all that the command has on; measurements inside the model are a rival of their own."""
    from accelerate import Accelerator

    from spikepatch.residual.points import Points
    from spikepatch.training.loop import train
    from spikepatch.training.settings import Settings

    about: dict[str, Any] = {
        "name": "a", "source": "a", "recipe": None, "patched": False, "lr": 1e-3, "multiplier": 1.0, "seed": 0,
        "steps": setting.steps, "parameters": 1, "versions": {}, "command": "",
    }  # fmt: skip

    def progress(record: Mapping[str, Any]) -> None:
        if record["type"] == "step":
            done()

    accelerator = Accelerator(cpu=True, mixed_precision=setting.precision)
    precision: Any = setting.precision
    settings = Settings(
        setting.steps, batch_tokens=setting.sequences * setting.length, seq_len=setting.length, checkpoint_every=0,
        watch_every=watch_every, precision=precision,
    )  # fmt: skip
    train(
        model, tokens, settings, folder, accelerator=accelerator, lr=1e-3, seed=0, about=about,
        points=points or Points((), (), setting.width), progress=progress,
    )  # fmt: skip


def watching(model: Any, tokens: Any, folder: Path, setting: Setting, done: Done) -> None:
    from spikepatch.residual.points import points_of

    harness(model, tokens, folder, setting, done, watch_every=1, points=points_of(model))


def bare(model: Any, tokens: Any, folder: Path, setting: Setting, done: Done) -> None:
    """What one writes by hand, with its batches in memory."""
    import torch
    from transformers import get_scheduler

    from spikepatch.plans.optimiser import param_groups

    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-3, betas=(0.9, 0.95), fused=True)
    schedule = get_scheduler("cosine", optimizer, 1, setting.steps)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16")
    for rows in batches(tokens, setting):
        with autocast:
            logits = model(rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        done()


def trainer(model: Any, tokens: Any, folder: Path, setting: Setting, done: Done) -> None:
    """Without a look at the loss, which by default it takes every 500 steps."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            done()

    examples = [{"input_ids": row, "labels": row} for rows in batches(tokens, setting) for row in rows[:, :-1]]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=setting.steps, per_device_train_batch_size=setting.sequences, use_cpu=True,
        report_to="none", save_strategy="no", logging_strategy="no", optim="adamw_torch_fused", learning_rate=1e-3,
        weight_decay=0.1, adam_beta2=0.95, lr_scheduler_type="cosine", warmup_steps=1, disable_tqdm=True,
        dataloader_pin_memory=False, bf16=setting.precision == "bf16",
    )  # fmt: skip
    rival = Trainer(model, arguments, train_dataset=examples, callbacks=[Watch()])
    rival.remove_callback(PrinterCallback)
    rival.train()


def batches(tokens: Any, setting: Setting) -> list[Any]:
    import torch

    from spikepatch.training.batches import batch

    size = {"sequences": setting.sequences, "length": setting.length}
    return [torch.from_numpy(batch(tokens, seed=0, index=i, **size)) for i in range(setting.steps)]


def contend(name: str, setting: Setting, folder: Path, pipe: Connection) -> None:
    """One rival: says how long each step took, and waits for its turn; then, the memory that training took at most."""
    import torch
    import transformers

    from spikepatch.training.entries import build, parse_entries
    from spikepatch.training.loop import train  # noqa: F401 - all imports before memory is measured
    from spikepatch.training.tokens import Tokens

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    loop, recipe = RIVALS[name]
    bytes_ = Tokens(folder / "tokens.bin", (folder / "tokens.bin").stat().st_size // 2, "uint16", 1, "", 2048, 0)
    own = folder / name
    own.mkdir()
    transformers.Trainer, transformers.TrainingArguments  # noqa: B018 - lazy
    before = status("VmRSS")
    (entry,) = parse_entries([f"model={folder / 'config'}" + (f"@{recipe}" if recipe else "")])
    model: Any = build(entry, seed=0)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    started = (0.0, 0.0)

    def done() -> None:
        nonlocal started
        now = time.process_time(), time.perf_counter()
        pipe.send((now[0] - started[0], now[1] - started[1]))
        pipe.recv()
        started = time.process_time(), time.perf_counter()

    pipe.send(None)
    pipe.recv()
    started = time.process_time(), time.perf_counter()
    {"harness": harness, "bare": bare, "trainer": trainer, "watching": watching}[loop](
        model, bytes_, own, setting, done
    )
    pipe.send(status("VmHWM") - before)


def status(field: str) -> float:
    """MiB."""
    (found,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found) / 1024


def race(setting: Setting) -> None:
    import numpy as np
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "gpt2", n_embd=setting.width, n_layer=setting.layers, n_head=setting.width // 32, n_positions=setting.length,
        vocab_size=2048, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder / "config")
        np.random.default_rng(0).integers(0, 2048, 1 << 20, dtype=np.uint16).tofile(folder / "tokens.bin")
        context = multiprocessing.get_context("spawn")
        pipes: dict[str, Any] = {}
        for rival in RIVALS:
            pipes[rival], theirs = context.Pipe()
            context.Process(target=contend, args=(rival, setting, folder, theirs)).start()
            theirs.close()
        for pipe in pipes.values():
            assert pipe.recv() is None
        rounds = []
        for i in range(setting.steps):
            times = {}
            for rival in rotated(list(pipes), i):
                pipes[rival].send("your turn")
                times[rival] = pipes[rival].recv()
            rounds.append(times)
        peaks = {}
        for rival, pipe in pipes.items():
            pipe.send("finish")
            peaks[rival] = pipe.recv()
    show(setting, rounds[WARM:], peaks)


def rotated(names: Sequence[str], by: int) -> list[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]


def show(setting: Setting, rounds: list[dict[str, tuple[float, float]]], peaks: Mapping[str, float]) -> None:
    own = 1e3 * statistics.median(times["harness"][0] for times in rounds)
    size = f"width {setting.width}, {setting.layers} layers, {setting.sequences} x {setting.length} tokens"
    click.echo(f"{size}, precision {setting.precision}, {len(rounds)} rounds; a step of the harness: {own:.1f} ms")
    for one, other, target in (
        ("harness", "bare loop", "tokens per second, target >= 0.97"),
        ("harness", "Trainer", "tokens per second, target >= 1.00"),
        ("harness, scaled-embed", "harness", "time of a step, target <= 1.01"),
        ("harness, embed-ln", "harness", "time of a step"),
    ):
        inverse = target.startswith("tokens")
        found = []
        for clock in (0, 1):
            ratios = [times[one][clock] / times[other][clock] for times in rounds]
            if inverse:
                ratios = [1 / ratio for ratio in ratios]
            low, median, high = statistics.quantiles(ratios, n=4)
            found.append(f"{median:.3f} [{low:.3f}, {high:.3f}]")
        click.echo(f"  {one} / {other}, {target}: {found[0]} of the processor, {found[1]} by the clock")
    watched = statistics.median(times["harness, watching"][0] / times["harness"][0] for times in rounds)
    click.echo(
        f"  a step with measurements inside the model: {watched:.3f} of one without; at one in {WATCH_EVERY}, they add"
        f" {(watched - 1) / WATCH_EVERY:.4f}"
    )
    for rival in ("harness", "Trainer"):
        ratio = peaks[rival] / peaks["bare loop"]
        click.echo(f"  memory, {rival} / bare loop: {ratio:.3f} ({peaks[rival]:.0f} MiB above the imports)")
    seconds = detector_seconds()
    click.echo(f"  the detector: {1e6 * seconds:.0f} us a step, {1e3 * seconds / own:.4f} of a step")


def detector_seconds() -> float:
    """Median time of one observation, once its window is full."""
    import random

    from spikepatch.spikes.detector import SpikeDetector

    noise, detector, found = random.Random(0), SpikeDetector(), []
    for step in range(1, 601):
        start = time.process_time()
        detector = detector.observe(step, 2 + noise.gauss(0, 0.1), 1 + noise.gauss(0, 0.1))
        found.append(time.process_time() - start)
    return statistics.median(found[200:])


def main(words: list[str]) -> None:
    click.echo(f"{os.cpu_count()} cores, one thread")
    for word in words or ["small", "large"]:
        race(SETTINGS[word])


if __name__ == "__main__":
    main(sys.argv[1:])
