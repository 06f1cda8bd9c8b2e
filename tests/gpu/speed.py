"""(c) `train` at 350 M parameters and 1,024 tokens: tokens per second and memory, beside a bare loop and `Trainer`."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from spikepatch.plans.optimiser import param_groups
from spikepatch.residual.points import points_of
from spikepatch.source.private import forget_accelerators
from spikepatch.training.batches import batch
from spikepatch.training.loop import train
from spikepatch.training.settings import Settings
from spikepatch.training.tokens import Tokens
from tests.gpu.measuring import Budget, Finding, Place, peak_of


@dataclasses.dataclass(frozen=True)
class Size:
    sizes: Mapping[str, int]
    sequences: int
    length: int
    warm: int
    steps: int


#: GPT-2 medium.
_LARGE = Size({"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024}, 8, 1024, 5, 25)
_TINY = Size({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 256}, 2, 32, 1, 3)

#: Seconds that a variant may need: the next one is left out when less is there.
_NEEDED, _NEEDED_TO_COMPILE = 10.0, 75.0

Done = Callable[[], None]


def speeds(place: Place, budget: Budget) -> Iterator[Finding]:
    size = _TINY if place.tiny else _LARGE
    config = AutoConfig.for_model(
        "gpt2", **size.sizes, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    tokens = _tokens(place, size, config.vocab_size)
    peak, found = peak_of(place.device), dict[str, float]()
    for name, loop, options in _variants(place):
        if budget.left < (_NEEDED_TO_COMPILE if options.get("compile") and not place.tiny else _NEEDED):
            yield Finding("c", name, "left out: no time for it", None)
            continue
        place.forget()
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config)
        stamps: list[float] = []

        def done(stamps: list[float] = stamps) -> None:
            if len(stamps) in (size.warm - 1, size.steps + size.warm - 1):
                place.wait()
            stamps.append(time.perf_counter())

        own = place.folder / name.replace(" ", "-").replace(",", "")
        own.mkdir()
        loop(model, tokens, own, size, place, done, **options)
        seconds = stamps[size.steps + size.warm - 1] - stamps[size.warm - 1]
        rate = size.steps * size.sequences * size.length / seconds
        found[name] = rate
        values: dict[str, Any] = {"tokens_per_second": rate, "peak_gib": place.peak()}
        said = [f"{rate:,.0f} tokens/s"]
        if peak is not None:
            values["share_of_peak"] = rate * _flops_of_a_token(model, size) / peak
            said.append(f"{values['share_of_peak']:.1%} of the bf16 peak")
        if place.cuda:
            said.append(f"{place.peak():.2f} GiB")
        for rival in ("bare loop, bf16", "Trainer, bf16"):
            if name == "train, bf16" and rival in found:
                values[f"of {rival}"] = rate / found[rival]
                said.append(f"{rate / found[rival]:.3f} of the {rival.partition(',')[0]}'s")
        yield Finding("c", name, ", ".join(said), True, values)
        del model


def _variants(place: Place) -> Iterator[tuple[str, Callable[..., None], dict[str, Any]]]:
    yield "bare loop, bf16", bare, {}
    yield "Trainer, bf16", trainer, {}
    yield "train, bf16", harness, {"precision": "bf16"}
    if place.cuda:  # on a CPU it is refused
        yield "train, fp16", harness, {"precision": "fp16"}
    yield "train, bf16, activation checkpointing", harness, {"precision": "bf16", "activation_checkpointing": True}
    yield "train, bf16, FSDP2 with one rank", sharded, {"precision": "bf16"}
    if not place.tiny:  # a compiler of C++ is not everywhere
        yield "train, bf16, compiled", harness, {"precision": "bf16", "compile": True, "watch_every": 0}


def _tokens(place: Place, size: Size, vocabulary: int) -> Tokens:
    path, count = place.folder / "tokens.bin", 4 * size.sequences * size.length * (size.steps + size.warm + 2)
    np.random.default_rng(0).integers(0, vocabulary, count, dtype=np.uint16).tofile(path)
    return Tokens(path, count, "uint16", 1, "", vocabulary, size.length + 1)


def _flops_of_a_token(model: Any, size: Size) -> float:
    """Forward and backward (PaLM, appendix B): 6 of each parameter that is multiplied with, and attention's."""
    config = model.config
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and ".wpe." not in name)
    return float(6 * matrices + 12 * config.n_layer * config.n_embd * size.length)


def harness(
    model: Any, tokens: Tokens, folder: Path, size: Size, place: Place, done: Done, *, shard: bool = False,
    **options: Any,
) -> None:  # fmt: skip
    """With all that the command has on: measurements inside the model, the detector, the log."""
    steps = size.warm + size.steps
    settings = Settings(
        steps, batch_tokens=size.sequences * size.length, seq_len=size.length, checkpoint_every=0, **options
    )
    about: dict[str, Any] = {
        "name": "a", "source": "a", "recipe": None, "patched": False, "lr": 1e-4, "multiplier": 1.0, "seed": 0,
        "steps": steps, "parameters": 1, "versions": {}, "command": "",
    }  # fmt: skip

    def progress(record: Mapping[str, Any]) -> None:
        if record["type"] == "step":
            done()

    points = points_of(model)
    if shard:
        model.to(place.device)
    accelerator = Accelerator(cpu=not place.cuda, mixed_precision=settings.precision, dynamo_backend="no")
    try:
        train(
            model, tokens, settings, folder, accelerator=accelerator, lr=1e-4, seed=0, about=about,
            points=points, shard=shard, progress=progress,
        )  # fmt: skip
    finally:
        forget_accelerators()


def sharded(model: Any, tokens: Tokens, folder: Path, size: Size, place: Place, done: Done, **options: Any) -> None:
    """All that FSDP2 does but to talk to others."""
    with _one_rank(place, folder):
        harness(model, tokens, folder, size, place, done, shard=True, **options)


@contextlib.contextmanager
def _one_rank(place: Place, folder: Path) -> Iterator[None]:
    backend = "nccl" if place.cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def bare(model: Any, tokens: Tokens, folder: Path, size: Size, place: Place, done: Done) -> None:
    """What one writes by hand, which reads the loss at each step."""
    model.to(place.device).train()
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-4, betas=(0.9, 0.95), fused=True)
    kind = "cuda" if place.cuda else "cpu"
    for index in range(size.warm + size.steps):
        rows = torch.from_numpy(batch(tokens, seed=0, index=index, sequences=size.sequences, length=size.length))
        rows = rows.to(place.device, non_blocking=True)
        with torch.autocast(kind, torch.bfloat16):
            logits = model(rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        done()


def trainer(model: Any, tokens: Tokens, folder: Path, size: Size, place: Place, done: Done) -> None:
    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            done()

    steps = size.warm + size.steps
    batches = [batch(tokens, seed=0, index=i, sequences=size.sequences, length=size.length) for i in range(steps)]
    examples = [{"input_ids": row, "labels": row} for rows in batches for row in torch.from_numpy(rows[:, :-1].copy())]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=size.sequences, use_cpu=not place.cuda,
        report_to="none", save_strategy="no", logging_strategy="no", optim="adamw_torch_fused", learning_rate=1e-4,
        weight_decay=0.1, adam_beta2=0.95, disable_tqdm=True, bf16=True, dataloader_pin_memory=place.cuda,
    )  # fmt: skip
    rival = Trainer(model, arguments, train_dataset=examples, callbacks=[Watch()])
    rival.remove_callback(PrinterCallback)
    rival.train()
    forget_accelerators()
