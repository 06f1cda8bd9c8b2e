"""What a model is measured on: random token ids, or those of a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spikepatch.apply.values.draw import narrow
from spikepatch.errors import Refused, first_line
from spikepatch.quiet import quiet
from spikepatch.residual.features import place_tokens
from spikepatch.residual.trace import full_example
from spikepatch.source.local import read_file
from spikepatch.source.tokenizer import source_tokenizer

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


def text_tokens(path: Path, source: Source | None, *, tokens: int, batch: int) -> dict[str, torch.Tensor]:
    """``batch`` sequences of ``tokens`` ids from the beginning of a file, by the source's own tokenizer.

    Raises:
        Refused: the source has no usable tokenizer, or the file cannot be read or is too short.
    """

    def refused(why: str, remedy: str) -> Refused:
        return Refused(what="the tokens cannot be taken from the file", where=str(path), why=why, remedy=remedy)

    if source is None or source.folder is None:
        raise refused("there is no tokenizer beside the model", "pass example_inputs={'input_ids': ...} in Python")
    if not path.exists():
        raise refused("there is no such file", "give a text file")
    tokenizer = source_tokenizer(source)
    if isinstance(tokenizer, str):
        raise refused(tokenizer, "leave --text out for random tokens")
    with quiet():
        try:
            ids = tokenizer(read_file(path).decode("utf-8")).input_ids
        except Exception as error:  # whatever reading or a tokenizer raises
            raise refused(first_line(error), "give a text file, in UTF-8") from error
    tokens = _length(source.config.get_text_config(), tokens)
    if len(ids) < tokens * batch:
        raise refused(f"it has {len(ids)} tokens, {batch} x {tokens} are asked for", "a longer file, or --tokens")
    return {"input_ids": torch.tensor(ids[: tokens * batch]).reshape(batch, tokens)}


def _length(config: Any, tokens: int) -> int:
    """``tokens``, or as many as the model has positions for."""
    limit = getattr(config, "max_position_embeddings", None) or tokens
    return min(tokens, limit) if limit > 0 else tokens  # XLNet has -1 for any length
