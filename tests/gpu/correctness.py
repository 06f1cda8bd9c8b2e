"""(a) The same bits on the device as on the CPU; (b) the same measurements, and how long they take."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import spikepatch
from tests.gpu.measuring import Budget, Finding, Place

#: The size on a device, and the tiny one.
_SIZES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "gpt2": ({}, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 256}),
    "llama": (
        {
            "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
            "vocab_size": 32_000,
        },
        {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 256,
        },
    ),
}  # fmt: skip


def config(model_type: str, place: Place) -> Any:
    sizes = _SIZES[model_type][place.tiny]
    return AutoConfig.for_model(model_type, **sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)


def fills(place: Place, budget: Budget) -> Iterator[Finding]:
    """`patch` on the device, and meta + `initialize` there, against `patch` on the CPU, bit for bit."""
    for model_type in ("gpt2", "llama"):
        for dtype in (torch.float32, torch.bfloat16):
            if budget.left < 0:
                return
            made = config(model_type, place)
            expected: Any = AutoModelForCausalLM.from_config(made, dtype=dtype)
            plan = spikepatch.plan(expected, "scaled-embed", reinit="all", seed=1)
            spikepatch.patch(expected, plan)
            there: Any = AutoModelForCausalLM.from_config(made, dtype=dtype).to(place.device)
            started = time.perf_counter()
            spikepatch.patch(there, plan)
            place.wait()
            seconds = time.perf_counter() - started
            with torch.device("meta"):
                late: Any = AutoModelForCausalLM.from_config(made, dtype=dtype)
            spikepatch.patch(late, plan)
            late.to_empty(device=place.device)
            spikepatch.initialize(late, plan)
            count = sum(p.numel() for p in expected.parameters())
            differing = [
                f"{how}: {name}"
                for how, model in (("patch", there), ("meta + initialize", late))
                for name, value in expected.state_dict().items()
                if not torch.equal(model.state_dict()[name].cpu(), value)
            ]
            what = f"{model_type}, {count / 1e6:.1f} M, {str(dtype).removeprefix('torch.')}: patch, meta + initialize"
            said = ", ".join(differing[:3]) or f"bit-equal to the CPU's; {count / seconds / 1e6:.0f} M values/s"
            yield Finding("a", what, said, not differing, {"seconds": seconds, "values": count})


def checks(place: Place, budget: Budget) -> Iterator[Finding]:
    """The measurements of `check` on the device against those on the CPU, and the seconds of large models.

    Bound: a dot product of n terms has a relative error of about lambda sqrt(n) eps (Higham and Mary 2019, lambda = 8
    holds but with a probability of 1e-14), on both devices; it passes through the 2 L sub-layers of width n.
    """
    for model_type in ("gpt2", "llama"):
        made = config(model_type, place)
        folder = place.folder / f"check-{model_type}"
        made.save_pretrained(folder)
        reports = [spikepatch.check(str(folder), tokens=64, device=device) for device in ("cpu", place.device)]
        width, layers = made.hidden_size, made.num_hidden_layers
        bound = 2 * 8 * width**0.5 * torch.finfo(torch.float32).eps * 2 * layers
        worst = 0.0
        for one, other in zip(_numbers(reports[0]), _numbers(reports[1]), strict=True):
            worst = max(worst, abs(one - other) / max(abs(one), 1e-30))
        what = f"check of {model_type}, width {width}, {layers} layers: largest relative difference"
        yield Finding("b", what, f"{worst:.1e}, bound {bound:.1e}", worst <= bound, {"worst": worst, "bound": bound})
    large = {"gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}), "llama 7B": ("llama", {})}
    for name, (model_type, sizes) in {} if place.tiny else large.items():
        folder = place.folder / name.replace(" ", "-")
        AutoConfig.for_model(model_type, **sizes).save_pretrained(folder)
        yield _timed(name, folder, place, budget)


def _numbers(report: Any) -> list[float]:
    return [report.sigma_start, *(layer.sigma_in for layer in report.layers)]


def _timed(name: str, folder: Path, place: Place, budget: Budget) -> Finding:
    command = [sys.executable, "-m", "spikepatch", "check", str(folder), "--device", place.device, "--json"]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(budget.left, 1))
    except subprocess.TimeoutExpired:
        return Finding("b", f"check of {name}", "not within the part's time", None)
    seconds = time.perf_counter() - started
    if done.returncode:
        return Finding("b", f"check of {name}", done.stderr.strip()[-300:], False)
    return Finding("b", f"check of {name}, all of the command", f"{seconds:.1f} s", True, {"seconds": seconds})
