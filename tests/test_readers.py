"""Every file that is read, with parts of it changed: it is refused in our words, or what it says is taken.

The same cases in every run: of a case that fails, reader and number are named, and ``Reader.case`` gives its bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.repocard import metadata_load
from markupsafe import Markup
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

import spikepatch
from spikepatch.apply.disk.manifest import digest, inherited_metadata, model_card
from spikepatch.apply.generated.patched_source import check_known
from spikepatch.data.documents import inputs
from spikepatch.data.rows import DocumentPiece
from spikepatch.errors import SpikepatchError
from spikepatch.plans.plan import Plan
from spikepatch.recipes.files import read_recipe
from spikepatch.report import figures, svg
from spikepatch.report.figures import Groups
from spikepatch.report.html import write_page
from spikepatch.source.checkpoint import read_checkpoint, read_tensor
from spikepatch.source.open import build_meta, open_source
from spikepatch.source.tokenizer import known_ids
from spikepatch.spikes.detector import SpikeDetector
from spikepatch.spikes.read_log import read_log
from spikepatch.spikes.spike_page import spike_page
from spikepatch.spikes.spike_report import judge
from spikepatch.training import checkpoints
from spikepatch.training.outcome import outcome
from spikepatch.training.page import page_of
from spikepatch.training.position import Position, restored
from spikepatch.training.tables import print_verdict
from tests.architectures import tiny_model
from tests.changes import ODD, changed, changed_bytes, changed_json, changed_line
from tests.residual.maps import plan_of
from tests.spikes.logs import LINES
from tests.training.synthetic import calm
from tests.training.synthetic import folder as training

#: What one case may add to the largest size that the process has had, in kB; and its seconds of computing.
MEMORY, SECONDS = 200_000, 10


@dataclass(frozen=True)
class Reader:
    """``content`` is what lies in ``file``; ``read`` reads it. ``cases``: of 500 in all."""

    file: Path
    change: Callable[[random.Random, bytes], bytes]
    read: Callable[[Path], object]
    cases: int
    content: bytes = b""

    def case(self, number: int) -> bytes:
        """The file in one of the cases; the first is the file as it was."""
        chance = random.Random(f"{self.file.name} {number}")
        return self.change(chance, self.content) if number else self.content


def tensors_of(file: Path) -> None:
    """What is accepted, safetensors' own reader takes too, with the same tensors."""
    checkpoint = read_checkpoint(file.parent)
    with safe_open(file, "pt") as theirs:
        assert set(theirs.keys()) == set(checkpoint.tensors)
        for name, entry in checkpoint.tensors.items():
            one, other = read_tensor(entry), theirs.get_tensor(name)
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def indexed(file: Path) -> None:
    """What is accepted is what the index says, in files that lie beside it."""
    found = read_checkpoint(file.parent).tensors
    assert {name: entry.file.name for name, entry in found.items()} == json.loads(file.read_bytes())["weight_map"]
    assert all(entry.file.parent == file.parent for entry in found.values())


def built(file: Path) -> None:
    """What is accepted can be built, or is refused then. What asks for much memory is not built here."""
    found = open_source(str(file.parent), weights=False)
    if _largest(json.loads(file.read_bytes())) < 5000:
        build_meta(found)


def _largest(value: Any) -> float:
    if isinstance(value, dict | list):
        return max(map(_largest, value.values() if isinstance(value, dict) else value), default=0)
    return abs(value) if isinstance(value, int | float) and value == value else 0


def patch_known(file: Path) -> None:
    source = open_source(f"{file.parent}/", weights=False)
    check_known(source)


def tokenizer_known(file: Path) -> None:
    known_ids(open_source(str(file.parent), weights=False))


def planned(file: Path) -> None:
    """What is accepted comes back as it was, and patches a model or is refused."""
    plan = Plan.from_dict(json.loads(file.read_bytes(), parse_constant=float))
    assert repr(Plan.from_dict(plan.to_dict())) == repr(plan)
    spikepatch.patch(tiny_model("gpt2"), plan)


