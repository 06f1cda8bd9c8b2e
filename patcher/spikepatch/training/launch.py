"""The processes of a run and their devices, as ``accelerate launch`` or ``torchrun`` has started them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, is_bf16_available

from spikepatch.errors import Refused
from spikepatch.source.private import forget_accelerators
from spikepatch.training.settings import Settings


@dataclass(frozen=True)
class Launch:
    """``shard``: every process holds a part of each model (FSDP2), not a copy. ``notes``: what the user should know."""

    accelerator: Accelerator
    shard: bool
    notes: tuple[str, ...]


@contextlib.contextmanager
def launched(settings: Settings) -> Iterator[Launch]:
    """The processes, for as long as the block lasts.

    Sharding is asked for by ``accelerate launch --use_fsdp``, and done by ``fully_shard`` on any device. accelerate
    itself ignores FSDP on a CPU without a word and copies the model, and by default means FSDP1 by it, which flattens
    parameters; so it is not told.

    Raises:
        Refused: the settings are not possible on them.
    """
    _check_launcher()
    cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    _check_precision(settings, cpu)
    fsdp = os.environ.pop("ACCELERATE_USE_FSDP", "")
    ours = not torch.distributed.is_initialized()
    with_buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # not a second copy of all gradients
    try:
        accelerator = Accelerator(
            cpu=cpu, mixed_precision=settings.precision, dynamo_backend="no", kwargs_handlers=[with_buckets]
        )
        ranks = accelerator.num_processes
        shard = fsdp.lower() == "true" and ranks > 1
        _check(settings, ranks, shard)
        yield Launch(accelerator, shard, tuple(_notes(accelerator, fsdp.lower() == "true")))
        accelerator.wait_for_everyone()
    finally:
        if fsdp:
            os.environ["ACCELERATE_USE_FSDP"] = fsdp
        forget_accelerators()
        if ours and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


#: What a launcher sets for its processes -> what it is, which would do nothing here.
_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (accelerate launch --use_deepspeed)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM (accelerate launch --use_megatron_lm)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism config",
}


def _check_launcher() -> None:
    """Refuse launchers whose engine would be left out without a word."""
    found = [
        name for variable, name in _ENGINES.items() if os.environ.get(variable, "").lower() not in ("", "false", "0")
    ]
    if "CROSS_SIZE" in os.environ and "LOCAL_SIZE" in os.environ:  # deepspeed/launcher/launch.py sets both
        found.append("the launcher deepspeed")
    if found:
        raise Refused(
            what="the models cannot be trained by this engine",
            where=found[0],
            why="spikepatch trains by a loop of its own, on copies (DDP) or shards (FSDP2) of the model",
            remedy="accelerate launch --use_fsdp --fsdp_version 2 shards the model, its gradients and the optimiser, as"
            " ZeRO 3 does; torchrun, or accelerate launch --multi_gpu, trains on copies",
        )


def _notes(accelerator: Accelerator, fsdp: bool) -> Iterator[str]:
    ranks, device = accelerator.num_processes, accelerator.device.type
    if fsdp and ranks == 1:
        yield "FSDP was asked for, and there is one process: nothing is sharded"
    elif fsdp and device == "cpu":
        yield "accelerate ignores FSDP on a CPU: spikepatch shards the models itself, by fully_shard over gloo"
    elif fsdp:
        yield f"FSDP2 over {ranks} processes: fully_shard on every layer; other --fsdp options have no effect"
    elif ranks > 1:
        yield f"{ranks} processes on {device}, each with a copy of the model"


def _check_precision(settings: Settings, cpu: bool) -> None:
    if settings.precision == "fp16" and cpu:
        raise Refused(
            what="fp16 cannot be trained in on a CPU",
            where="--precision",
            why="the loss is scaled by what the GPU's kernels find",
            remedy="--precision bf16, or no",
        )
    if settings.precision == "bf16" and not cpu and not is_bf16_available():
        raise Refused(
            what="this GPU has no bf16", where="--precision", why="torch says so", remedy="--precision fp16, or no"
        )


def _check(settings: Settings, ranks: int, shard: bool) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != ranks:
        raise Refused(
            what="the processes do not know of each other",
            where=f"{started} processes",
            why="accelerate does not take this environment for a distributed run",
            remedy="start them with `accelerate launch` or `torchrun`",
        )
    if shard and settings.precision == "fp16":
        raise Refused(
            what="fp16 and sharding do not go together here",
            where="--precision",
            why="whether the scaled gradients overflow would be decided by each process alone",
            remedy="--precision bf16, or no",
        )
    unit = settings.seq_len * ranks
    if settings.batch_tokens % unit or not settings.batch_tokens:
        near = max(round(settings.batch_tokens / unit), 1) * unit
        raise Refused(
            what=f"a batch of {settings.batch_tokens:,} tokens cannot be shared out",
            where="--batch-tokens",
            why=f"each of {ranks} processes has a whole number of sequences of {settings.seq_len} tokens",
            remedy=f"--batch-tokens {near}",
        )
    if settings.warmup_steps >= settings.steps:
        raise Refused(
            what="the warm-up never ends",
            where="--warmup",
            why=f"it is {settings.warmup_steps} steps of {settings.steps}",
            remedy="a smaller --warmup, or more --steps",
        )
