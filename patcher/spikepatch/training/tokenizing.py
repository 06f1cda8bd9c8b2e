"""From text to token ids: the tokenizer that lies beside a model, or bytes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spikepatch.errors import BadSource, Refused
from spikepatch.quiet import quiet
from spikepatch.source.tokenizer import PROBE, SAMPLE, has_tokenizer, source_tokenizer

if TYPE_CHECKING:
    from spikepatch.source.open import Source

#: The name of what stands in for a tokenizer.
BYTES = "bytes"

#: No UTF-8 text has this byte.
_BYTES_EOS = 0xFF

Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Tokenizing:
    """How text becomes token ids.

    Attributes:
        name: for people.
        encode: texts -> ids of each, without special tokens at either end; text that looks like a special token is
            text.
        eos: the id that ends a document.
        size: 1 + the highest id that the tokenizer knows.
        fingerprint: SHA-256 of its vocabulary and of what it does to a sample text.
        limit: the smallest vocabulary among the models that are to be trained; an id that is not below it is refused.
        narrowest: the model with that vocabulary.
    """

    name: str
    encode: Callable[[Sequence[str]], list[Ids]]
    eos: int
    size: int
    fingerprint: str
    limit: int
    narrowest: str

    @property
    def vocabulary(self) -> int:
        """All ids are below it."""
        return min(self.size, self.limit)


def of_source(source: Source, name: str) -> Tokenizing:
    """The tokenizer among the source's files; bytes, where there is none.

    Bytes are those of the text in UTF-8, and 0xFF, which UTF-8 never has, ends a document: a vocabulary of 256.

    Args:
        source: opened, weights or not.
        name: of the model, for errors.

    Raises:
        BadSource: the tokenizer cannot be loaded, or has no token that ends a text.
        Refused: the model's vocabulary is smaller than the tokenizer's.
    """
    limit = source.config.get_text_config().vocab_size
    has_one = has_tokenizer(source.copied_files)
    found = _of_folder(source, limit, name) if has_one else _bytes(limit, name)
    highest = max(found.eos, *(int(ids.max()) for ids in found.encode([SAMPLE, PROBE])))
    if highest >= limit:
        raise too_narrow(found, highest)
    return found


def shared(models: Sequence[tuple[str, Tokenizing]]) -> Tokenizing:
    """The one tokenizer of all models, with the smallest of their vocabularies.

    Args:
        models: name and tokenizer of each; at least one.

    Raises:
        Refused: two of them differ, in their vocabularies, or in what they do to a sample text.
    """
    (first, ours), *others = models
    for name, theirs in others:
        if theirs.fingerprint != ours.fingerprint:
            raise Refused(
                what="the models do not have the same tokenizer",
                where=f"{first}, {name}",
                why=f"{_difference(first, ours, name, theirs)}; runs on different tokens cannot be compared",
                remedy="train them one command each, or give their folders the same tokenizer files",
            )
    narrowest = min((tokenizing for _, tokenizing in models), key=lambda tokenizing: tokenizing.limit)
    return dataclasses.replace(ours, limit=narrowest.limit, narrowest=narrowest.narrowest)


def too_narrow(tokenizing: Tokenizing, highest: int) -> Refused:
    """The error for an id that a model has no embedding for."""
    return Refused(
        what="the model's vocabulary is too small for its tokenizer",
        where=tokenizing.narrowest,
        why=f"{tokenizing.name} gives the id {highest}, and the model has {tokenizing.limit} ids, from 0",
        remedy="correct vocab_size in the model's config.json, or give the model the tokenizer that belongs to it",
    )


def _bytes(limit: int, model: str) -> Tokenizing:
    def encode(texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    return Tokenizing(BYTES, encode, _BYTES_EOS, 256, _fingerprint(BYTES), limit, model)


def _of_folder(source: Source, limit: int, model: str) -> Tokenizing:
    assert source.folder is not None
    tokenizer = source_tokenizer(source)
    if isinstance(tokenizer, str):
        raise BadSource(
            "its tokenizer cannot be used",
            where=source.name,
            why=tokenizer,
            remedy="repair its tokenizer files; without any of them the model is trained on bytes",
        )
    eos, vocabulary = tokenizer.eos_token_id, tokenizer.get_vocab()
    if eos is None:
        raise BadSource(
            "its tokenizer has no token that ends a text",
            where=source.name,
            why="documents are packed one after the other, with that token between them",
            remedy='name one of its tokens as "eos_token" in tokenizer_config.json',
        )

    def encode(texts: Sequence[str]) -> list[Ids]:
        with quiet():  # it warns of texts that are longer than the model's context
            found = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [np.asarray(ids, dtype=np.uint32) for ids in found]

    behaviour = [ids.tolist() for ids in encode([SAMPLE, PROBE])]
    fingerprint = _fingerprint(sorted(vocabulary.items()), eos, behaviour)
    name = f"{type(tokenizer).__name__} of {source.short_name}"
    return Tokenizing(name, encode, eos, 1 + max(vocabulary.values()), fingerprint, limit, model)


def _difference(first: str, ours: Tokenizing, second: str, theirs: Tokenizing) -> str:
    if ours.size != theirs.size:
        return f"that of {first} ({ours.name}) has {ours.size} ids, that of {second} ({theirs.name}) {theirs.size}"
    if ours.eos != theirs.eos:
        return f"{first} ends a text with the id {ours.eos}, {second} with {theirs.eos}"
    pairs = zip(ours.encode([SAMPLE, PROBE]), theirs.encode([SAMPLE, PROBE]), strict=True)
    if all(np.array_equal(a, b) for a, b in pairs):
        return f"{first} and {second} have different names for some of their {ours.size} ids"
    return f"{first} and {second} give different ids for the same text"


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