def recipe(file: Path) -> None:
    """What is accepted makes a plan, or is refused then."""
    plan_of("gpt2", read_recipe(file)).to_json()


def shown(file: Path) -> None:
    """All that ``report`` does."""
    folder = file.parent if file.name == "run.json" else file.parents[2]
    found = outcome(folder)
    write_page(page_of(found), file.with_name("page"))
    print_verdict(found.verdict)


def judged(file: Path) -> None:
    """All that ``spikes`` does."""
    report = judge(read_log(file))
    json.dumps(report.to_dict(), allow_nan=False)
    write_page(spike_page([report]), file.with_name("page"))
    assert all([*report.log.describe(), *report.log.limits(), *report.lines()])


def read_documents(file: Path) -> None:
    for each in inputs([str(file)]):
        for piece in each.read():
            assert isinstance(piece, DocumentPiece) or (piece.where and piece.why)


def inherited(file: Path) -> None:
    card = model_card(plan_of("gpt2"), trust=True, auto_class="AutoModel", inherited=inherited_metadata(file, None))
    file.with_name("card").write_text(card, encoding="utf-8")
    metadata_load(file.with_name("card"))


def resumed(file: Path) -> None:
    model, optimizer = small_training()
    state = checkpoints.load(file.parent, model, optimizer)
    restored(file.parent, state, None)


def small_training() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b.weight": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor(3),
    "empty": torch.zeros(0, 2),
}

RECIPE = b"""
name = "own"
no_decay_embeddings = true
small_sublayers = true

[[transform]]
kind = "small_init"
base = "normal"
std = 0.02
cut = 3.0

[[transform]]
kind = "residual_init"

[[transform]]
kind = "embed_scale"
factor = 8.0
"""

CARD = b"""---
license: apache-2.0
language: [en, de]
pipeline_tag: text-generation
base_model: a/b
---
# A model
"""


