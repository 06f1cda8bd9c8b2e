"""Every type that can be built tiny: converted, loaded by its own line in a fresh process, saved, resized, folded.

    python -m tests.sweep                    # all; writes docs/loads.md
    python -m tests.sweep llama t5 mamba     # some; prints their rows

One fresh process loads all folders one after the other, each under a name of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers.models.auto import modeling_auto

import spikepatch
from spikepatch.apply.folder.load_test import Wanted, differences, example_inputs
from spikepatch.apply.folder.loader import Loader, loader
from spikepatch.apply.folder.small_twin import UNLIKE
from spikepatch.apply.generated.structure import restructure
from spikepatch.errors import SpikepatchError, on_one_line
from spikepatch.quiet import quiet
from spikepatch.source.open import build_meta, open_source
from tests import ROOT
from tests.residual import configs
from tests.residual.configs import tiny_config_for

TABLE = ROOT / "docs" / "loads.md"

#: Seconds that one type may take.
_LIMIT = 120

#: Heads that transformers writes once for all types: their backbone comes from an auto class.
TASKS = {"SequenceClassification": "sequence", "TokenClassification": "token", "QuestionAnswering": "question"}


@dataclass(frozen=True)
class Case:
    """A class of a type, and the config that it is built from."""

    model_type: str
    mapping: configs.Mapping
    model_class: str

    @property
    def name(self) -> str:
        return f"{self.model_type}-{self.model_class}"


@dataclass(frozen=True)
class Row:
    """What became of one class: ``yes``, ``-`` where it does not apply, or the reason."""

    type: str
    model: str
    recipe: str
    storage: str
    loads: str
    saves: str
    resizes: str
    folds: str

    @property
    def sound(self) -> bool:
        """It loads by its own line as the same model, and what it saves does, or nothing was written."""
        return all(
            said in ("yes", "-") for said in (self.loads, self.saves, self.resizes)
        ) and not self.folds.startswith("NO")


def cases() -> list[Case]:
    """A type of several mappings once; and the general heads of those that have one."""
    by_type = {t: mapping for mapping, t in reversed(list(configs.entries())) if mapping != "tower"}
    found = [Case(t, mapping, configs.CLASSES[mapping][t]) for t, mapping in sorted(by_type.items())]
    for task in TASKS:
        names = getattr(modeling_auto, f"MODEL_FOR_{'_'.join(_words(task))}_MAPPING_NAMES")
        general = getattr(transformers.modeling_layers, f"GenericFor{task}")
        for model_type, name in sorted(names.items()):
            model_class = getattr(transformers, name if isinstance(name, str) else name[0], None)
            if model_type in by_type and model_class is not None and issubclass(model_class, general):
                found.append(Case(model_type, by_type[model_type], model_class.__name__))
    return found


def _words(task: str) -> list[str]:
    return "".join(f" {c}" if c.isupper() else c for c in task).upper().split()


def tried(case: Case, process: Loader, folder: Path) -> Row:
    """Convert a tiny model with drawn weights, and do with it what people do."""
    try:
        with _limited():
            return _tried(case, process, folder)
    except Exception as error:  # whatever a type's own code raises
        return _row(case, loads=f"NO: {on_one_line(error, 160)}")


def _tried(case: Case, process: Loader, folder: Path) -> Row:
    source, out = folder / f"source-{case.name}", folder / f"out-{case.name}"
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            model: Any = getattr(transformers, case.model_class)._from_config(
                tiny_config_for(case.model_type, case.mapping)
            )
            model.save_pretrained(source)
    except Exception as error:
        return _row(case, loads="-", recipe=f"not built: {on_one_line(error, 80)}")
    converted = _converted(source, out)
    if isinstance(converted, str):
        return _row(
            case, loads="-" if not converted.startswith("NO") else converted, recipe=converted.removeprefix("NO: ")
        )
    found = open_source(str(source), weights=True)
    patched = build_meta(found)
    restructure(patched, converted.plan)
    auto: Any = getattr(transformers, converted.auto_class)
    with quiet():
        loaded = auto.from_pretrained(out, **({"trust_remote_code": True} if converted.trust else {}))
        saved = folder / f"saved-{case.name}"
        loaded.save_pretrained(saved)
    wanted = Wanted(patched, type(loaded).__name__, converted.auto_class, converted.trust)
    unlike = [*differences(process, saved, wanted, tokenizer=False), *_other_tensors(out, saved)]
    return _row(
        case,
        recipe=converted.plan.recipe,
        storage=converted.storage,
        loads="yes",
        saves="NO: " + "; ".join(unlike)[:160] if unlike else "yes",
        folds=_folds(saved, folder / f"folded-{case.name}") if converted.storage == "code" else "-",
        resizes=_resizes(loaded, model),
    )


def _converted(source: Path, out: Path) -> Any:
    """With a factor where the model has a use for one, else with new projections."""
    first = ""
    for options in (
        {"reinit": "none", "factor": 3.0, "storage": "code", "part": "language"},
        {"reinit": "none", "factor": 3.0, "storage": "code", "part": "language", "replace": True},
        {"reinit": "residual", "recipe": "vanilla"},
    ):
        try:
            return spikepatch.convert(str(source), out, **options)
        except SpikepatchError as error:
            if error.what == UNLIKE:
                return f"NO: {error.why[:200]}"
            first = first or f"refused: {error.what[:80]}"
    return first


def _other_tensors(one: Path, other: Path) -> Iterator[str]:
    before, after = (
        {n: t for f in sorted(x.glob("*.safetensors")) for n, t in load_file(f).items()} for x in (one, other)
    )
    if before.keys() != after.keys() or any(not torch.equal(before[name], after[name]) for name in before):
        yield "saved other tensors"


@torch.no_grad()
def _resizes(loaded: Any, plain: Any) -> str:
    """Where the plain model's vocabulary can be enlarged and run, the patched one's can, and its factor stays."""
    inputs = example_inputs(plain)
    try:
        size = plain.get_input_embeddings().num_embeddings
        with quiet():
            plain.eval().resize_token_embeddings(size + 8)
            plain(**inputs)
    except Exception:  # whatever a type without a vocabulary raises
        return "-"
    before = loaded.get_input_embeddings()(torch.arange(3))
    with quiet():
        loaded.eval().resize_token_embeddings(size + 8)
        loaded(**inputs)
    table = loaded.get_input_embeddings()
    same = torch.equal(table(torch.arange(3)), before) and table.num_embeddings == size + 8 == len(table.weight)
    return "yes" if same else "NO: what is looked up has changed"


def _folds(saved: Path, plain: Path) -> str:
    try:
        spikepatch.fold(str(saved), plain)
    except SpikepatchError as error:
        return f"NO: {error.why[:160]}" if error.what == UNLIKE else f"refused: {error.what[:60]}"
    return "yes"


def _row(case: Case, **said: str) -> Row:
    given = {"recipe": "-", "storage": "-", "loads": "-", "saves": "-", "resizes": "-", "folds": "-"} | said
    return Row(case.model_type, case.model_class, **given)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {_LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def switched_on() -> Iterator[Loader]:
    """The load test, whatever the environment says, and one process for all."""
    before = os.environ.pop("SPIKEPATCH_LOAD_TEST", None)
    try:
        with loader(True) as process:
            assert process is not None
            yield process
    finally:
        if before is not None:
            os.environ["SPIKEPATCH_LOAD_TEST"] = before


def page(rows: Sequence[Row]) -> str:
    """The whole table, with the versions that it was made with."""
    versions = ", ".join(
        f"{name} {version(name).partition('+')[0]}" for name in ("transformers", "torch", "safetensors")
    )
    written = [row for row in rows if row.storage != "-"]
    bad = [row for row in rows if not row.sound]
    head = [field.name for field in fields(Row)]
    lines = ["| " + " | ".join(getattr(row, name).replace("|", "/") for name in head) + " |" for row in rows]
    return f"""# What loads

Made by `python -m tests.sweep` with {versions}. Each class is built tiny, converted with learned weights and the factor
3 (post-norm models: with new residual projections), and loaded by the printed line in a fresh process without
spikepatch: same class, ties, buffers, parameters and forward pass as the live model. Then it is saved and loaded again,
its vocabulary is enlarged, and it is folded. `-`: does not apply. A refusal writes nothing.

{len(rows)} classes; {len(written)} are written, {len(bad)} of them do not behave.

| {" | ".join(head)} |
|{"---|" * len(head)}
{chr(10).join(lines)}
"""


def main(wanted: Sequence[str]) -> None:
    started = time.monotonic()
    rows = []
    with switched_on() as process, tempfile.TemporaryDirectory(prefix="spikepatch-sweep-") as scratch:
        for case in cases():
            if wanted and case.model_type not in wanted:
                continue
            folder = Path(scratch, case.name)
            folder.mkdir()
            row = tried(case, process, folder)
            shutil.rmtree(folder)
            rows.append(row)
            sys.stdout.write(f"{time.monotonic() - started:6.0f} s  {row}\n")
            sys.stdout.flush()
    if not wanted:
        TABLE.write_text(page(rows))
    sys.exit(any(not row.sound for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
