"""The files that logs are: JSON lines, CSV, a JSON document, TensorBoard's events, lines of text; each as raw rows."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spikepatch.errors import BadSource, Refused, SpikepatchError, on_one_line
from spikepatch.source.local import read_file
from spikepatch.spikes.free_text import named_by, pairs, text_records
from spikepatch.spikes.line_formats import LINE_FORMATS, LossOf, rows_of
from spikepatch.spikes.log_keys import LOSS_KEYS, STEP_KEYS, Keys, chosen, flat, key_of, listed
from spikepatch.spikes.trainer_output import trainer_state

#: Bytes of a log.
_LARGEST = 2_000_000_000

#: Of a log with many numbers, how many rows are enough to know its format by.
_LINES = 2000

#: Bytes by which a file is known for a log.
_BEGIN = 100_000


@dataclass(frozen=True)
class Raw:
    """Rows as they stand in the file: step (None: counted), loss and norm; None for what is not logged."""

    format: str
    loss_of: LossOf | None
    rows: tuple[tuple[int | None, float | None, float | None], ...]
    evals: int = 0
    notes: tuple[str, ...] = ()


def raw_rows(path: Path, keys: Keys) -> Raw:
    """Raises BadSource where the file cannot be read, Refused where it is no log that is known."""
    if path.is_dir():
        events = sorted(path.rglob("events.out.tfevents.*"))
        folders = sorted({str(event.parent.relative_to(path)) for event in events})
        if len(folders) > 1:
            raise Refused(
                f"it has the event files of {len(folders)} runs",
                where=str(path),
                why=f"they are in {', '.join(folders[:10])}",
                remedy=f"give one of these folders, such as {path / folders[0]}",
            )
        if events:
            return _tensorboard(path, events, keys)
        if (path / "log.jsonl").is_file():
            return raw_rows(path / "log.jsonl", keys)
        if (path / "run.json").is_file():
            raise _unknown(
                path, "it is the folder of a whole training: give that of one run in it, or `spikepatch report`"
            )
        state = trainer_state(path)
        if state is not None:
            found = raw_rows(state, keys)
            return replace(found, notes=(f"read from {state}", *found.notes))
        raise _unknown(path, "the folder has neither TensorBoard's events nor a log.jsonl nor a trainer_state.json")
    if "tfevents" in path.name:
        return _tensorboard(path, [path], keys)
    try:
        content = read_file(path, limit=_LARGEST)
    except OSError as error:
        raise BadSource(
            "the log cannot be read", where=str(path), why=str(error.strerror), remedy="give the file of a log"
        ) from error
    return _rows_in(path, content, keys)


def is_log(path: Path) -> bool:
    """Whether a file has losses, by its beginning."""
    try:
        with path.open("rb") as file:
            begin = file.read(_BEGIN)
        whole = begin if len(begin) < _BEGIN else begin[: max(begin.rfind(b"\n"), begin.rfind(b"\r")) + 1]
        return any(loss is not None for _, loss, _ in _rows_in(path, whole, Keys()).rows)
    except (OSError, SpikepatchError):
        return False


def _rows_in(path: Path, content: bytes, keys: Keys) -> Raw:
    wide = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what a shell of Windows redirects to a file
    text = content.decode("utf-16" if wide else "utf-8", errors="replace")
    if text.count("\0") > len(text) / 2 or text.count("\ufffd") > len(text) / 20:
        raise _unknown(path, "it is no text")
    text = text.replace("\0", "").lstrip("\ufeff")  # what a crash leaves at the end of a file, and a byte-order mark
    if not text.strip():
        raise _unknown(path, "the file is empty")
    document = _document(text)
    if isinstance(document, Mapping) and "log_history" in document:
        return _trainer_state(path, document, keys)
    if isinstance(document, Mapping) and (series := _series(document)):
        return _golden(path, series, keys)
    if isinstance(document, list) and document and all(isinstance(row, Mapping) for row in document):
        return _records(path, "a JSON list", document, keys)
    lines = text.splitlines()
    records = [record for line in lines if line.lstrip().startswith("{") for record in [_document(line)]]
    mappings = [record for record in records if isinstance(record, Mapping)]
    if mappings and len(mappings) >= len([line for line in lines if line.strip()]) / 2:
        if mappings[0].get("type") == "run":
            return _own(mappings)
        return _records(path, "JSON lines", mappings, keys)
    if keys == Keys() and _best(lines):
        return _lines(lines)
    if re.match(r"\s*(?:\{\s*\"|\[\s*\{)", text) and not mappings:
        raise _unknown(path, f"it begins as JSON and is not whole: {_json_error(text)}")
    return _table(path, text.lstrip(), keys) or _text(path, lines, keys)


def _document(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_error(text: str) -> str:
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return on_one_line(error, 80)
    return "it holds no rows"


def _own(records: Sequence[Mapping[str, Any]]) -> Raw:
    """``log.jsonl`` of ``spikepatch train``: null is not finite, and a rewind takes steps back."""
    rows = [
        (
            step,
            _or_nan(r.get("loss")),
            None if "overflow" in (r.get("flags") or ()) else _or_nan(r.get("gradient_norm")),
        )
        for r in records
        if r.get("type") == "step" and (step := _step(r.get("step"))) is not None
    ]
    evals = sum(r.get("type") == "eval" for r in records)
    return Raw("spikepatch's log.jsonl", "one step", tuple(rows), evals)


def _or_nan(value: Any) -> float:
    number = _number(value)
    return math.nan if number is None else number


def _step(value: Any) -> int | None:
    """The number of a step, if it is one."""
    number = _number(value)
    return int(number) if number is not None and abs(number) < 2**53 else None


def _trainer_state(path: Path, document: Mapping[str, Any], keys: Keys) -> Raw:
    rows = document["log_history"]
    if not isinstance(rows, list):
        raise _unknown(path, "its log_history is no list of rows")
    history = [row for row in rows if isinstance(row, Mapping)]
    found = _records(path, "Trainer's trainer_state.json", history, keys)
    return Raw(found.format, "mean", found.rows, found.evals, found.notes)


def _series(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Megatron-LM's golden values: {"lm loss": {"values": {"5": 9.1, "10": "nan"}}}, where "nan" is not logged."""
    return {
        name: values
        for name, v in document.items()
        if isinstance(v, Mapping) and isinstance(values := v.get("values"), Mapping)
    }


