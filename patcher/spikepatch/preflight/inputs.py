"""What a model is measured on: random token ids, or those of a text."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spikepatch.apply.values.draw import narrow
from spikepatch.data.documents import BadRows, check_used, inputs
from spikepatch.data.rows import BadRow, Reading
from spikepatch.data.tokenizing import of_given_ids, of_source
from spikepatch.errors import Refused
from spikepatch.residual.features import place_tokens
from spikepatch.residual.trace import full_example

if TYPE_CHECKING:
    from spikepatch.source.open import Source


def random_tokens(model: nn.Module, *, tokens: int, batch: int, seed: int) -> dict[str, torch.Tensor]:
    """Random token ids in place of those that the model is traced with, without the padding token; places of images and
    sounds stay.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(narrow(seed, 64))
    result = {}
    example = full_example(model)
    length = next((x.shape[-1] for x in example.values() if not x.is_floating_point()), 0)
    places = place_tokens(model.config)
    for name, traced in example.items():
        if traced.is_floating_point() or traced.shape[-1] != length:  # features, and their sizes
            result[name] = traced.repeat(batch, *[1] * (traced.ndim - 1))
            continue
        shape = (traced.shape[0] * batch, max(_length(config, tokens), length if places else 0))
        first = min(shape[1], traced.shape[1])
        if int(traced.max()) < 2:  # types of tokens, or a mask
            result[name] = torch.zeros(shape, dtype=traced.dtype)
            result[name][:, :first] = traced[:1, :first]
            continue
        ids = torch.randint(0, config.vocab_size, shape, generator=generator)
        taken = [padding for padding in [getattr(config, "pad_token_id", None)] if padding is not None]
        for token in [*taken, *places]:
            ids = torch.where(ids == token, (ids + 1) % config.vocab_size, ids)
        for token in places:
            ids[:, :first] = torch.where(traced[:1, :first] == token, token, ids[:, :first])
        result[name] = ids
    return result


def text_tokens(
    data: str | Path, source: Source | None, *, tokens: int, batch: int, reading: Reading | None = None
) -> dict[str, torch.Tensor]:
    """``batch`` sequences of ``tokens`` ids from the beginning of data, as ``train`` takes them: by the source's own
    tokenizer, or as bytes where it has none; or ids that are given.

    Raises:
        BadSource, Refused: the data cannot be read or are too few, or do not fit the model or its tokenizer.
    """

    def refused(why: str, remedy: str) -> Refused:
        return Refused(what="the tokens cannot be taken from the file", where=str(data), why=why, remedy=remedy)

    if source is None:
        raise refused(
            "a model in memory has no tokenizer beside it", "pass example_inputs={'input_ids': ...} in Python"
        )
    tokens = _length(source.config.get_text_config(), tokens)
    with tempfile.TemporaryDirectory() as cache:
        found = inputs([str(data)], "--text", reading=reading, cache=Path(cache))
        check_used(found, reading or Reading())
        for_text = any(each.kind == "text" for each in found)
        tokenizing = (of_source if for_text else of_given_ids)(source, source.name)
        ids, begins, bad = list[int](), True, BadRows()
        for piece in itertools.chain.from_iterable(each.read() for each in found):
            if isinstance(piece, BadRow):
                bad.add(piece)
                continue
            ids += tokenizing.ids(piece, "auto", begins=begins, where=str(data))
            begins = piece.last
            if len(ids) >= tokens * batch:
                break
    bad.check("--text")
    if len(ids) < tokens * batch:
        raise refused(f"it has {len(ids)} tokens, {batch} x {tokens} are asked for", "a longer file, or --tokens")
    return {"input_ids": torch.tensor(ids[: tokens * batch]).reshape(batch, tokens)}


def _length(config: Any, tokens: int) -> int:
    """``tokens``, or as many as the model has positions for."""
    limit = getattr(config, "max_position_embeddings", None) or tokens
    return min(tokens, limit) if limit > 0 else tokens  # XLNet has -1 for any length
