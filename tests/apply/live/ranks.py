"""Every rank of a small world initialises sharded models, and compares what it holds with the unsharded result.

    python -m tests.apply.live.ranks OUT.json

The worlds of two and of four processes are forked from this one, so that torch is imported once. OUT.json tells, for
every case, what failed on which rank. The names of the cases are read by ``test_initialize.py``.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.multiprocessing.spawn import start_processes
from transformers import AutoModelForCausalLM

import spikepatch
from tests.architectures import ids, tiny_config, tiny_model
from tests.folders import hashes

Case = Callable[[], None]
LAYERS = {"num_hidden_layers": 2}
TWO: dict[str, Case] = {}
FOUR: dict[str, Case] = {}


def case(cases: dict[str, Case]) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        cases[function.__name__] = function
        return function

    return add


def meta_model(model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type, **LAYERS, **changes)).to(dtype).eval()


@functools.cache
def plan_of(model_type: str, **tie: bool) -> spikepatch.Plan:
    """Of any number of rows, inner width and experts: the plan has names and the width of the stream only."""
    model = meta_model(model_type, torch.float32, **tie)
    return spikepatch.plan(model, "scaled-embed", reinit="all", seed=11)


def prepared(model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, spikepatch.Plan]:
    """A patched model on the meta device, and its plan."""
    model = meta_model(model_type, dtype, **changes)
    plan = plan_of(model_type, **{name: value for name, value in changes.items() if name == "tie_word_embeddings"})
    return spikepatch.patch(model, plan), plan


def shard_blocks(model: Any, mesh: DeviceMesh | None = None) -> None:
    """As pre-training code does it: every block is a unit, the root holds the rest."""
    (blocks,) = [
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers
    ]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def initialized(
    model_type: str,
    shard: Callable[[Any], object],
    dtype: torch.dtype = torch.float32,
    *,
    forward: bool = True,
    **changes: Any,
) -> Any:
    """A sharded model, filled, and found equal to the unsharded one: parameters, buffers, ties and logits."""
    model, plan = prepared(model_type, dtype, **changes)
    shard(model)
    model.to_empty(device="cpu")
    spoil(model)
    assert spikepatch.initialize(model, plan) is model
    whole = tiny_model(model_type, **LAYERS, **changes).to(dtype)
    spikepatch.patch(whole, plan)
    compare(model, whole)
    if not forward:
        return model
    tokens = ids(whole)
    with torch.no_grad():
        logits = model(tokens).logits
        expected = whole(tokens).logits
    assert torch.equal(logits.full_tensor() if isinstance(logits, DTensor) else logits, expected), "logits differ"
    return model


def spoil(model: nn.Module) -> None:
    """NaN, or a wrong number, into all memory: what is not written shows."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            local.fill_(float("nan") if local.is_floating_point() else 77)


def compare(model: nn.Module, whole: nn.Module) -> None:
    def plain(name: str) -> str:
        return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")

    found = {plain(n): t for n, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    expected = dict((*whole.named_parameters(remove_duplicate=False), *whole.named_buffers()))
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for name, value in expected.items():
        tensor = found[name].detach()
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert full.dtype == value.dtype, name
        assert torch.equal(full, value), name
    assert tied(found) == tied(expected)


def tied(tensors: dict[str, torch.Tensor]) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def place(model: Any, mesh: DeviceMesh, *dims: int) -> None:
    """Every parameter as a DTensor, sharded in dimension ``dims[i]`` over mesh dimension i where it has so many."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                placements = [Shard(dim) if dim < p.ndim else Replicate() for dim in dims]
                module._parameters[name] = nn.Parameter(distribute_tensor(p.detach(), mesh, placements))


def tensor_parallel(model: Any, mesh: DeviceMesh) -> None:
    """As transformers' own plan shards a Llama: column-wise is Shard(0) of a weight, row-wise Shard(1)."""
    columns, rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
    plan: dict[str, Any] = {f"model.layers.*.*.{name}": ColwiseParallel() for name in columns}
    plan |= {f"model.layers.*.*.{name}": RowwiseParallel() for name in rows}
    parallelize_module(model, mesh, plan)


def refused(model_type: str, shard: Callable[[Any, DeviceMesh], object], match: str, **changes: Any) -> None:
    model, plan = prepared(model_type, **changes)
    shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    model.to_empty(device="cpu")
    spoil(model)
    with pytest.raises(spikepatch.Refused, match=match):
        spikepatch.initialize(model, plan)
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        assert bool(local.isnan().all())


@case(TWO)
def fsdp_llama_tied_uneven() -> None:
    """Odd sizes: the ranks hold 251 and 250 rows of the table. One step of training keeps the tie."""
    model = initialized("llama", shard_blocks, tie_word_embeddings=True, vocab_size=501, intermediate_size=97)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(ids(model), labels=ids(model)).loss.backward()
    optimizer.step()
    fully_sharded_parameters = [p for p in model.parameters() if isinstance(p, DTensor) and p.grad is not None]
    assert len(fully_sharded_parameters) == len(list(model.parameters()))
    head, table = model.lm_head.weight, model.model.embed_tokens.weight
    assert head is table
    assert head.to_local().shape[0] == 251 - dist.get_rank()


@case(TWO)
def fsdp_gpt2_bfloat16_saved() -> None:
    """The folder is that of the model's own class, not of the one that fully_shard derives from it."""
    model = initialized("gpt2", shard_blocks, torch.bfloat16)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = tiny_model("gpt2", **LAYERS).to(torch.bfloat16)
    spikepatch.patch(whole, plan_of("gpt2"))
    with tempfile.TemporaryDirectory() as folder:
        if dist.get_rank() == 0:
            sharded, plain = Path(folder, "sharded"), Path(folder, "plain")
            model.save_pretrained(sharded, state_dict=state)
            whole.save_pretrained(plain)
            files = {path.name for path in plain.iterdir()}
            assert {path.name for path in sharded.iterdir()} == files
            assert len(files) >= 4
            differ = {name for name in files if (sharded / name).read_bytes() != (plain / name).read_bytes()}
            assert differ <= {"model.safetensors"}  # under which of its names a tied tensor is stored
            compare(AutoModelForCausalLM.from_pretrained(sharded, trust_remote_code=True), whole)


@case(TWO)
def fsdp_mamba() -> None:
    initialized("mamba", shard_blocks)


@case(TWO)
def fsdp_mixtral_three_experts() -> None:
    initialized("mixtral", shard_blocks, num_local_experts=3)


@case(TWO)
def fsdp_in_the_second_dimension() -> None:
    def shard(model: Any) -> None:
        fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 else Shard(0))

    initialized("mixtral", shard)


