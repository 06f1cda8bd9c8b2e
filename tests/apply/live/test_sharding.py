"""Which part of a stored tensor a box of its owner is; DTensors themselves are tried in ``ranks.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spikepatch.apply.live.sharding import Held, held, part
from spikepatch.source.layout import Target, layout
from spikepatch.source.meta import skeleton
from tests.architectures import tiny_model


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape)).view(shape)


def cut(whole: torch.Tensor, box: Sequence[range]) -> torch.Tensor:
    return whole[tuple(slice(r.start, r.stop) for r in box)]


def target_of(view: torch.Tensor) -> Target:
    return Target("stored", "owner", tuple(view.shape), tuple(view.stride()), int(view.storage_offset()), view.dtype)


#: What transformers' conversions make of a tensor of (4, 6, 5), as views; every element is in one view of each.
VIEWS: dict[str, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    "whole": lambda x: [x],
    "experts": list,
    "halves of experts": lambda x: [half for expert in x for half in expert.chunk(2)],
    "interleaved": lambda x: [x[:, 0::2], x[:, 1::2]],
    "interleaved experts": lambda x: [expert[i::3] for expert in x for i in range(3)],
    "transposed": lambda x: [x.transpose(1, 2)],
    "transposed experts": lambda x: [expert.T for expert in x],
    "columns": lambda x: [x[..., :2], x[..., 2:]],
    "with a dimension more": lambda x: [x[:, None]],
}


@pytest.mark.parametrize("kind", VIEWS)
@given(data=st.data())
def test_parts_of_a_box(kind: str, data: st.DataObject) -> None:
    """Each memory holds just the elements of its target's box, and all of them together every element once."""
    whole = numbered(4, 6, 5)
    box = tuple(range(*sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))) for n in whole.shape)
    padded = torch.zeros(math.prod(map(len, box)) + 3, dtype=whole.dtype)
    local = padded[3:].view([len(r) for r in box])  # as FSDP's: somewhere in a larger buffer
    local.copy_(cut(whole, box))
    seen: list[int] = []
    for view in VIEWS[kind](whole):
        found = part(target_of(view), Held(local, tuple(whole.shape), box))
        if found is not None:
            assert torch.equal(found.memory, cut(view, found.box))
            seen += found.memory.flatten().tolist()
    assert sorted(seen) == sorted(local.flatten().tolist())


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_parts_of_real_layouts(model_type: str) -> None:
    """Cut anywhere in any dimension, what the pieces hold is what the stored tensors have."""
    model = tiny_model(model_type)
    state = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    targets = layout(skeleton(model))
    checked = 0
    for dim in range(3):
        left = {name: 0 for name, tensor in state.items() if dim < tensor.ndim}
        for side in range(2):
            for target in targets:
                whole = state[target.owner]
                if dim < whole.ndim:
                    middle = (whole.shape[dim] + 1) // 3
                    box = [range(n) for n in whole.shape]
                    box[dim] = range(middle) if side == 0 else range(middle, whole.shape[dim])
                    found = part(target, Held(cut(whole, box).contiguous(), tuple(whole.shape), tuple(box)))
                    if found is not None:
                        assert torch.equal(found.memory, cut(target.view(whole), found.box)), target.name
                        left[target.owner] += found.memory.numel()
                        checked += 1
        owners = {target.owner for target in targets}
        assert all(n == state[name].numel() for name, n in left.items() if name in owners)
    assert checked > 100


def test_a_dimension_that_runs_through_two() -> None:
    whole = numbered(4, 6, 5)
    with pytest.raises(ValueError, match="its dimension of size 24 runs through several dimensions of owner"):
        part(target_of(whole.view(24, 5)), held(whole))


def test_a_plain_tensor_is_held_whole() -> None:
    whole = nn.Parameter(torch.ones(2, 3))
    mine = held(whole)
    assert mine.local.data_ptr() == whole.data_ptr()
    assert (mine.shape, mine.box) == ((2, 3), (range(2), range(3)))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_nothing_and_scalars(shape: tuple[int, ...]) -> None:
    whole = torch.ones(shape)
    found = part(target_of(whole), held(whole))
    assert (found is None) == (whole.numel() == 0)
    assert found is None or found.memory.shape == ()