def _golden(path: Path, series: Mapping[str, Mapping[str, Any]], keys: Keys) -> Raw:
    loss, norm = chosen(path, series, keys)
    norms = series[norm] if norm else {}
    found = {
        int(step): (_number(value), _number(norms.get(step)))
        for step, value in series[loss].items()
        if step.isdecimal() and len(step) < 16
    }
    rows = tuple((step, *found[step]) for step in sorted(found))
    return Raw("Megatron-LM's golden values", "one step", rows)


def _records(path: Path, name: str, records: Sequence[Mapping[str, Any]], keys: Keys) -> Raw:
    """Rows that are mappings. A row without a loss is an evaluation, or has something else to tell."""
    records = [flat(record) for record in records]
    here = dict.fromkeys(key for record in records[:_LINES] for key in record)
    loss, norm = chosen(path, here, keys)
    step = key_of(path, "--step", keys.step, STEP_KEYS, here, needed=False)
    rows, evals = [], 0
    for record in records:
        if record.get(loss) in (None, ""):
            evals += any("val" in key and value not in (None, "") for key, value in record.items())
            continue
        rows.append(
            (
                _step(record.get(step)) if step else None,
                _number(record[loss]),
                _number(record.get(norm)) if norm else None,
            )
        )
    factory = "current_steps" in here
    notes = [] if step else ["it has no steps: rows are counted"]
    if step in ("Step", "_step"):
        notes.append("Step counts calls of the logger, which may not be steps of the optimiser")
    form = "LLaMA-Factory's trainer_log.jsonl" if factory else f"{name}, {loss!r} by {step or 'row'!r}"
    of: LossOf | None = "mean" if factory else None
    if "ema" in loss.lower() or "smooth" in loss.lower() or "avg" in loss.lower().split("_"):
        of = "moving average"
    return Raw(form, of, tuple(rows), evals, tuple(notes))


def _best(lines: list[str]) -> str | None:
    """The name of the format that most lines are of."""
    counts = {form.name: len(rows_of(form, lines[:_LINES])[0]) for form in LINE_FORMATS}
    if not any(counts.values()):
        counts = {form.name: len(rows_of(form, lines)[0]) for form in LINE_FORMATS}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else None


def _lines(lines: list[str]) -> Raw:
    form = next(form for form in LINE_FORMATS if form.name == _best(lines))
    rows, evals = rows_of(form, lines)
    notes = [] if form.step else ["it has no steps: rows are counted"]
    without = sum(loss is None for _, loss, _ in rows)
    if without:
        notes.append(f"{without:,} rows have no loss (skipped by the loss scaler, for example)")
    return Raw(
        form.name, form.loss_of, tuple((s if form.step else None, x, n) for s, x, n in rows), evals, tuple(notes)
    )