def changed_header(chance: random.Random, content: bytes) -> bytes:
    """A file of safetensors: its header is changed as JSON, its length, or any bytes."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    how = chance.random()
    if how < 0.2:
        return changed_bytes(chance, content)
    if how < 0.3:
        return (
            chance.choice((chance.randrange(2 * length), chance.randrange(2**64))).to_bytes(8, "little") + header + data
        )
    text = changed_json(chance, header)
    return len(text).to_bytes(8, "little") + text + data + chance.choice((b"", b"", b"", b"x", bytes(9)))


def changed_values(chance: random.Random, content: bytes) -> bytes:
    """What the caller has read as JSON: its bytes are not ours to read."""
    return json.dumps(changed(chance, json.loads(content))).encode()


def changed_manifest(chance: random.Random, content: bytes) -> bytes:
    """Mostly with a digest of its own that fits, as who edits it on purpose would write it."""
    found = json.loads(changed_values(chance, content)) if chance.random() < 0.8 else None
    if not isinstance(found, dict):
        return changed_json(chance, content)
    return json.dumps(found | {"sha256": digest(found)}).encode()


def changed_toml(chance: random.Random, content: bytes) -> bytes:
    """A value of another kind on one line, or other bytes."""
    if chance.random() < 0.3:
        return changed_bytes(chance, content)
    lines = content.decode().splitlines()
    place = chance.randrange(len(lines))
    key = lines[place].partition("=")[0]
    value = chance.choice(ODD)
    text = "inf" if value == float("inf") else json.dumps(value).replace("NaN", "nan").replace("null", "{}")
    lines[place] = chance.choice(
        (f"{key} = {text}", f"{json.dumps(str(value))} = {text}", f"[[{key}]]", lines[place] * 2)
    )
    return "\n".join(lines).encode(errors="replace")


def spiky(model: str, lr: float, seed: int, step: int) -> float:
    return calm(model, lr, seed, step) + (8 if 40 <= step < 43 else 0)


def readers(folder: Path) -> Iterator[tuple[str, Reader]]:
    """Name -> reader; the files that it needs are written."""
    source, patched = folder / "source", folder / "patched"
    tiny_model("gpt2", n_layer=1).save_pretrained(source)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(("<unk>", "a", "b", "c"))}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(source)
    spikepatch.convert(str(source), patched, reinit="none", load_test=False)
    shards = {"one.safetensors": ["a", "c"], "two.safetensors": ["b.weight", "empty"]}
    (folder / "sharded").mkdir()
    for file, names in shards.items():
        (folder / "sharded" / file).write_bytes(save({name: TENSORS[name] for name in names}, {"format": "pt"}))
    (folder / "x").mkdir()  # what "../x" would find
    index = {"metadata": {"total_size": 40}, "weight_map": {name: f for f, names in shards.items() for name in names}}
    run = training(folder / "run", curve=spiky, multipliers=(1, 2), steps=60)
    log = next(run.rglob("log.jsonl"))
    kept = checkpoints.save(
        folder / "c", 1, *small_training(),
        {"position": dataclasses.asdict(Position()), "detector": SpikeDetector().to_dict(), "log": 0},
    )  # fmt: skip
    losses = [3 + 0.01 * (i % 7) + (5 if 60 <= i < 63 else 0) for i in range(100)]
    rows = [{"step": i, "loss": loss, "grad_norm": 1.0} for i, loss in enumerate(losses)]
    nested = [{"step": row["step"], "train": row} for row in rows]
    golden = {"lm loss": {"start_step": 0, "end_step": 99, "step_interval": 1, "values": dict(enumerate(losses))}}
    table = "".join(f"{row['step']},{row['loss']},{row['grad_norm']}\n" for row in rows)

    for name, reader in {
        "config": Reader(source / "config.json", changed_json, built, 60),
        "tokenizer config": Reader(source / "tokenizer_config.json", changed_json, tokenizer_known, 15),
        "tokenizer": Reader(source / "tokenizer.json", changed_json, tokenizer_known, 15),
        "patch": Reader(patched / "config.json", changed_json, patch_known, 40),
        "manifest": Reader(
            patched / "spikepatch.json", changed_manifest, lambda file: spikepatch.verify(file.parent), 40
        ),
        "header": Reader(folder / "weights/model.safetensors", changed_header, tensors_of, 60, save(TENSORS)),
        "index": Reader(folder / "sharded/model.safetensors.index.json", changed_json, indexed, 40, as_json(index)),
        "card": Reader(folder / "README.md", changed_bytes, inherited, 10, CARD),
        "plan": Reader(folder / "plan.json", changed_values, planned, 40, plan_of("gpt2").to_json().encode()),
        "recipe": Reader(folder / "own.toml", changed_toml, recipe, 50, RECIPE),
        "run.json": Reader(run / "run.json", changed_json, shown, 20),
        "log.jsonl": Reader(log, changed_line, shown, 30),
        "state.json": Reader(kept / "state.json", changed_json, resumed, 10),
        "random states": Reader(kept / "rank-0.pt", changed_bytes, resumed, 5),
        "shard of a checkpoint": Reader(kept / "__0_0.distcp", changed_bytes, resumed, 5),
        "documents": Reader(folder / "text.jsonl", changed_line, read_documents, 10, b'{"text": "a"}\n{"text": "b"}\n'),
        "foreign lines": Reader(folder / "foreign.jsonl", changed_line, judged, 10, b"\n".join(map(as_json, rows))),
        "a Trainer's state": Reader(folder / "state.json", changed_json, judged, 10, as_json({"log_history": rows})),
        "golden values": Reader(folder / "golden.json", changed_json, judged, 10, as_json(golden)),
        "a table": Reader(folder / "log.csv", changed_bytes, judged, 10, f"step,loss,grad_norm\n{table}".encode()),
        "lines of text": Reader(folder / "own.log", changed_bytes, judged, 10, printed(named, losses)),
        "keys within keys": Reader(folder / "nested.jsonl", changed_line, judged, 5, b"\n".join(map(as_json, nested))),
        **{
            form: Reader(folder / f"{i}.txt", changed_bytes, judged, 1, printed(line, losses))
            for i, (form, (line, _)) in enumerate(LINES.items())
        },
    }.items():
        reader.file.parent.mkdir(exist_ok=True)
        if reader.content:
            reader.file.write_bytes(reader.content)
        yield name, dataclasses.replace(reader, content=reader.file.read_bytes())


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def named(step: int, loss: float, norm: float) -> str:
    return f"[2026-11-30 03:00:01,123] INFO step {step}: train loss {loss}, grad_norm={norm}"


def printed(line: Callable[[int, float, float], str], losses: list[float]) -> bytes:
    return "\n".join(line(i, loss, 1.0) for i, loss in enumerate(losses, 1)).encode()


@contextlib.contextmanager
def bounded(said: str) -> Iterator[None]:
    """Fails where the block takes much time or memory."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"{said}: over {SECONDS} s")

    before, largest = signal.signal(signal.SIGVTALRM, late), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest < MEMORY, said


def accepted(name: str, reader: Reader, number: int) -> bool:
    """What ``reader`` says of a case; anything but an answer or a refusal with all its parts is raised."""
    reader.file.write_bytes(reader.case(number))
    try:
        with bounded(f"{name} {number}"), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, about what they were given
            reader.read(reader.file)
    except SpikepatchError as error:
        if not all((error.what, error.where, error.why, error.remedy)):
            raise AssertionError(f"{name} {number}: a part of the message is missing") from error
        return False
    except BaseException as error:
        error.add_note(f"{name} {number}")
        raise
    finally:
        reader.file.write_bytes(reader.content)
    return True


@pytest.fixture
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most cases leave most charts of a page as they were: equal ones are drawn once, as these are the same bytes."""
    known: dict[tuple[float, float, str], Markup] = {}

    def drawn(draw: Callable[[Figure], Groups], width: float, height: float, content: object) -> Markup:
        key = (width, height, repr(content))
        if key not in known:
            known[key] = figures.drawn(draw, width, height, content)
        return known[key]

    monkeypatch.setattr(svg, "drawn", drawn)


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize(("first", "last"), [(0, 1), pytest.param(1, 10, marks=pytest.mark.slow)])
def test_every_reader(first: int, last: int, tmp_path: Path) -> None:
    known = dict(readers(tmp_path))
    before = set(tmp_path.rglob("*"))
    assert 450 < sum(reader.cases for reader in known.values()) < 550
    outcomes: Counter[bool] = Counter()
    for name, reader in known.items():
        assert accepted(name, reader, 0), name
        outcomes.update(
            accepted(name, reader, number) for number in range(first * reader.cases + 1, last * reader.cases + 1)
        )
    assert min(outcomes[True], outcomes[False]) > sum(outcomes.values()) / 4
    assert {path for path in tmp_path.rglob("*") if path.name not in ("page", "card")} == before


def main(cases: int, wanted: str = "") -> None:
    """By hand, of other cases: ``python -m tests.test_readers 20000``; what fails is printed, and goes on."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, reader in readers(Path(scratch)):
            if wanted not in name:
                continue
            begin, some = time.process_time(), max(1, cases * reader.cases // 500)
            failed: dict[str, int] = {}
            taken = 0
            for number in range(1_000_000, 1_000_000 + some):
                try:
                    taken += accepted(name, reader, number)
                except Exception as error:
                    place = traceback.extract_tb(error.__traceback__)[-1]
                    failed.setdefault(f"{place.filename}:{place.lineno} {type(error).__name__}: {error}"[:300], number)
            per = (time.process_time() - begin) / some
            told = [f"{name}: {some} cases, {taken} accepted, {1000 * per:.1f} ms each, {len(failed)} kinds of failure"]
            told += [f"    {number}: {said}" for said, number in failed.items()]
            sys.stdout.write("\n".join(told) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
