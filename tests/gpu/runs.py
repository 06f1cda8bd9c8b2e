"""(d) The regime of spikes in bf16, arms and seeds side by side; (e) a run that is killed, and gone on with."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GPT2Config

import spikepatch
from spikepatch.training.log import begun, read
from spikepatch.training.verdict import judge_run
from tests.gpu.measuring import Budget, Finding, Place

#: As a model of width 2304 would have it; see docs/results.md.
_VANILLA_2304 = """name = "vanilla-2304"
large_shortcut = false
[[transform]]
kind = "small_init"
[[transform]]
kind = "residual_init"
[[transform]]
kind = "embed_scale"
factor = 0.08333333333
positions = true
"""


def _train(cpu: bool, threads: int, options: dict[str, Any]) -> None:
    """In a process of its own."""
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(threads)
    spikepatch.train(**options)


def _process(place: Place, options: dict[str, Any]) -> Any:
    """Forked on a CPU, where nothing stands against it, since that is soon begun."""
    context: Any = multiprocessing.get_context("spawn" if place.cuda else "fork")
    process = context.Process(target=_train, args=(not place.cuda, 1, options))
    process.start()
    return process


def spikes(place: Place, budget: Budget) -> Iterator[Finding]:
    """What has come of every run when the time is over; whole runs are of 1,500 steps."""
    folder = place.folder / "spikes"
    folder.mkdir()
    (folder / "vanilla-2304.toml").write_text(_VANILLA_2304)
    noise = random.Random(0)
    (folder / "digits.txt").write_text("".join(noise.choices("0123456789abcdef", k=4000 if place.tiny else 400_000)))
    GPT2Config(
        n_layer=2 if place.tiny else 32, n_embd=16, n_head=1, n_positions=32, vocab_size=257, bos_token_id=256,
        eos_token_id=256, tie_word_embeddings=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ).save_pretrained(folder / "deep")  # fmt: skip
    arms = {"vanilla-2304": str(folder / "vanilla-2304.toml"), "scaled-embed": "scaled-embed"}
    seeds = (0,) if place.tiny else (0, 1, 2, 3)
    processes = [
        _process(
            place,
            {
                "models": f"{arm}={folder}/deep@{recipe}", "data": str(folder / "digits.txt"),
                "out": folder / f"{arm}-{seed}", "steps": 6 if place.tiny else 1500, "lr": 3e-3, "seeds": [seed],
                "seq_len": 32, "batch_tokens": 128, "warmup": 2 if place.tiny else 20, "schedule": "constant",
                "checkpoint_every": 0, "watch_every": 0, "precision": "bf16",
            },
        )
        for arm, recipe in arms.items()
        for seed in seeds
    ]  # fmt: skip
    for process in processes:
        process.join(max(budget.left - 5, 0.1))
        if process.is_alive():
            process.kill()
            process.join()
    for arm in arms:
        logs = [read(log) for log in sorted(folder.glob(f"{arm}-*/*/*/log.jsonl")) if begun(log)]
        results = [judge_run(log) for log in logs]
        steps = [log.steps[-1].step for log in logs if log.steps]
        ok = bool(steps) and (not place.tiny or steps == [6])
        verdicts = ", ".join(result.verdict for result in results)
        said = f"{len(results)} runs, {min(steps, default=0)} to {max(steps, default=0)} steps: {verdicts}"
        yield Finding("d", f"{arm}, bf16, {len(seeds)} seeds", said, ok, {"steps": steps, "verdicts": verdicts})


def kills(place: Place, budget: Budget) -> Iterator[Finding]:
    """The first loss after the checkpoint is computed from the same weights and batch as in a run that was not killed;
    what comes later may differ where the device adds in no fixed order.
    """
    folder = place.folder / "kills"
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2} if place.tiny else {"n_embd": 256, "n_layer": 8, "n_head": 8}
    GPT2Config(**size, n_positions=64, vocab_size=256, bos_token_id=0, eos_token_id=0).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(f"{i} squared is {i * i}" for i in range(3000)))
    steps, every = (12, 3) if place.tiny else (200, 50)
    options: dict[str, Any] = {
        "models": f"a={folder}/model@scaled-embed", "data": str(folder / "text.txt"), "steps": steps, "lr": 1e-3,
        "seq_len": 32, "batch_tokens": 256, "checkpoint_every": every, "watch_every": 0, "precision": "bf16",
    }  # fmt: skip
    whole, killed = folder / "whole", folder / "killed"
    beside, process = (_process(place, options | {"out": out}) for out in (whole, killed))
    store = killed / "a/lr1e-3-seed0/checkpoints"
    while process.is_alive() and not list(store.glob("step-*")) and budget.left > 0:
        time.sleep(0.001)
    process.kill()
    process.join()
    beside.join(max(budget.left, 0.1))
    at = max((int(path.name.removeprefix("step-")) for path in store.glob("step-*")), default=0)
    process = _process(place, {"out": killed, "resume": True})
    process.join(max(budget.left, 0.1))
    for late in (beside, process):
        late.kill()
    losses = [[step.loss for step in read(out / "a/lr1e-3-seed0/log.jsonl").kept] for out in (whole, killed)]
    yield _compared(losses, at, steps)


def _compared(losses: list[list[float | None]], at: int, steps: int) -> Finding:
    one, other = losses
    complete = len(one) == len(other) == steps
    gaps = [abs((a or 0) - (b or 0)) for a, b in zip(one, other, strict=False)]
    first = gaps[at] if len(gaps) > at else float("nan")
    same, largest = complete and not any(gaps), max(gaps, default=0)
    said = f"{len(other)} of {steps} steps, killed after step {at}; "
    said += "all losses equal" if same else f"next loss differs by {first:.1e}, any by at most {largest:.1e}"
    ok = complete and at > 0 and first <= 2.0**-8 * abs(one[at] or 0 if at < len(one) else 0)
    return Finding("e", "kill and resume, bf16", said, ok, {"equal": same, "largest": largest})
