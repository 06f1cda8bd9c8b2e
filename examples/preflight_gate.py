"""A gate for CI: fail the job when the model that a training run is about to start from is at risk.

The command does the same: `spikepatch check SOURCE --fail-on at-risk` exits with 1. Here the model is made in memory,
as a training script makes it, and the recipe is the fix. Run as a script, on any machine.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import spikepatch


def gate(model: torch.nn.Module, what: str) -> bool:
    """Print the verdict with what it rests on; true where the run may start."""
    report = spikepatch.check(model, tokens=32)
    print(f"{what}: {report.verdict}")  # noqa: T201
    for found in (*report.findings, *(report.audit.findings if report.audit else ())):
        print(f"  {found}")  # noqa: T201
    return report.verdict == "stable"


def main() -> int:
    config = AutoConfig.for_model(
        "gpt2", n_embd=64, n_layer=8, n_head=4, n_positions=64, vocab_size=256, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)

    gate(model, "transformers' own initialisation")  # a gate would return 1 here
    spikepatch.patch(model, "scaled-embed", reinit="all", seed=0)
    return 0 if gate(model, "patched") else 1


if __name__ == "__main__":
    sys.exit(main())