@case(TWO)
def fsdp_of_checkpoint_wrappers() -> None:
    def shard(model: Any) -> None:
        model.model.layers = nn.ModuleList([checkpoint_wrapper(block) for block in model.model.layers])
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)

    initialized("qwen3", shard)


@case(TWO)
def one_after_another() -> None:
    """A forward pass leaves the root gathered; what is written then must go into the shards."""
    model = initialized("gpt2", shard_blocks)
    with torch.no_grad():
        before = [p.full_tensor() if isinstance(p, DTensor) else p.clone() for p in model.parameters()]
    spoil(model)
    spikepatch.initialize(model, plan_of("gpt2"))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert all(torch.equal(p.full_tensor(), b) for p, b in zip(model.parameters(), before, strict=True))


@case(TWO)
def columns_uneven() -> None:
    """Shard(1) of 97 columns; of a fused gate and up projection rows 0 to 97 and 97 to 194: one half each."""
    mesh = init_device_mesh("cpu", (2,))
    initialized("mixtral", lambda m: place(m, mesh, 1), forward=False, intermediate_size=97)
    initialized("gpt2", lambda m: place(m, mesh, 1), forward=False, n_positions=63)


@case(TWO)
def last_dimension_of_experts() -> None:
    mesh = init_device_mesh("cpu", (2,))
    initialized("mixtral", lambda m: place(m, mesh, 2), forward=False, intermediate_size=97)


@case(TWO)
def replicated_with_its_buffers() -> None:
    model = initialized("llama", lambda m: distribute_module(m, init_device_mesh("cpu", (2,))), forward=False)
    assert isinstance(model.model.rotary_emb.inv_freq, DTensor)


@case(TWO)
def tensor_parallel_tied() -> None:
    """Both names of the tied matrix are DTensors of their own after parallelize_module, and one afterwards."""

    def shard(model: Any) -> None:
        mesh = init_device_mesh("cpu", (2,))
        tensor_parallel(model, mesh)
        for module in (model.model.embed_tokens, model.lm_head):
            module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)]))

    initialized("llama", shard, forward=False, tie_word_embeddings=True, vocab_size=501)


@case(TWO)
def refused_tied_in_two_units() -> None:
    def shard(model: Any, mesh: DeviceMesh) -> None:
        fully_shard(model.model.embed_tokens, mesh=mesh)
        fully_shard(model, mesh=mesh)

    refused("llama", shard, "are one parameter, but not to fully_shard", tie_word_embeddings=True)


@case(TWO)
def tied_in_one_call() -> None:
    def shard(model: Any) -> None:
        fully_shard([model.model.embed_tokens, model.lm_head])
        fully_shard(model)

    initialized("llama", shard, tie_word_embeddings=True)


@case(TWO)
def refused_tied_but_sharded_differently() -> None:
    def shard(model: Any, mesh: DeviceMesh) -> None:
        for module, dim in ((model.model.embed_tokens, 1), (model.lm_head, 0)):
            module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(dim)]))

    refused("llama", shard, "are sharded differently", tie_word_embeddings=True)


@case(TWO)
def refused_partial_sums() -> None:
    def shard(model: Any, mesh: DeviceMesh) -> None:
        norm = model.model.norm
        norm.weight = nn.Parameter(DTensor.from_local(norm.weight.detach(), mesh, [Partial()]))

    refused("llama", shard, "model.norm.weight.*are summed")


