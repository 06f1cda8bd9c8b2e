"""The training loop: one model, one learning rate, one seed, from the first step to the last.

On accelerate, which brings the device, the process group, mixed precision and DistributedDataParallel; sharding is
``fully_shard`` (FSDP2) on every layer that the residual map names. What decides anything (loss, gradient norm) is
reduced over all ranks first, so that every rank decides alike, and is read by the host once a step.

Legend: B sequences in this rank's share of a batch, T tokens in each, V the vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel, get_scheduler

from spikepatch.apply.values.draw import narrow
from spikepatch.plans.optimiser import param_groups
from spikepatch.quiet import quiet
from spikepatch.residual.points import Points, watching
from spikepatch.spikes.detector import SpikeDetector, news
from spikepatch.training import checkpoints
from spikepatch.training.batches import batch, held_out_batches
from spikepatch.training.gradients import gradient_norms, whole
from spikepatch.training.log import Reporter, open_log, read
from spikepatch.training.position import Position, restored
from spikepatch.training.resets import IGNORED, counted, positions, targets
from spikepatch.training.settings import Settings
from spikepatch.training.tokens import Tokens

Loss = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

#: After so many returns to a checkpoint a run ends: what it meets is no bad batch.
MAX_REWINDS = 10

#: After so many steps in a row that did not change the weights a run ends: the next ones will not either.
MAX_IDLE = 100

#: transformers' name of each schedule.
_SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}

#: The last part of a wsd schedule falls to zero, linearly (Hägele et al. 2024, arXiv 2405.18392: 10 to 20 %).
_DECAY = 0.2


def train(
    model: PreTrainedModel,
    tokens: Tokens,
    settings: Settings,
    folder: Path,
    *,
    accelerator: Accelerator,
    lr: float,
    seed: int,
    about: Mapping[str, Any],
    points: Points,
    shard: bool = False,
    progress: Reporter = lambda record: None,
) -> str | None:
    """Train ``model`` in place; ``folder`` gets ``log.jsonl`` and ``checkpoints/``. Called on every rank alike.

    Where ``folder`` holds a checkpoint already, the run goes on from the last one.

    AdamW on ``spikepatch.param_groups``; the mean cross-entropy of the next token over the whole batch, in float32,
    whatever the precision of the forward pass. Batches are a pure function of ``seed`` and step.

    Args:
        model: float32 weights on the CPU, the same on every rank.
        lr: the largest of the schedule.
        about: the first line of the log: name, source, versions ...
        points: ``points_of(model)``.
        shard: with ``fully_shard``, layer by layer, instead of a copy on each rank.
        progress: is called with every record of the log, on the main process; and while it evaluates, with
            ``{"type": "evaluating", "step": ..., "done": ..., "total": ...}``, in tokens, which is not in the log.

    Returns:
        Why it ended before its last step, if it did; so says the log.
    """
    device, rank, ranks = accelerator.device, accelerator.process_index, accelerator.num_processes
    share = settings.sequences // ranks  # B
    micro = settings.micro_batch or share

    # The model where it is trained, and what trains it. Sharding makes new parameters, so the optimiser comes after it.
    for seed_generator, bits in ((torch.manual_seed, 64), (np.random.seed, 32), (random.seed, 64)):
        seed_generator(narrow(seed + rank, bits))  # of dropout; batches have their own
    model.train()
    if settings.activation_checkpointing:
        with quiet():  # of its newer name, which older versions of transformers do not have
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.compile:
        model.compile()
    wrapped = _sharded(model, points, settings) if shard else accelerator.prepare(model)
    parameters = list(model.parameters())
    scaler: torch.amp.GradScaler | None = accelerator.scaler
    groups = param_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=settings.betas, eps=1e-8, fused=True)
    factor = _schedule(optimizer, settings)
    eos = tokens.eos if settings.reset_positions else None
    loss_of = _loss(wrapped, model, settings, eos)

    # Where to begin: at the last checkpoint, or with the first step.
    store = folder / "checkpoints"
    at, detector, written = Position(), SpikeDetector(), None
    saved = checkpoints.latest(store)
    if saved is not None:
        at, detector, written = restored(saved, checkpoints.load(saved, model, optimizer), scaler)
    main = accelerator.is_main_process
    with open_log(folder / "log.jsonl", resume_at=written) if main else contextlib.nullcontext() as log:

        def write(record: Mapping[str, Any]) -> None:
            if log is not None:
                progress(log.write(record))

        def evaluating(done: int, total: int) -> None:
            if log is not None:
                progress({"type": "evaluating", "step": settings.steps, "done": done, "total": total})

        def save() -> None:
            state = {
                "position": dataclasses.asdict(at),
                "detector": detector.to_dict(),
                "log": log.position() if log is not None else None,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            checkpoints.save(store, at.step, model, optimizer, state)

        if saved is None:
            parts = {"points": [p.module for p in points.streams], "layers": points.layers, "notes": points.notes}
            write({"type": "run", **about, "warmup_steps": settings.warmup_steps, **parts})
            if settings.on_spike == "rewind":
                save()
        elif log is not None:
            begun = read(folder / "log.jsonl").run
            progress({"type": "run", **dataclasses.asdict(begun) | {"steps": settings.steps}})
            if begun.steps != settings.steps:
                write({"type": "steps", "step": at.step, "steps": settings.steps})

        stop: str | None = None
        while at.step < settings.steps:
            started = time.perf_counter()
            step, index = at.step + 1, at.step + at.shift
            for group in optimizer.param_groups:
                group["lr"] = lr * factor(step - 1)

            # Forward and backward; the gradients of the micro-batches add up to those of the whole batch's mean loss.
            sizes = {"sequences": settings.sequences, "length": settings.seq_len, "rank": rank, "ranks": ranks}
            rows = torch.from_numpy(batch(tokens, seed=seed, index=index, **sizes))
            all_targets = share * settings.seq_len
            if eos is not None:  # documents end at other places on other ranks
                all_targets = (
                    counted(batch(tokens, seed=seed, index=index, **sizes | {"rank": 0, "ranks": 1}), eos) / ranks
                )
            rows = rows.to(device, non_blocking=True)  # (B, T + 1)
            loss = torch.zeros((), device=device)
            every = settings.watch_every
            watched = bool(every and points.layers) and step % every == 1 % every
            streams: dict[str, torch.Tensor] = {}
            for first in range(0, share, micro):
                part = rows[first : first + micro]
                part_of = len(part) / share if eos is None else counted(part, eos) / all_targets
                whole_batch = first + micro >= share
                with contextlib.nullcontext() if whole_batch else accelerator.no_sync(wrapped):
                    with watching(model, points, streams) if watched and not first else contextlib.nullcontext():
                        entropy, objective = loss_of(part)
                    scaled = objective * part_of if scaler is None else scaler.scale(objective * part_of)
                    scaled.backward()
                loss += entropy.detach() * part_of

            # Two numbers, the same on every rank, before anything is changed; the only wait for the device in a step.
            if scaler is not None:
                scaler.unscale_(optimizer)
            total = get_total_norm([p.grad for p in parameters if p.grad is not None])
            value, norm = accelerator.reduce(torch.stack([loss, whole(total)]), reduction="mean").tolist()

            # In fp16 such a norm with a finite loss says that the loss was scaled too much, which the scaler mends.
            finite = math.isfinite(value) and math.isfinite(norm)
            overflow = scaler is not None and math.isfinite(value) and not finite
            before, detector = detector, detector.observe(step, value, None if overflow else norm)
            # Most events of the gradient norm leave no trace in the loss: one step less is all that they are worth.
            decisive = detector.flags if settings.on_spike == "skip" else {*detector.flags} - {"gradient_norm"}
            flagged = bool(decisive)
            applied = finite and not (flagged and settings.on_spike != "log")
            if watched:
                layers = gradient_norms(model, points)
            if applied:
                if 0 < settings.grad_clip < norm:
                    clip_grads_with_norm_(parameters, settings.grad_clip, total)
                optimizer.step()
            if scaler is not None:
                scaler.update()
            optimizer.zero_grad(set_to_none=True)

            trained = at.tokens + applied * settings.sequences * settings.seq_len
            at = dataclasses.replace(at, step=step, idle=0 if applied else at.idle + 1, tokens=trained)
            seconds = time.perf_counter() - started
            flags = (*detector.flags, "overflow") if overflow else detector.flags
            write(
                {
                    "type": "step", "step": step, "batch": index, "loss": value, "gradient_norm": norm,
                    "lr": optimizer.param_groups[0]["lr"], "tokens": trained, "seconds": seconds,
                    "applied": applied, "flags": flags,
                }
            )  # fmt: skip
            for event in news(before, detector):
                write({"type": "event", "step": step, **dataclasses.asdict(event)})
            if watched:
                stds = accelerator.reduce(torch.stack([streams[p.module] for p in points.streams]), reduction="mean")
                write({"type": "layers", "step": step, "stream": stds.tolist(), "gradients": layers.tolist()})

            # What a spike leads to.
            if flagged and settings.on_spike == "stop":
                stop = f"a spike ({', '.join(detector.flags)})"
            elif flagged and settings.on_spike == "rewind" and at.rewinds == MAX_REWINDS:
                stop = f"a spike after {MAX_REWINDS} rewinds"
            elif flagged and settings.on_spike == "rewind":
                onset = min(event.onset for event in detector.up if event.kind != "gradient_norm")
                good = checkpoints.latest(store, before=onset)
                assert good is not None, "there is one at step 0"
                to, detector, _ = restored(good, checkpoints.load(good, model, optimizer), scaler)
                checkpoints.drop(store, after=to.step)
                write({"type": "rewind", "step": step, "to": to.step, "skipped": (to.step + at.shift, index)})
                at = dataclasses.replace(to, shift=at.shift + step - to.step, rewinds=at.rewinds + 1)
                continue
            elif at.idle == MAX_IDLE:
                stop = f"{MAX_IDLE} steps in a row that did not change the weights"
            if stop is not None:
                write({"type": "stop", "step": step, "why": stop})
                break
            if settings.checkpoint_every and step % settings.checkpoint_every == 0:
                save()
        else:
            held_out = evaluate(model, loss_of, tokens, settings, accelerator, evaluating)
            write({"type": "eval", "step": at.step, "loss": held_out})
    return stop


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss_of: Loss,
    tokens: Tokens,
    settings: Settings,
    accelerator: Accelerator,
    report: Callable[[int, int], None],
) -> float | None:
    """Mean cross-entropy on all held-out tokens, the same on every rank; None where there are none.

    Every rank runs as many forward passes as the others, since sharded ones wait for each other. ``report`` is told
    how many tokens are done, and how many there are.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    sequences = settings.micro_batch or settings.sequences // ranks
    batches = list(held_out_batches(tokens, sequences=sequences, length=settings.seq_len))
    total = count = 0.0
    model.eval()
    sizes = [rows[:, 1:].size for rows in batches]
    done, held_out = 0, sum(sizes)
    for first in range(0, len(batches), ranks):
        report(done, held_out)
        done += sum(sizes[first : first + ranks])
        rows = torch.from_numpy(batches[min(first + rank, len(batches) - 1)])
        entropy, _ = loss_of(rows.to(accelerator.device))
        if first + rank < len(batches) and (size := counted(rows, tokens.eos if settings.reset_positions else None)):
            total += entropy.item() * size
            count += size
    model.train()
    total, count = accelerator.reduce(torch.tensor([total, count], device=accelerator.device)).tolist()
    return total / count if count else None


