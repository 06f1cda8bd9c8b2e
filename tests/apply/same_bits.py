"""Live, disk and sharded are one, under any setting of threads, processor paths and BLAS libraries.

    python -m tests.apply.same_bits gpt2 llama ...        without types, ten of them

Each setting is a process of its own, which makes each model in three ways, compares them bit for bit, and answers with
a hash of every tensor of each type; the answers of all processes are compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import ROOT

TYPES = (
    "gpt2", "llama", "gpt_neox", "mixtral", "mamba", "falcon", "stablelm", "phi", "qwen3", "granite",
)  # fmt: skip

#: What a library reads when it is loaded.
SETTINGS: tuple[dict[str, str], ...] = (
    {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "5", "MKL_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "3", "OMP_DYNAMIC": "true"},
    {
        "OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "DNNL_MAX_CPU_ISA": "SSE41",
        "OPENBLAS_CORETYPE": "PRESCOTT", "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX2 FMA3",
    },
)  # fmt: skip


def made(model_type: str, folder: Path) -> dict[str, str]:
    """Name -> hash, of the tensors of a model that was made in three ways, with the same bits in each."""
    import torch
    from safetensors.torch import load_file
    from torch.distributed.fsdp import fully_shard

    import spikepatch
    from tests.architectures import tiny_config, tiny_model

    live = tiny_model(model_type)
    spikepatch.patch(live, "scaled-embed", reinit="all", seed=7)

    tiny_config(model_type).save_pretrained(folder / "source")
    spikepatch.convert(str(folder / "source"), folder / "out", seed=7, load_test=False)
    disk = load_file(folder / "out/model.safetensors")

    with torch.device("meta"):
        sharded: Any = type(tiny_model(model_type))(tiny_config(model_type)).eval()
    plan = spikepatch.plan(sharded, "scaled-embed", reinit="all", seed=7)
    spikepatch.patch(sharded, plan)
    fully_shard(sharded)
    sharded.to_empty(device="cpu")
    spikepatch.initialize(sharded, plan)

    saved = spikepatch.save(live, folder / "saved")
    hashes = {name: digest(value) for name, value in disk.items()}
    assert {name: digest(value) for name, value in load_file(saved / "model.safetensors").items()} == hashes
    whole = {name: digest(value) for name, value in live.state_dict().items()}
    apart = {name: digest(value.full_tensor()) for name, value in sharded.named_parameters()}
    assert apart.items() <= whole.items(), model_type
    assert len(apart) == len(dict(live.named_parameters()))
    return hashes | {f"live {name}": value for name, value in whole.items()}


def digest(tensor: Any) -> str:
    import torch

    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + flat.numpy().tobytes()).hexdigest()


def answer(types: list[str]) -> None:
    """In a process of its own."""
    import torch.distributed as dist

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        dist.init_process_group("gloo", init_method=f"file://{scratch}/group", rank=0, world_size=1)
        for model_type in types:
            folder = Path(scratch, model_type)
            folder.mkdir()
            found[model_type] = made(model_type, folder)
        dist.destroy_process_group()
    sys.stdout.write(json.dumps(found))


def answers(types: list[str]) -> list[dict[str, Mapping[str, str]]]:
    """Of every setting; type -> name -> hash."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.apply.same_bits", "--answer", *types]
    found = []
    for setting in SETTINGS:
        environment = {**os.environ, "SPIKEPATCH_LOAD_TEST": "0", **setting}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        answer(sys.argv[2:])
    else:
        wanted = sys.argv[1:] or list(TYPES)
        first, *others = answers(wanted)
        for each in wanted:
            alike = all(other[each] == first[each] for other in others)
            sys.stdout.write(f"{each}: {len(first[each])} tensors, {'the same' if alike else 'DIFFERENT'}\n")