@case(TWO)
def refused_strided_rows() -> None:
    """Rows 0, 1, 4, 5 and 2, 3, 6, 7 of each 8: no range."""

    def shard(model: Any, mesh: DeviceMesh) -> None:
        norm = model.model.norm
        norm.weight = nn.Parameter(distribute_tensor(norm.weight.detach(), mesh, [_StridedShard(0, split_factor=2)]))

    refused("llama", shard, "model.norm.weight.*no contiguous range")


@case(TWO)
def refused_fsdp1() -> None:
    model, plan = prepared("gpt2")
    model.to_empty(device="cpu")
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(spikepatch.Refused, match=r"FSDP1 is not supported(.|\n)*fully_shard"):
        spikepatch.initialize(sharded, plan)


@case(TWO)
def gathered_and_saved() -> None:
    """What all ranks save together is, byte for byte, what one process saves of the whole model."""
    for model_type in ("gpt2", "mixtral"):
        model = initialized(model_type, shard_blocks, forward=False)
        shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(shared)
        folder = Path(shared[0])
        spikepatch.save(model, folder / "sharded")
        assert (folder / "sharded/model.safetensors").exists(), "before every rank goes on"
        whole = tiny_model(model_type, **LAYERS)
        spikepatch.patch(whole, plan_of(model_type))
        if dist.get_rank() == 0:
            spikepatch.save(whole, folder / "whole")
        dist.barrier()
        assert hashes(folder / "sharded") == hashes(folder / "whole")
        compare(AutoModelForCausalLM.from_pretrained(folder / "sharded", trust_remote_code=True), whole)
        spikepatch.verify(folder / "sharded")
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)


@case(FOUR)
def rows_by_columns() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    initialized("mixtral", lambda m: place(m, mesh, 0, 1), forward=False, vocab_size=501, intermediate_size=97)
    initialized("gpt2", lambda m: place(m, mesh, 1, 0), forward=False, vocab_size=501)


@case(FOUR)
def rows_of_rows() -> None:
    """The first mesh dimension cuts, the second cuts what is left; three experts for four ranks leave one empty."""
    mesh = init_device_mesh("cpu", (2, 2))
    initialized("mixtral", lambda m: place(m, mesh, 0, 0), forward=False, vocab_size=501, num_local_experts=3)


@case(FOUR)
def replicated_and_sharded() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    initialized("llama", lambda m: shard_blocks(m, mesh), tie_word_embeddings=True, vocab_size=501)


@case(FOUR)
def fsdp_two_experts_for_four() -> None:
    initialized("mixtral", shard_blocks, num_local_experts=2)


@case(FOUR)
def refused_fsdp_over_tensor_parallel_uneven() -> None:
    """98 rows by 2 by 2: what DTensor's placements say is not what FSDP has cut."""

    def shard(model: Any, _: DeviceMesh) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        tensor_parallel(model, mesh["tensor"])
        shard_blocks(model, mesh["data"])

    refused("llama", shard, "up_proj.weight.*no contiguous range", intermediate_size=98)


@case(FOUR)
def fsdp_over_tensor_parallel() -> None:
    """FSDP cuts the rows of what tensor parallelism has cut by rows: a strided shard in DTensor's terms."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def shard(model: Any) -> None:
        tensor_parallel(model, mesh["tensor"])
        shard_blocks(model, mesh["data"])
        strided = [p for p in model.parameters() if any(isinstance(x, _StridedShard) for x in p.placements)]
        assert len(strided) == 5 * model.config.num_hidden_layers

    model = initialized("llama", shard, forward=False, vocab_size=501)
    with torch.no_grad():
        assert bool(model(ids(model)).logits.isfinite().all())


def run(rank: int, size: int, rendezvous: str, out: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=datetime.timedelta(minutes=5)
    )
    report = {}
    for name, check in (TWO if size == 2 else FOUR).items():
        try:
            check()
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
        dist.barrier()
    Path(f"{out}.{size}.{rank}").write_text(json.dumps(report))
    dist.destroy_process_group()


def main(out: str) -> None:
    torch.set_num_threads(1)
    merged: dict[str, dict[str, str]] = {}
    for model_type in ("llama", "gpt2", "mamba", "mixtral", "qwen3"):
        plan_of(model_type)  # before the ranks do it each
    plan_of("llama", tie_word_embeddings=True)
    with tempfile.TemporaryDirectory() as folder:
        for size in (2, 4):
            arguments = (size, f"{folder}/rendezvous{size}", f"{folder}/report")
            start_processes(run, arguments, nprocs=size, start_method="fork")  # type: ignore[no-untyped-call]
            for rank in range(size):
                report = json.loads(Path(f"{folder}/report.{size}.{rank}").read_text())
                for name, error in report.items():
                    merged.setdefault(name, {})[f"rank {rank} of {size}"] = error
    Path(out).write_text(json.dumps(merged))


if __name__ == "__main__":
    main(sys.argv[1])
