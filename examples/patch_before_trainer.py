"""Patch a model in memory before your own Trainer, and load its checkpoint again: run as a script, on any machine.

A patched model is an ordinary transformers model whose own ``save_pretrained`` writes a folder that loads patched, so
nothing in the training code changes. A tiny GPT-2 trains for a few steps on the bytes of this very file.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import spikepatch


def main() -> None:
    config = AutoConfig.for_model(
        "gpt2", n_embd=64, n_layer=4, n_head=4, n_positions=64, vocab_size=256, bos_token_id=0, eos_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config)

    # The whole patch: fresh small weights, residual projections / sqrt(S), the embedding * sqrt(d).
    spikepatch.patch(model, "scaled-embed", reinit="all", seed=0, untie=True)

    text = torch.tensor(list(Path(__file__).read_bytes()))
    windows = [{"input_ids": w, "labels": w} for w in text.unfold(0, 64, 32)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=10, per_device_train_batch_size=4, report_to=[], save_steps=10, use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=windows)
        loss = trainer.train().training_loss
        again = AutoModelForCausalLM.from_pretrained(f"{folder}/checkpoint-10", trust_remote_code=True)
    scale = again.get_input_embeddings().embed_scale
    print(f"mean loss of 10 steps {loss:.2f}; the checkpoint loads patched: embedding * {scale:g}")  # noqa: T201


if __name__ == "__main__":
    main()
