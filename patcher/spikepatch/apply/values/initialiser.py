"""The architecture's own initialiser, run on one module at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from spikepatch.apply.values.draw import entropy
from spikepatch.errors import Refused, first_line
from spikepatch.source.private import initialiser_of, own_buffers, own_parameters


def own_initialiser(
    skeleton: nn.Module,
    module: str,
    seed: int,
    buffers: Mapping[str, torch.Tensor],
    drawn: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """What the architecture's own initialiser writes into the tensors that ``module`` itself owns.

    The module's tensors become real, float ones pre-filled with NaN; then ``reset_parameters`` runs where there is
    one, then transformers' ``_init_weights`` on the module and on each of its ancestors, in the order and with the
    owner that transformers uses. All other tensors stay on the meta device, where writing them costs nothing.

    Args:
        skeleton: the whole model, on the meta device; the same when this returns.
        module: path of the module.
        seed: of the plan; the module's stream is seeded with SHA-256 of (seed, path), at full width.
        buffers: real values of the persistent buffers, as the constructor made them.
        drawn: full names of parameters that get their values elsewhere; they take no memory here.

    Returns:
        Full names -> tensors on the CPU, float parameters in float32.

    Raises:
        Refused: a tensor is not written by the initialiser, or the initialiser needs other tensors' values.
    """
    target = skeleton.get_submodule(module)
    prefix = f"{module}." if module else ""
    with _real(target, prefix, buffers, drawn) as tensors, torch.no_grad(), _seeded(seed, module):
        try:
            reset = getattr(target, "reset_parameters", None)
            if callable(reset):
                reset()
            for path, owner in _initialisers(skeleton, module):
                owner(skeleton.get_submodule(path))
        except (RuntimeError, NotImplementedError) as error:
            raise Refused(
                what="the architecture's own initialiser cannot run on this module alone",
                where=module or type(skeleton).__name__,
                why=first_line(error),
                remedy="keep the weights with --reinit none or residual",
            ) from error
    missed = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.isnan().any()]
    if missed:
        raise Refused(
            what="the architecture's own initialiser leaves tensors unwritten",
            where=", ".join(missed),
            why=f"neither reset_parameters of {type(target).__name__} nor the model's _init_weights fills them",
            remedy="keep the weights with --reinit none or residual",
        )
    return tensors


def _initialisers(skeleton: nn.Module, module: str) -> Iterator[tuple[str, Callable[[nn.Module], object]]]:
    """(path, initialiser) of the module and its ancestors, innermost first; the initialiser of the closest owner."""
    parts = module.split(".") if module else []
    paths = [".".join(parts[:i]) for i in range(len(parts), -1, -1)]
    for i, path in enumerate(paths):
        owners = (initialiser_of(skeleton.get_submodule(p)) for p in paths[i:])
        owner = next((o for o in owners if o is not None), None)
        if owner is not None:
            yield path, owner


@contextlib.contextmanager
def _real(
    target: nn.Module, prefix: str, buffers: Mapping[str, torch.Tensor], drawn: Collection[str]
) -> Iterator[dict[str, torch.Tensor]]:
    """Swap real tensors into ``target`` for the duration."""
    parameters, others = dict(own_parameters(target)), dict(own_buffers(target))
    tensors: dict[str, torch.Tensor] = {}
    try:
        for name, parameter in parameters.items():
            if parameter is not None and prefix + name not in drawn:
                real = torch.full(parameter.shape, float("nan"), dtype=torch.float32)
                own_parameters(target)[name] = nn.Parameter(real, requires_grad=False)
                tensors[prefix + name] = real
        for name, buffer in others.items():
            if buffer is not None and prefix + name in buffers:
                own_buffers(target)[name] = tensors[prefix + name] = buffers[prefix + name].detach().cpu().clone()
        yield tensors
    finally:
        own_parameters(target).update(parameters)
        own_buffers(target).update(others)


@contextlib.contextmanager
def _seeded(seed: int, module: str) -> Iterator[None]:
    """torch's global CPU generator, at a full-width state (``manual_seed`` keeps 32 bits, so modules would collide)."""
    with torch.random.fork_rng(devices=[]):
        sequence = np.random.SeedSequence(entropy(seed, module, -1))
        torch.manual_seed(0)
        state = torch.get_rng_state()
        words = state.numpy().view(np.uint64)[3 : 3 + 624]  # behind seed, (left, seeded), next; one 32-bit word each
        words[:] = sequence.generate_state(624)
        torch.set_rng_state(state)
        yield