def _loss(wrapped: nn.Module, model: PreTrainedModel, settings: Settings, eos: int | None) -> Loss:
    """A function of rows of T + 1 tokens: their mean cross-entropy, and what is trained on.

    That is with the z-loss, and with the load-balancing loss of a mixture of experts, where its config asks for it.
    With ``eos`` documents are kept apart, see ``resets.py``.
    """
    # A cache is of use when text is generated.
    cache = {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}
    balance = getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)

    def loss_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        apart = {} if eos is None else {"position_ids": positions(rows[:, :-1], eos)}
        output = wrapped(input_ids=rows[:, :-1], **cache, **apart)
        logits = output.logits.float().flatten(0, 1)  # (B T, V)
        if eos is None:
            entropy = objective = F.cross_entropy(logits, rows[:, 1:].flatten())
        else:
            wanted = targets(rows, eos).flatten()  # it may have no target at all
            total = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
            entropy = objective = total / (wanted != IGNORED).sum().clamp(min=1)
        if settings.z_loss:
            objective = objective + settings.z_loss * logits.logsumexp(-1).pow(2).mean()
        if getattr(output, "aux_loss", None) is not None:
            objective = objective + balance * output.aux_loss
        return entropy, objective

    return loss_of


def _sharded(model: nn.Module, points: Points, settings: Settings) -> nn.Module:
    """FSDP2: every layer is a unit, the root holds the rest. Gradients are summed in float32."""
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for path in points.layers:
        fully_shard(model.get_submodule(path), mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    assert isinstance(model, FSDPModule)
    return model


def _schedule(optimizer: torch.optim.Optimizer, settings: Settings) -> Callable[[int], float]:
    """The factor of the learning rate after so many steps; a pure function, so that nothing of it needs saving."""
    decay = {"num_decay_steps": round(_DECAY * settings.steps), "decay_type": "linear"}
    schedule = get_scheduler(
        _SCHEDULES[settings.schedule],
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=settings.steps,
        scheduler_specific_kwargs=decay if settings.schedule == "wsd" else {},
    )
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor
