"""Tokens in a file, and batches of it: nothing lost, nothing twice, the same everywhere."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikepatch.data.rows import Reading
from spikepatch.data.tokenizing import Tokenizing, of_source
from spikepatch.errors import BadSource, BadTarget, Refused
from spikepatch.source.open import open_source
from spikepatch.training import tokens as module
from spikepatch.training.batches import _mapped, batch, check_enough, held_out_batches
from spikepatch.training.tokens import Tokens
from tests.data.test_documents import megatron

EOS = b"\xff"


def as_bytes(limit: int = 256) -> Tokenizing:
    """What a model without a tokenizer gets, with a vocabulary of ``limit``."""
    source = open_source("arch:gpt2", weights=False)
    source.config.vocab_size = limit
    return of_source(source, "the model")


def prepare(data: list[str], tokenizing: Tokenizing, folder: Path, **options: Any) -> Tokens:
    return module.prepare(data, lambda text: tokenizing, folder, **options)


def content(tokens: Tokens) -> npt.NDArray[Any]:
    return np.fromfile(tokens.file, dtype=tokens.dtype)


def write(folder: Path, *documents: str) -> str:
    """A jsonl file; returns its path."""
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    """Some 6,000 bytes in 20 documents."""
    words = random.Random(0)
    texts = ["".join(words.choices("abcdefgh \n", k=300)) for _ in range(20)]
    return prepare([write(tmp_path, *texts)], as_bytes(), tmp_path / "data")


@settings(max_examples=15)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=20), piece=st.integers(1, 40))
def test_documents_are_packed_with_eos_between(
    texts: list[str], piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """However they are cut for the tokenizer; empty documents leave nothing."""
    texts = [text for text in texts if text.isprintable()] + ["last"]
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        patch.setattr("spikepatch.data.rows.PIECE", piece)
        found = prepare([write(folder, *texts)], as_bytes(), folder / "data")
    kept = [text.encode() for text in texts if text]
    expected = EOS.join(kept) + EOS
    assert bytes(content(found).astype(np.uint8)) == expected
    assert (found.count, found.documents, found.dtype, found.vocabulary) == (len(expected), len(kept), "uint16", 256)


def test_the_bytes_of_the_standard_library(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    found = prepare(
        ["builtin:stdlib"],
        as_bytes(),
        tmp_path,
        progress=lambda step, done=0, total=0: steps.append((step, done, total)),
    )
    assert found.count > 5_000_000
    assert found.held_out == 1 << 18
    assert int((content(found) == EOS[0]).sum()) == found.documents > 500
    done = [(done, total) for step, done, total in steps if step == "tokenising"]
    assert len(done) > 5
    assert done == sorted(done)
    assert done[-1][0] == done[-1][1] > 5_000_000


@pytest.mark.slow
def test_a_real_tokenizer(smollm2: Path, tmp_path: Path) -> None:
    """What it decodes to is the text again, document by document; special tokens in a text are text."""
    tokenizing = of_source(open_source(str(smollm2), weights=False), "smollm2")
    source = Path(os.__file__).read_text()
    texts = [source, "a <|im_end|> in the text", "Genesis 1:1 in 日本語, 🙂"]
    found = prepare([write(tmp_path, *texts)], tokenizing, tmp_path / "data")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizing.eos == tokenizer.eos_token_id
    ends = np.flatnonzero(content(found) == tokenizing.eos)
    assert len(ends) == found.documents == 3
    parts = np.split(content(found), ends + 1)[:-1]
    assert [tokenizer.decode(part[:-1].tolist()) for part in parts] == texts
    assert (found.dtype, found.vocabulary) == ("uint16", 49152)
    assert found.count < len(source) / 2


def test_a_large_vocabulary(tmp_path: Path) -> None:
    def encode(texts: object) -> list[npt.NDArray[Any]]:
        return [np.array([70_000, 1], dtype=np.uint32)]

    tokenizing = Tokenizing("large", encode, 69_999, 80_000, "", 75_000, "a model")
    found = prepare([write(tmp_path, "x")], tokenizing, tmp_path / "data")
    assert found.dtype == "uint32"
    assert content(found).tolist() == [70_000, 1, 69_999]
    assert found.vocabulary == 75_000


def test_a_token_that_a_model_does_not_have(tmp_path: Path) -> None:
    """Sample and EOS fit, and a text does not."""
    tokenizing = Tokenizing("some", lambda texts: [np.array([5, 99])], 1, 100, "", 99, "small")
    with pytest.raises(Refused, match=r"small: the model's vocabulary is too small.*\n.*some gives the id 99, and the"):
        prepare([write(tmp_path, "x")], tokenizing, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_the_same_data_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "one", "two" * 50)
    first = prepare([path], as_bytes(), tmp_path / "data")
    before = first.file.stat()
    os.utime(path, (1, 1))
    renamed = Path(path).rename(tmp_path / "other.jsonl")
    monkeypatch.setattr(module, "_write", None)  # is not called
    again = prepare([str(renamed)], as_bytes(limit=300), tmp_path / "data")
    assert again == first
    assert again.file.stat() == before


@pytest.mark.parametrize("change", ["text", "order", "tokenizer", "evaluation"])
def test_what_changes_is_noticed(change: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("one " * 100)
    two.write_text("two " * 100)
    first = prepare([str(one), str(two)], as_bytes(), tmp_path / "data")
    data, tokenizing, evaluation = [str(one), str(two)], as_bytes(), []
    match change:
        case "text":
            one.write_text("One " + "one " * 99)
        case "order":
            data.reverse()
        case "tokenizer":
            tokenizing = Tokenizing(
                "upper", lambda texts: as_bytes().encode([t.upper() for t in texts]), 255, 256, "u", 256, "m"
            )
        case "evaluation":
            data, evaluation = [str(one)], [str(two)]
    second = prepare(data, tokenizing, tmp_path / "data", eval_data=evaluation)
    assert second.fingerprint != first.fingerprint
    assert second.file != first.file
    assert len(content(first)) == first.count  # still there, for whoever has it open
    if change == "evaluation":
        assert np.array_equal(content(first), content(second))
        assert second.held_out == len("two " * 100) + 1


def test_the_fingerprint_is_the_same_everywhere(tmp_path: Path) -> None:
    found = [prepare([write(tmp_path, "one", "two")], as_bytes(), tmp_path / name) for name in ("a", "b")]
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].file != found[1].file


@pytest.mark.parametrize("damage", ["no description", "left over"])
def test_what_a_killed_run_leaves_is_not_used(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path, "one" * 100)
    first = prepare([path], as_bytes(), tmp_path / "data")
    expected = content(first)
    first.file.with_suffix(".json").unlink()
    if damage == "left over":
        first.file.rename(first.file.with_name(f".{first.file.name}.new.spikepatch"))
    _mapped.cache_clear()
    again = prepare([path], as_bytes(), tmp_path / "data")
    assert again == first
    assert np.array_equal(content(again), expected)
    assert not list((tmp_path / "data").glob(".tokens-*"))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("truncated", "it has 10 bytes"),
        ("gone", "there is no such file"),
        ("a flipped byte", "its hash"),
        ("zeros", "its hash"),
        ("held_out", "its hash"),
        ("eos", "its hash"),
        ("no JSON", "JSONDecodeError"),
        ("another type", "TypeError"),
    ],
)
def test_damage_is_named(damage: str, why: str, tmp_path: Path) -> None:
    """And the remedy makes the same tokens again."""
    path = write(tmp_path, "one" * 100)
    first = prepare([path], as_bytes(), tmp_path / "data")
    description = first.file.with_suffix(".json")
    stored, said = bytearray(first.file.read_bytes()), description.read_text()
    match damage:
        case "truncated":
            os.truncate(first.file, 10)
        case "gone":
            first.file.unlink()
        case "a flipped byte":
            stored[77] ^= 1
            first.file.write_bytes(stored)
        case "zeros":
            first.file.write_bytes(bytes(len(stored)))
        case "held_out":
            description.write_text(said.replace(f'"held_out": {first.held_out}', '"held_out": 99'))
        case "eos":
            description.write_text(said.replace('"eos": 255', '"eos": 3'))
        case "no JSON":
            description.write_text(said[:20])
        case "another type":
            description.write_text(said.replace("uint16", "uint17"))
    with pytest.raises(BadSource, match=rf"tokens-.*: the tokens are not as they were written\n  why: .*{why}.*\n"):
        prepare([path], as_bytes(), tmp_path / "data")
    first.file.unlink(missing_ok=True)
    description.unlink()
    assert prepare([path], as_bytes(), tmp_path / "data") == first


def test_bos(tmp_path: Path) -> None:
    """Once for each document, however many pieces it has; tokens that are given get none."""
    path = write(tmp_path, "a\n" * 30, "b")
    adding = replace(as_bytes(), bos=7, adds=(7,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spikepatch.data.rows.PIECE", 10)
        found = prepare([path], adding, tmp_path / "data")
    assert bytes(content(found).astype(np.uint8)) == b"\7" + b"a\n" * 30 + EOS + b"\7b" + EOS
    plain = prepare([path], adding, tmp_path / "data", bos="never")
    assert plain.count == found.count - 2
    assert prepare([path], as_bytes(), tmp_path / "other").count == plain.count
    assert prepare([path], replace(as_bytes(), bos=7), tmp_path / "data", bos="always").count == found.count
    with pytest.raises(Refused, match=r"the model: its tokenizer has no token that begins a text\n.*--bos always"):
        prepare([path], as_bytes(), tmp_path / "data", bos="always")
    lines = tmp_path / "ids.jsonl"
    lines.write_text('{"input_ids": [1, 2]}\n{"input_ids": [3]}\n')
    assert content(prepare([str(lines)], adding, tmp_path / "data")).tolist() == [1, 2, 3]


def test_documents_of_tokens(tmp_path: Path) -> None:
    """As they are, in the order of the files; a later call finds them."""
    megatron(tmp_path / "m", [[1, 2, 3], [4], [5, 255]], [0, 1, 3])
    np.arange(10, dtype=np.uint32).tofile(tmp_path / "raw.bin")
    data, how = [str(tmp_path / "raw.bin"), str(tmp_path / "m.bin")], Reading(token_dtype="uint32")
    found = prepare(data, as_bytes(), tmp_path / "data", reading=how)
    assert content(found).tolist() == [*range(10), 1, 2, 3, 4, 5, 255]
    assert (found.documents, found.dtype) == (3, "uint16")
    assert prepare(data, as_bytes(), tmp_path / "data", reading=how) == found
    megatron(tmp_path / "m", [[1, 2, 3], [4], [5, 255]], [0, 2, 3])  # the same tokens, and other documents
    assert prepare(data, as_bytes(), tmp_path / "data", reading=how).file != found.file


def test_tokens_that_the_model_does_not_have(tmp_path: Path) -> None:
    for name, ids in (("high", [5, 256]), ("low", [-1, 5])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"input_ids": ids}))
        with pytest.raises(
            Refused, match=rf"{name}\.jsonl: the tokens are not the model's\n.*id {ids[name == 'high']} "
        ):
            prepare([str(path)], as_bytes(), tmp_path / "data")


@pytest.mark.parametrize("option", [{"split": "test"}, {"token_dtype": "uint16"}])
def test_options_without_a_meaning(option: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(option)).replace("_", "-")
    with pytest.raises(Refused, match=rf"--{name} .*: --{name} has no meaning for these data\n.*none of them is a"):
        prepare([write(tmp_path, "x")], as_bytes(), tmp_path / "data", reading=Reading(**option))


def test_rows_without_a_document(tmp_path: Path) -> None:
    """They are counted and named, and end it; or are left out, if that is asked for."""
    path = tmp_path / "a.jsonl"
    bad = ["{", '{"text": null}', '{"other": 1}', "[]", '{"text": 3}', '"x"', "nul"]
    path.write_text("\n".join(['{"text": "good"}', *bad, '{"text": "good"}']))
    with pytest.raises(BadSource) as caught:
        prepare([str(path)], as_bytes(), tmp_path / "data")
    assert str(caught.value).startswith("--data: 7 rows have no document\n")
    assert f"{path}:2: it is not JSON" in str(caught.value)
    assert f'{path}:4: it has no "text"; its fields are other' in str(caught.value)
    assert "(and 2 more)" in str(caught.value)
    assert "--skip-bad leaves such rows out" in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []
    found = prepare([str(path)], as_bytes(), tmp_path / "data", reading=Reading(skip_bad=True))
    assert (found.left_out, found.documents, found.count) == (7, 2, 10)


def _prepare(path: str, folder: Path) -> None:
    found = prepare([path], as_bytes(), folder)
    with open(folder / "found", "a") as file:
        file.write(f"{found.fingerprint} {found.file.stat().st_ino}\n")


@pytest.mark.slow
def test_ranks_that_start_together(tmp_path: Path) -> None:
    """One tokenises, and the others find its file: the same one."""
    path = write(tmp_path, *("one two three\n" * 2000 for _ in range(40)))
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_prepare, args=(path, tmp_path / "data")) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    lines = (tmp_path / "data" / "found").read_text().splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == 1


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.txt").write_text("x" * 100)
    empty, text = str(tmp_path / "empty.txt"), str(tmp_path / "text.txt")
    with pytest.raises(Refused, match=r"--data: the data hold no text\n.*empty\n.*other files"):
        prepare([empty], as_bytes(), tmp_path / "data")
    with pytest.raises(Refused, match="--eval-data: the data hold no text"):
        prepare([text], as_bytes(), tmp_path / "data", eval_data=[empty])
    with pytest.raises(Refused, match=r"text\.txt: the same data are for training and for evaluation\n(.*\n)*.*one of"):
        prepare([text], as_bytes(), tmp_path / "data", eval_data=[text])
    assert list((tmp_path / "data").iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadTarget, match=r"file/data: the tokens cannot be written\n.*\n.*permissions"):
        prepare([write(tmp_path, "x")], as_bytes(), tmp_path / "file" / "data")


def test_too_few_data(tokens: Tokens) -> None:
    windows = tokens.windows(64)
    check_enough(tokens, sequences=windows, length=64)
    with pytest.raises(
        Refused, match=rf"--data: .* too few for one batch\n.* {tokens.trained:,} tokens.* {windows:,} windows"
    ):
        check_enough(tokens, sequences=windows + 1, length=64)
    held_out = tokens.held_out
    check_enough(tokens, sequences=1, length=held_out - 1)
    with pytest.raises(
        Refused, match=rf"--eval-data: .* too few\n.* {held_out} tokens are held out; .* {held_out} \+ 1"
    ):
        check_enough(tokens, sequences=1, length=held_out)


@settings(max_examples=50)
@given(
    count=st.integers(47, 400),  # at least one window of 16 and its last target beside 30 held-out tokens
    held_out=st.integers(0, 30),
    length=st.integers(1, 16),
    sequences=st.integers(1, 7),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_is_every_window_once(
    count: int, held_out: int, length: int, sequences: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Token i of the file has the value i, so a row tells where it is from."""
    tokens = counting(tmp_path_factory.getbasetemp(), count, held_out)
    windows = tokens.windows(length)
    assert windows == (count - held_out - 1) // length > 0
    batches = -(-3 * windows // sequences)
    rows = np.concatenate(
        [batch(tokens, seed=seed, index=i, sequences=sequences, length=length) for i in range(batches)]
    )
    assert rows.dtype == np.int64
    assert (np.diff(rows) == 1).all()
    assert rows.max() < tokens.trained
    for epoch in range(3):
        starts = rows[epoch * windows : (epoch + 1) * windows, 0]
        assert np.array_equal(np.sort(starts), np.arange(windows) * length)
    evaluated = [*held_out_batches(tokens, sequences=sequences, length=length)]
    assert all(each.min() >= tokens.trained for each in evaluated)
    if evaluated:
        found = np.concatenate(evaluated)
        assert np.array_equal(found[:, 0], tokens.trained + length * np.arange((held_out - 1) // length))
        assert {len(each) for each in evaluated[:-1]} <= {sequences}


def counting(folder: Path, count: int, held_out: int) -> Tokens:
    file = folder / f"counting-{count}.bin"
    np.arange(count, dtype=np.uint16).tofile(file)
    return Tokens(file, count, "uint16", 1, f"{count} {held_out}", 1 << 16, held_out)


@given(ranks=st.sampled_from([1, 2, 3, 4, 6, 12]), index=st.integers(0, 10**9), seed=st.integers(0, 100))
def test_ranks_share_a_batch(ranks: int, index: int, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokens = counting(tmp_path_factory.getbasetemp(), 1000, 50)
    whole = batch(tokens, seed=seed, index=index, sequences=12, length=8)
    parts = [batch(tokens, seed=seed, index=index, sequences=12, length=8, rank=r, ranks=ranks) for r in range(ranks)]
    assert {len(part) for part in parts} == {12 // ranks}
    assert np.array_equal(np.concatenate(parts), whole)


def test_seeds_and_epochs_have_their_own_order(tmp_path: Path) -> None:
    tokens = counting(tmp_path, 4001, 0)
    orders = {
        tuple(batch(tokens, seed=seed, index=index, sequences=500, length=8)[:, 0])
        for seed in range(3)
        for index in range(3)  # an epoch each
    }
    assert len(orders) == 9


def test_the_order_does_not_depend_on_the_size_of_a_batch(tmp_path: Path) -> None:
    tokens = counting(tmp_path, 1000, 0)
    large = batch(tokens, seed=1, index=0, sequences=60, length=8)
    small = np.concatenate([batch(tokens, seed=1, index=i, sequences=20, length=8) for i in range(3)])
    assert np.array_equal(large, small)


def test_batches_of_a_real_file(tokens: Tokens) -> None:
    """Rows are pieces of the file, and a far batch costs no more than a near one."""
    stored = content(tokens)
    for index in (0, 1, 10**12):
        for row in batch(tokens, seed=0, index=index, sequences=4, length=32):
            assert bytes(row.astype(np.uint8)) in bytes(stored[: tokens.trained].astype(np.uint8))
    assert tokens.held_out == tokens.count // 20


def test_data_of_a_folder_that_moved(tokens: Tokens, tmp_path: Path) -> None:
    """The description holds no path."""
    moved = tokens.file.parent.rename(tmp_path / "moved")
    again = prepare([str(tmp_path / "documents.jsonl")], as_bytes(), moved)
    assert again.file.parent == moved
    assert again.fingerprint == tokens.fingerprint
