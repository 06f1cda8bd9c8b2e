"""``--reset-positions``: documents that are packed into one sequence are kept apart, by their positions alone.

transformers makes the mask of attention from ``position_ids`` that begin again (``create_causal_mask``): a token sees
those of its own document. A model that mixes tokens in another way sees more; so each one is tried.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spikepatch.errors import Refused
from spikepatch.quiet import quiet
from spikepatch.training.settings import Settings
from spikepatch.training.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: No target; ``cross_entropy`` leaves it out of the mean.
IGNORED = -100


def positions(rows: torch.Tensor, eos: int) -> torch.Tensor:
    """(B, T) -> (B, T): the place of each token in its own document, of which the last token is ``eos``; a row begins
    with position 0.
    """
    places = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    begins = torch.zeros_like(rows)
    begins[:, 1:] = torch.where(rows[:, :-1] == eos, places[:, 1:], 0)
    return places - begins.cummax(dim=1).values


def targets(rows: torch.Tensor, eos: int) -> torch.Tensor:
    """(B, T + 1) -> (B, T): the next token, but ``IGNORED`` where that is the first of another document."""
    return torch.where(rows[:, :-1] == eos, IGNORED, rows[:, 1:])


def counted(rows: Any, eos: int | None) -> int:
    """The number of targets in rows of numpy or torch, (B, T + 1)."""
    inputs = rows[:, :-1]
    return int(np.prod(inputs.shape)) if eos is None else int((inputs != eos).sum())


def check_boundaries(tokens: Tokens, settings: Settings) -> None:
    """Refuse to keep apart what nobody knows the ends of."""
    if settings.reset_positions and tokens.eos is None:
        raise Refused(
            what="where documents end is not known",
            where="--reset-positions",
            why="the data are token ids, and no model's config names an eos_token_id below its vocab_size",
            remedy="name the id that ends a document in the model's config.json, or leave --reset-positions out",
        )


def check_resets(model: PreTrainedModel, name: str, length: int) -> None:
    """Refuse a model in which packed documents reach each other although positions begin again.

    Measured: the logits of two documents in one sequence are those of the two on their own, up to rounding, sqrt(eps)
    of the largest.

    Raises:
        Refused: they are not, or the model takes no ``position_ids``.
    """

    def refused(why: str) -> Refused:
        return Refused(
            what="its packed documents cannot be kept apart",
            where=name,
            why=why,
            remedy="leave --reset-positions out, or give a model of transformers whose attention is made by"
            " create_causal_mask",
        )

    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise refused(f"{type(model).__name__}.forward takes no position_ids")
    half = min(8, length // 2)
    embedding: Any = model.get_input_embeddings()
    rows = torch.randint(embedding.num_embeddings, (2, 2 * half), generator=torch.Generator().manual_seed(0))
    rows = rows.to(embedding.weight.device)
    places = torch.arange(half, device=rows.device)
    training = model.training
    try:
        with quiet(), torch.no_grad():
            model.eval()
            cache = {"use_cache": False}
            packed = model(input_ids=rows, position_ids=places.repeat(2, 2), **cache).logits.float()
            apart = [
                model(input_ids=part, position_ids=places.repeat(2, 1), **cache).logits.float()
                for part in (rows[:, :half], rows[:, half:])
            ]
    except Exception as error:  # whatever its own forward pass raises
        raise refused(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error
    finally:
        model.train(training)
    change = (packed - torch.cat(apart, dim=1)).abs().max()
    if not change <= torch.finfo(torch.float32).eps ** 0.5 * packed.abs().max():
        raise refused(f"the logits of a document change by up to {change:.2g} with the one before it")
