"""From text to token ids: the tokenizer that lies beside a model, or bytes; or ids that are given already."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spikepatch.data.rows import DocumentPiece, Ids
from spikepatch.errors import BadSource, Refused
from spikepatch.quiet import quiet
from spikepatch.source.tokenizer import PROBE, SAMPLE, has_tokenizer, source_tokenizer

if TYPE_CHECKING:
    from spikepatch.source.open import Source

#: The name of what stands in for a tokenizer, and of what needs none.
BYTES, GIVEN = "bytes", "token ids as given"

#: When documents begin with a token: where the tokenizer itself adds one (auto), always, or never.
Bos = Literal["auto", "always", "never"]

#: No UTF-8 text has this byte.
_BYTES_EOS = 0xFF


@dataclass(frozen=True)
class Tokenizing:
    """How text becomes token ids.

    Attributes:
        name: for people.
        encode: texts -> ids of each, without special tokens at either end; text that looks like a special token is
            text.
        eos: the id that ends a document; None where nothing says which.
        bos: the id that begins one, if there is such an id.
        adds: what the tokenizer itself puts before a text.
        size: 1 + the highest id that the tokenizer knows.
        fingerprint: SHA-256 of its vocabulary and of what it does to a sample text.
        limit: the smallest vocabulary among the models that are to be trained; an id that is not below it is refused.
        narrowest: the model with that vocabulary.
    """

    name: str
    encode: Callable[[Sequence[str]], list[Ids]]
    eos: int | None
    size: int
    fingerprint: str
    limit: int
    narrowest: str
    bos: int | None = None
    adds: tuple[int, ...] = ()

    def front(self, bos: Bos) -> tuple[int, ...]:
        """What every document begins with.

        Raises:
            Refused: it is to be a token that the tokenizer does not have.
        """
        if bos != "always":
            return self.adds if bos == "auto" else ()
        if self.bos is None:
            raise Refused(
                what="its tokenizer has no token that begins a text",
                where=self.narrowest,
                why=f"--bos always asks for one, and {self.name} names none",
                remedy='name one of its tokens as "bos_token" in tokenizer_config.json, or leave --bos out',
            )
        return (self.bos,)

    def ids(self, piece: DocumentPiece, bos: Bos, *, begins: bool, where: str) -> list[int]:
        """What a piece of a document is; see ``encoded``."""
        block = encoded([(piece, begins)], self, self.front(bos), where)
        return [int(one) for part in block for one in part]

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
    assert found.eos is not None
    highest = max(found.eos, *found.adds, *(int(ids.max()) for ids in found.encode([SAMPLE, PROBE])))
    if highest >= limit:
        raise too_narrow(found, highest)
    return found


def of_given_ids(source: Source, name: str) -> Tokenizing:
    """For data that are token ids already; ``eos`` is what the model's config names, if it names one."""
    config = source.config.get_text_config()
    limit, eos = config.vocab_size, getattr(config, "eos_token_id", None)

    def encode(texts: Sequence[str]) -> list[Ids]:
        raise AssertionError("there is no text")

    first = eos[0] if isinstance(eos, (list, tuple)) and eos else eos
    known = first if isinstance(first, int) and 0 <= first < limit else None
    return Tokenizing(GIVEN, encode, known, limit, _fingerprint(GIVEN), limit, name)


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


def outside(tokenizing: Tokenizing, where: str, found: int) -> Refused:
    """The error for a token that was given, and that a model does not have."""
    return Refused(
        what="the tokens are not the model's",
        where=where,
        why=f"the id {found} is among them, and {tokenizing.narrowest} has {tokenizing.limit} ids, from 0",
        remedy="check --token-dtype, or give the model the vocab_size of the tokens",
    )


def encoded(
    pieces: Sequence[tuple[DocumentPiece, bool]], tokenizing: Tokenizing, front: Sequence[int], where: str
) -> Iterator[Ids]:
    """The tokens of pieces, each with whether it begins a document: those of a text between ``front`` and EOS; given
    ones as they are.

    Raises:
        Refused: a model does not have one of them.
    """
    texts = [piece.content for piece, _ in pieces if isinstance(piece.content, str)]
    of_texts = iter(tokenizing.encode(texts) if texts else [])
    for piece, begins in pieces:
        if isinstance(piece.content, str):
            ids = next(of_texts)
            if len(ids) and (highest := int(ids.max())) >= tokenizing.limit:
                raise too_narrow(tokenizing, highest)
            assert tokenizing.eos is not None
            yield np.array([*front] if begins else [], dtype=np.int64)
            yield ids
            yield np.array([tokenizing.eos] if piece.last else [], dtype=np.int64)
        else:
            for wrong in (int(piece.content.min()), int(piece.content.max())):
                if not 0 <= wrong < tokenizing.limit:
                    raise outside(tokenizing, where, wrong)
            yield piece.content


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
    adds = _added_before(tokenizer)
    fingerprint = _fingerprint(sorted(vocabulary.items()), eos, tokenizer.bos_token_id, adds, behaviour)
    name, size = f"{type(tokenizer).__name__} of {source.short_name}", 1 + max(vocabulary.values())
    return Tokenizing(name, encode, eos, size, fingerprint, limit, model, tokenizer.bos_token_id, adds)


def _added_before(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer's own post-processor puts before a text: Llama's, Gemma's and Mistral's a BOS."""
    plain, whole = (tokenizer(SAMPLE, add_special_tokens=special)["input_ids"] for special in (False, True))
    place = next((i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:place])


def _difference(first: str, ours: Tokenizing, second: str, theirs: Tokenizing) -> str:
    if ours.size != theirs.size:
        return f"that of {first} ({ours.name}) has {ours.size} ids, that of {second} ({theirs.name}) {theirs.size}"
    if ours.eos != theirs.eos:
        return f"{first} ends a text with the id {ours.eos}, {second} with {theirs.eos}"
    if (ours.bos, ours.adds) != (theirs.bos, theirs.adds):
        begins = [f"{[*each.adds]} (BOS {each.bos})" for each in (ours, theirs)]
        return f"{first} begins a text with {begins[0]}, {second} with {begins[1]}"
    pairs = zip(ours.encode([SAMPLE, PROBE]), theirs.encode([SAMPLE, PROBE]), strict=True)
    if all(np.array_equal(a, b) for a, b in pairs):
        return f"{first} and {second} have different names for some of their {ours.size} ids"
    return f"{first} and {second} give different ids for the same text"


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
