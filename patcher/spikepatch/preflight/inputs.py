"""What a model is measured on: random token ids, or those of a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spikepatch.errors import Refused
from spikepatch.quiet import quiet
from spikepatch.residual.trace import example_of

if TYPE_CHECKING:
    from spikepatch.source import Source


def random_tokens(model: nn.Module, *, tokens: int, batch: int, seed: int) -> dict[str, torch.Tensor]:
    """Random token ids in place of those that the model is traced with, without the padding token."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(seed)
    longest = getattr(config, "max_position_embeddings", None) or tokens
    result = {}
    for name, traced in example_of(model).items():
        if traced.is_floating_point():
            result[name] = traced
            continue
        shape = (traced.shape[0] * batch, min(tokens, longest))
        ids = torch.randint(0, config.vocab_size, shape, generator=generator)
        padding = getattr(config, "pad_token_id", None)
        result[name] = torch.where(ids == padding, (ids + 1) % config.vocab_size, ids) if padding is not None else ids
    return result


def text_tokens(path: Path, source: Source | None, *, tokens: int, batch: int) -> dict[str, torch.Tensor]:
    """``batch`` sequences of ``tokens`` ids from the beginning of a file, by the source's own tokenizer.

    Raises:
        Refused: the source has no usable tokenizer, or the file cannot be read or is too short.
    """
    import transformers

    def refused(why: str, remedy: str) -> Refused:
        return Refused(what="the tokens cannot be taken from the file", where=str(path), why=why, remedy=remedy)

    if source is None or source.folder is None:
        raise refused("there is no tokenizer beside the model", "pass example_inputs={'input_ids': ...} in Python")
    if not path.is_file():
        raise refused("there is no such file", "give a text file")
    with quiet():
        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
            ids = tokenizer(path.read_text(encoding="utf-8")).input_ids
        except Exception as error:  # whatever a tokenizer's own loading raises
            raise refused(" ".join(str(error).split())[:200], "leave --text out for random tokens") from error
    if len(ids) < tokens * batch:
        raise refused(f"it has {len(ids)} tokens, {batch} x {tokens} are asked for", "a longer file, or --tokens")
    return {"input_ids": torch.tensor(ids[: tokens * batch]).reshape(batch, tokens)}
