"""A plan's values for a model that was patched on the meta device: each rank draws what it holds, and no more."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from spikepatch.apply.live.sharding import Held, Part, held, part
from spikepatch.apply.values.assign import values
from spikepatch.apply.values.draw import draw, pieces, slices
from spikepatch.errors import Refused
from spikepatch.plans.plan import Plan, ValueEdit
from spikepatch.source.layout import Target, persistent
from spikepatch.source.meta import check_default_device, check_module
from spikepatch.source.private import WRAPPED, fsdp_handles, own_buffers, own_children, own_parameters
from spikepatch.source.tied import firsts


@dataclass(frozen=True)
class _Place:
    """Where a tensor lives: among the parameters or the buffers of ``module``, as ``name``."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> torch.Tensor:
        own = own_parameters(self.module).get(self.name, own_buffers(self.module).get(self.name))
        assert own is not None
        return own

    def tie(self, tensor: torch.Tensor) -> None:
        own: Any = own_parameters(self.module)
        (own if self.name in own else own_buffers(self.module))[self.name] = tensor


def initialize(model: nn.Module, plan: Plan) -> nn.Module:
    """Write every parameter and every buffer that this process holds; bit for bit what ``patch`` writes on one.

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        spikepatch.patch(model, plan)          # structure only
        fully_shard(model)                     # or any placement of DTensors, or none
        model.to_empty(device="cuda")
        spikepatch.initialize(model, plan)

    Nothing is communicated. Random fills are drawn on the CPU in float32, at most 32 MB at a time and only where a
    shard needs them, then cast once to the parameter's dtype. What the plan leaves to the model's own code (norms,
    biases) is made whole, one tensor at a time, and sliced. Buffers get the values of the
    constructor; weights that were tied before sharding are tied again. torch.compile's and checkpoint wrappers are
    looked through.

    Args:
        model: patched by ``patch`` on the meta device, with memory now, on any device.
        plan: the one that it was patched with, or an equal one.

    Returns:
        ``model``.

    Raises:
        Refused: the model was not patched on the meta device, the plan is another one, a tensor has no memory, is
            packed, or is sharded in a way whose elements cannot be told. Nothing has been written then.
    """
    check_default_device()
    check_module(model)
    blueprint = _blueprint(model, plan)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what a forward pass gathered is no place to write to
    places = dict(_places(model))
    ties = _ties(blueprint.skeleton)
    owned, problems = _owned(places, ties, blueprint)
    parts, misplaced = _parts(blueprint, owned)
    problems += [*_untieable(model, places, ties), *misplaced]
    if problems:
        raise Refused(
            what="the model cannot be filled",
            where=type(model).__name__,
            why="; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else ""),
            remedy="patch it on the meta device, then shard it, then call to_empty(device=...), then initialize",
        )
    with torch.no_grad():
        _write(blueprint, parts)
        stored = {target.owner for target in blueprint.targets}
        for name, mine in owned.items():
            if name not in stored and mine.local.numel():
                mine.local.copy_(blueprint.buffers[name][slices(mine.box)])
    for alias, owner in ties.items():
        places[alias].tie(places[owner].tensor)
    return model


def _blueprint(model: nn.Module, plan: Plan) -> Blueprint:
    whole = [name for name, module in model.named_modules() if isinstance(module, FullyShardedDataParallel)]
    if whole:
        raise Refused(
            what="FSDP1 is not supported",
            where=whole[0] or type(model).__name__,
            why="FullyShardedDataParallel flattens parameters into one, and does not tell where each of them lies",
            remedy="use torch.distributed.fsdp.fully_shard (FSDP2)",
        )
    blueprint: Blueprint | None = getattr(model, "_spikepatch_blueprint", None)
    if blueprint is None:
        raise Refused(
            what="the model was not patched on the meta device",
            where=type(model).__name__,
            why="initialize writes values only; spikepatch.patch changes the structure, and records what it was whole",
            remedy="build the model on the meta device and call spikepatch.patch(model, plan) before it is sharded or "
            "wrapped; a model that has weights needs spikepatch.patch alone",
        )
    if not blueprint.is_of(plan):
        raise Refused(
            what="the plan is not the one that the model was patched with",
            where=type(model).__name__,
            why=f"it was patched with {blueprint.plan.recipe}, seed {blueprint.plan.seed}, "
            f"for {blueprint.plan.architecture}; this is {plan.recipe}, seed {plan.seed}, for {plan.architecture}",
            remedy="pass the same plan to patch and initialize, on every rank",
        )
    return blueprint


def _places(module: nn.Module, path: str = "") -> Iterator[tuple[str, _Place]]:
    """Every parameter and buffer under the name that it has without wrappers; tied ones under each of their names."""
    while (children := tuple(own_children(module))) and len(children) == 1 and children[0] in WRAPPED:
        inner = own_children(module)[children[0]]
        assert inner is not None
        module = inner
    for name, tensor in (*own_parameters(module).items(), *own_buffers(module).items()):
        if tensor is not None:
            yield path + name, _Place(module, name)
    for name, child in own_children(module).items():
        if child is not None:
            yield from _places(child, f"{path}{name}.")


def _ties(skeleton: nn.Module) -> dict[str, str]:
    """Second and further names of a tensor -> its first name."""
    owners = firsts((name, place.tensor) for name, place in _places(skeleton))
    return {name: owner for name, owner in owners.items() if owner != name}


