"""FlexAttention by its definition, in operations that can be followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    *options: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the operation behind ``torch.nn.attention.flex_attention`` computes.

        softmax_j(score_mod(q_i k_j * scale) where mask_mod holds) v_j

    The mask is the function that the block mask was made from; it and ``score_mod`` get all indices at once.

    Args:
        query: (batch, heads, queries, width).
        key, value: (batch, heads or fewer, keys, width).
        block_mask: as a tuple, whose last part is ``mask_mod``.

    Returns:
        The output; the logarithm of the sum and the largest score of each query.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if key.shape[0] != query.shape[0]:
        key, value = (t.expand(query.shape[0], *t.shape[1:]) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * scale  # (batch, heads, queries, keys)
    shape = scores.shape
    indices = [torch.arange(n).view([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate(shape)]
    scores = score_mod(scores, *indices)
    allowed = block_mask[-1](*indices)
    scores = scores.masked_fill(~torch.as_tensor(allowed).expand(shape), float("-inf"))
    largest = scores.amax(-1)
    return scores.softmax(-1).to(query.dtype) @ value, scores.logsumexp(-1), largest
