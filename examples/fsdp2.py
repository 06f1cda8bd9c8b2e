"""Pre-train a model that fits no single process: run as a script, or with ``torchrun --nproc-per-node N``.

The structure is patched on the meta device, sharded by FSDP2, and every rank draws just what it holds: the same bits as
``spikepatch.patch`` writes on one process, with no folder and no full copy in between. On a machine without GPUs two
ranks train a tiny Llama on the bytes of this very file, over gloo.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes
from transformers import AutoConfig, AutoModelForCausalLM

import spikepatch


def main() -> None:
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, vocab_size=256,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip

    # 1. Structure only: no memory, whatever the size.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    plan = spikepatch.plan(model, "scaled-embed", reinit="all", seed=0)
    spikepatch.patch(model, plan)

    # 2. Your own sharding, then memory for the shards.
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device=device)

    # 3. The values: parameters, buffers, and the tie between head and embedding.
    spikepatch.initialize(model, plan)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.tensor(list(Path(__file__).read_bytes()), device=device).unfold(0, 64, 64)  # (windows, 64)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(10):
        batch = text[(step * ranks + rank) % len(text)][None]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_(), dist.ReduceOp.SUM)
        if rank == 0 and step in (0, 9):
            print(f"step {step}: loss {loss.item() / ranks:.2f} on {ranks} ranks")  # noqa: T201


def one_of_two(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    main()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group()
        main()
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (f"{folder}/rendezvous",)
            start_processes(one_of_two, arguments, nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