def _owned(
    places: Mapping[str, _Place], ties: Mapping[str, str], blueprint: Blueprint
) -> tuple[dict[str, Held], list[str]]:
    """What this process holds of each tensor, tied ones once; and what is wrong with the rest."""
    whole = dict(_places(blueprint.skeleton))
    problems = [f"it has no {name}" for name in whole if name not in places]
    problems += [f"{name} was added after the patch" for name in places if name not in whole]
    owned: dict[str, Held] = {}
    for name in whole:
        if name in ties or name not in places:
            continue
        try:
            owned[name] = held(places[name].tensor)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        before, now = whole[name].tensor, owned[name]
        if now.shape != tuple(before.shape):
            problems.append(f"{name} is {now.shape}, and was {tuple(before.shape)} when patched")
        if now.local.is_floating_point() != before.is_floating_point():
            problems.append(f"{name} is {now.local.dtype}, and was {before.dtype} when patched: quantised")
    return owned, problems


def _untieable(model: nn.Module, places: Mapping[str, _Place], ties: Mapping[str, str]) -> Iterator[str]:
    """Tied tensors that are sharded as if they were two, one sentence per pair."""
    managed = _managed_by_fsdp(model)
    for alias, owner in ties.items():
        if alias not in places or owner not in places:
            continue
        one, other = (managed.get((id(places[name].module), places[name].name)) for name in (owner, alias))
        if one is not other:
            yield f"{owner} and {alias} are one parameter, but not to fully_shard: shard their modules in one call"
            continue
        a, b = places[owner].tensor, places[alias].tensor
        layouts = [(t.device_mesh, t.placements) if isinstance(t, DTensor) else None for t in (a, b)]
        if layouts[0] != layouts[1]:
            yield f"{owner} and {alias} are one parameter, but are sharded differently: {layouts[0]} and {layouts[1]}"


def _managed_by_fsdp(model: nn.Module) -> dict[tuple[int, str], object]:
    """(id of a module, name of its parameter) -> FSDP's own handle of that parameter; tied ones share it."""
    managed: dict[tuple[int, str], object] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            managed |= {(id(owner), name): handle for owner, name, handle in fsdp_handles(module)}
    return managed


def _parts(blueprint: Blueprint, owned: Mapping[str, Held]) -> tuple[list[tuple[Target, Part]], list[str]]:
    """The parts of all stored tensors that this process holds; with a sentence for each tensor they do not fill."""
    parts: list[tuple[Target, Part]] = []
    problems: list[str] = []
    unfilled = {name: held.local.numel() for name, held in owned.items()}
    for target in blueprint.targets:
        if target.owner not in owned:
            continue
        try:
            found = part(target, owned[target.owner])
        except ValueError as error:
            problems.append(f"{target.name}: {error}")
            continue
        if found is not None:
            parts.append((target, found))
            unfilled[target.owner] -= found.memory.numel()
    stored = {target.owner for target in blueprint.targets}
    problems += [
        f"{name}: {elements} elements would stay unfilled"
        for name, elements in unfilled.items()
        if elements and (name in stored or name not in blueprint.buffers)
    ]
    return parts, problems


def _write(blueprint: Blueprint, parts: list[tuple[Target, Part]]) -> None:
    plan = blueprint.plan
    edits: dict[str, ValueEdit] = {edit.parameter: edit for edit in plan.select(ValueEdit)}
    own = values(plan, blueprint.skeleton, blueprint.original, persistent(blueprint.skeleton, blueprint.buffers))
    for target, found in parts:
        edit = edits.get(target.owner)
        if edit is not None:
            for where, fresh in pieces(partial(draw, edit, plan.seed, target.name), target.shape, found.box):
                found.memory[where].copy_(fresh)
        else:
            whole = own(target)
            assert whole is not None, "patch has refused to keep values on the meta device"
            found.memory.copy_(whole[slices(found.box)])


@dataclass(frozen=True)
class Blueprint:
    """Kept on the model by ``patch``, for ``initialize``.

    Attributes:
        plan: what to write.
        skeleton: the patched structure, whole, on the meta device.
        original: the same without the patch.
        targets: the tensors that it is stored as.
        buffers: all buffers, as the constructor makes them.
    """

    plan: Plan
    skeleton: nn.Module
    original: nn.Module
    targets: tuple[Target, ...]
    buffers: Mapping[str, torch.Tensor]

    def is_of(self, plan: Plan) -> bool:
        """``plan`` writes the same; it may have been made from another description of the model."""
        return dataclasses.replace(plan, source=self.plan.source) == self.plan

    def __deepcopy__(self, memo: dict[int, Any]) -> Blueprint:
        return self  # nothing in it changes


def unfillable(blueprint: Blueprint) -> Iterator[str]:
    """Which tensors nothing would give a value to, one sentence per reason."""
    model, targets = blueprint.skeleton, blueprint.targets
    elements = dict.fromkeys((target.owner for target in targets), 0)
    for target in targets:
        elements[target.owner] += target.elements
    unstored = [name for name, p in model.named_parameters() if elements.get(name, 0) != p.numel()]
    if unstored:
        yield f"{', '.join(unstored[:3])} is not among what save_pretrained writes, so no value is defined for it"
    lost = [name for name, _ in model.named_buffers() if name not in blueprint.buffers]
    if lost:
        yield f"only the constructor knows the values of {', '.join(lost[:3])}, and it ran on the meta device"
    plain = [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.is_meta
    ]
    if plain:
        yield f"{', '.join(plain[:3])} is neither a parameter nor a buffer, and has no value on the meta device"