def _table(path: Path, text: str, keys: Keys) -> Raw | None:
    """CSV with a header, by commas, semicolons or tabs; None where it is no table."""
    head = text.splitlines()[0]
    delimiter = max(",;\t", key=head.count)
    if delimiter not in head:
        return None
    table = csv.DictReader(io.StringIO(text, newline=None), delimiter=delimiter)
    try:
        rows = [{name: _cell(cell) for name, cell in row.items() if name} for row in table]
    except csv.Error as error:
        raise _unknown(path, f"as a table it is broken: {error}") from error
    some = rows[:_LINES]
    if not some or 2 * sum(any(cell is not None for cell in row.values()) for row in some) < len(some):
        return None
    numbers = [name for name in rows[0] if _cell(name) is not None]
    if numbers and not {keys.loss, *LOSS_KEYS} & set(rows[0]):
        if pairs(head):
            return None
        raise Refused(
            "it is a table without a header",
            where=str(path),
            why=f"its first line has {', '.join(numbers)[:60]} where names of columns should be",
            remedy="put a line of names above it, such as step,loss,grad_norm",
        )
    header = list(rows[0])
    lightning = {"epoch", "step"} <= set(header) and any(name.endswith("_step") for name in header)
    found = _records(path, "CSV", rows, keys)
    cells = list(found.rows)
    notes = list(found.notes)
    if _patterned([row[1] for row in cells]):
        cells = [row for row in cells if row[1] is not None and math.isfinite(row[1])]
        notes.append("'nan' stands at regular rows: it is read as not logged")
    name = f"Lightning's metrics.csv, {found.format.partition(', ')[2]}" if lightning else found.format
    of: LossOf | None = "one step" if lightning else found.loss_of
    return Raw(name, of, tuple(cells), found.evals, tuple(notes))


def _text(path: Path, lines: Sequence[str], keys: Keys) -> Raw:
    """Lines of text in which names stand before numbers."""
    records = text_records(lines)
    names = list(dict.fromkeys(name for record in records for name in record))
    if not names:
        raise _unknown(path, "no line of it is in a format that is known, and it has no columns")
    loss, norm, step = (named_by(key, names) for key in (keys.loss, keys.norm, keys.step))
    if loss is None and key_of(path, "--loss", None, LOSS_KEYS, names, needed=False) is None:
        likely = next((f', such as --loss "{name[:60]}"' for name in names if "loss" in name.lower()), "")
        raise Refused(
            "its loss is not found",
            where=str(path),
            why=f"it is lines of text of no trainer that is known; numbers stand behind {listed(names)}",
            remedy=f"--loss with the one of these that it is{likely} (and --norm, --step); or make a CSV of it, whose"
            " first line is step,loss,grad_norm",
        )
    known = (name for key in STEP_KEYS if (name := named_by(key, names)) in names)
    return _records(path, "lines of text", records, Keys(loss, norm, step or next(known, None)))


def _patterned(losses: Sequence[float | None]) -> bool:
    """Whether NaN comes at least three times, in stretches of one length between finite values."""
    stretches, length = [], 0
    for loss in losses:
        if loss is not None and math.isnan(loss):
            length += 1
        elif length:
            stretches.append(length)
            length = 0
    return len(stretches) >= 3 and len(set(stretches)) == 1


def _tensorboard(path: Path, events: Sequence[Path], keys: Keys) -> Raw:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise Refused(
            "TensorBoard's event files cannot be read here",
            where=str(path),
            why="tensorboard is not installed",
            remedy="pip install 'spikepatch[logs]', or export the run as CSV",
        ) from error
    series: dict[str, dict[int, float]] = {}
    for file in events:
        reader = EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 0})
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            series.setdefault(tag, {}).update({e.step: e.value for e in reader.Scalars(tag)})
        for tag in reader.Tags()["tensors"]:
            found = {
                e.step: e.tensor_proto.float_val[0] for e in reader.Tensors(tag) if len(e.tensor_proto.float_val) == 1
            }
            if found:
                series.setdefault(tag, {}).update(found)
    loss, norm = chosen(path, series, keys)
    norms = series[norm] if norm else {}
    rows = tuple((step, value, norms.get(step)) for step, value in sorted(series[loss].items()))
    return Raw(f"TensorBoard's events, {loss!r}", None, rows)


def _number(value: Any) -> float | None:
    """A number, or None for what is not logged: nothing, or in JSON the word "nan"."""
    if value is None or value == "" or isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value) if abs(value) < 10**300 or isinstance(value, float) else math.inf
    if str(value).strip().lower() == "nan":
        return None
    return _cell(str(value))


def _cell(text: str | None) -> float | None:
    """The number in a cell of a table."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def _unknown(path: Path, why: str) -> Refused:
    return Refused(
        "this is no training log that is known",
        where=str(path),
        why=why,
        remedy="give JSON lines, a CSV with a header, trainer_state.json, TensorBoard's events or the output of a"
        " trainer that docs/spikes.md lists; of JSON and CSV any keys will do, with --loss, --norm and --step",
    )
