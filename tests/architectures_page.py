"""What is known of every type of the installed transformers: ``docs/architectures.md``.

    python -m tests.architectures_page FILE          survey all types into FILE, JSON lines; goes on where it stopped
    python -m tests.architectures_page --write FILE  architectures.json from FILE, and the page from that
    python -m tests.architectures_page --write       the page from what is there

Language models are told by ``residual/golden.json``, which has real or minimal configs where defaults do not do; all
others by ``architectures.json``, the rows of ``spikepatch architectures``, by their default configs.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.pages import DOCS, with_parts

FILE = Path(__file__).with_name("architectures.json")
GOLDEN = Path(__file__).parent / "residual" / "golden.json"
PAGE = "architectures.md"

LANGUAGE = ("causal", "seq2seq", "masked")
OTHERS = ("image-text", "speech", "multimodal", "image", "audio", "other")
STATES = ("proven", "for some inputs", "refused", "not traced", "cannot be built")

_NOT_TRACED = "the forward pass cannot be traced"
_NOT_BUILT = "the default config cannot be built"

#: The words of the model: on its main input, and of the pass that came furthest; then what is known besides.
_TOLD = re.compile(
    r'as made up from its config: "(?P<first>.*?)"(, nor on \d+ other forms? of inputs'
    r'(; the furthest ends so: "[\w ]+?: (?P<furthest>.*)")?)?(?P<more>; (nothing tells|it takes no) .*)?$'
)


@dataclass(frozen=True)
class Entry:
    """``state``: one of ``STATES``; ``reason`` of those that are not proven, conditions of those for some inputs."""

    task: str
    type: str
    state: str
    reason: str = ""


def entries() -> list[Entry]:
    golden, rows = json.loads(GOLDEN.read_text())["maps"], json.loads(FILE.read_text())["rows"]
    conditions = {f"{row['task']}/{row['type']}": "; ".join(row["conditions"]) for row in rows}
    found = [_of_golden(key, golden[key], conditions.get(key, "")) for key in golden if key.startswith(LANGUAGE)]
    return found + [of_row(row) for row in rows if row["task"] not in LANGUAGE]


def _of_golden(key: str, value: dict[str, Any], conditions: str) -> Entry:
    task, _, model_type = key.partition("/")
    if value.get("proven"):
        return Entry(task, model_type, "for some inputs" if conditions else "proven", conditions)
    if "unbuildable" in value:
        return Entry(task, model_type, "cannot be built", value["unbuildable"])
    reason = value.get("refused") or f"not proven: {value['leaks'][0]}"
    return Entry(task, model_type, "not traced" if reason.startswith(_NOT_TRACED) else "refused", reason)


def of_row(row: dict[str, Any]) -> Entry:
    """A row of ``spikepatch architectures --json``."""
    if row["proven"]:
        conditions = "; ".join(row["conditions"])
        return Entry(row["task"], row["type"], "for some inputs" if conditions else "proven", conditions)
    state = {_NOT_TRACED: "not traced", _NOT_BUILT: "cannot be built"}
    found = next((name for begin, name in state.items() if row["reason"].startswith(begin)), "refused")
    return Entry(row["task"], row["type"], found, row["reason"])


def tables(all_entries: list[Entry]) -> dict[str, str]:
    """The parts of the page."""
    kinds = (*LANGUAGE, *OTHERS)
    counts = ["| | types | " + " | ".join(STATES) + " |", "|---|" + "---|" * (len(STATES) + 1)]
    for task in kinds:
        of_task = [e for e in all_entries if e.task == task]
        cells = [str(sum(e.state == state for e in of_task)) for state in STATES]
        counts.append(f"| {task} | {len(of_task)} | {' | '.join(cells)} |")
    proven = ["| | proven |", "|---|---|"]
    proven += [f"| {task} | {_names(all_entries, task, 'proven')} |" for task in kinds]
    some = ["| type | what is not known |", "|---|---|"]
    some += [f"| {e.type} ({e.task}) | {_cell(e.reason)} |" for e in all_entries if e.state == "for some inputs"]
    language = [e for e in all_entries if e.task in LANGUAGE and e.state not in ("proven", "for some inputs")]
    others = [e for e in all_entries if e.task in OTHERS]
    return {
        "counts": _lines(counts),
        "language": _grouped(language),
        "some": _lines(some),
        "proven": _lines(proven),
        "refused": _grouped(e for e in others if e.state == "refused"),
        "not traced": _grouped((e for e in others if e.state == "not traced"), short=True),
        "not built": _grouped((e for e in others if e.state == "cannot be built"), short=True),
    }


def _lines(rows: list[str]) -> str:
    return "\n".join(rows) + "\n"


def _names(all_entries: Iterable[Entry], task: str, state: str) -> str:
    return ", ".join(sorted(e.type for e in all_entries if e.task == task and e.state == state))


def _grouped(of: Iterable[Entry], *, short: bool = False) -> str:
    """A row for each reason; names of modules, and numbers, do not make another one."""
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in of:
        groups[_pattern(entry.reason, short=short)].append(entry)
    rows = [
        f"| {', '.join(e.type for e in found)} | {_cell(reason)} |"
        for reason, found in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    return _lines(["| types | why |", "|---|---|", *rows])


def _pattern(reason: str, *, short: bool) -> str:
    reason = re.sub(
        r"^(not proven|no residual stream found|the forward pass[^:]*|the default config[^:]*): ", "", reason
    )
    if short:
        if told := _TOLD.search(reason):
            words = dict.fromkeys(filter(None, (told["first"], told["furthest"])))
            reason = " / ".join(words) + (told["more"] or "")
        return re.sub(r"\[[\d, ]+\]|\b\d+\b", "n", re.sub(r"\w+\.forward\(\)", "forward()", reason))
    return re.sub(r"(, after| in)? ?\b[a-z_]\w*(\.\w+)+\b", lambda found: (found[1] or "") + " ...", reason).strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:400]


def survey_into(path: Path) -> None:
    """Language models last: the golden file has them too."""
    import dataclasses

    from spikepatch.residual.survey import rows_of, types

    lines = path.read_text().splitlines() if path.exists() else []
    done = {(row["task"], row["type"]) for row in map(json.loads, lines)}
    for entry in sorted(types(), key=lambda entry: entry[0] in LANGUAGE):
        if entry[:2] not in done:
            (row,) = rows_of([entry])
            with path.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def main(arguments: list[str]) -> None:
    if arguments[0] != "--write":
        survey_into(Path(arguments[0]))
        return
    if arguments[1:]:
        import transformers

        rows = [json.loads(line) for line in Path(arguments[1]).read_text().splitlines()]
        body = ",\n".join(json.dumps(row) for row in sorted(rows, key=lambda row: (row["task"], row["type"])))
        FILE.write_text(f'{{"transformers": "{transformers.__version__}", "rows": [\n{body}\n]}}\n')
    (DOCS / PAGE).write_text(with_parts(PAGE, tables(entries())))


if __name__ == "__main__":
    main(sys.argv[1:])
