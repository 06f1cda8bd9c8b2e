"""What ``check`` and its audit say of every default of transformers, tiny: ``docs/audit-measured.md`` has it as tables.

    python -m tests.preflight.verdicts FILE     all of them into FILE, JSON lines; goes on where it was stopped
    python -m tests.preflight.verdicts --write  verdicts.json from FILE (after the flag), and the page from that

Width 64, one layer of each kind, 12 random tokens, as transformers initialises it with seed 0.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click
import torch
import transformers

import spikepatch
from spikepatch.errors import SpikepatchError
from tests.auditing.mutations import build
from tests.pages import DOCS, with_parts
from tests.residual.configs import Mapping, entries

FILE = Path(__file__).with_name("verdicts.json")
PAGE = "audit-measured.md"
VERDICTS = ("stable", "at-risk", "unstable", "unknown", "refused")


def verdict_of(mapping: Mapping, model_type: str) -> dict[str, Any]:
    """``verdict``, and the names of the findings that it rests on; of the audit apart."""
    try:
        model = build(mapping, model_type)
    except (SpikepatchError, ValueError, TypeError, AttributeError, ImportError) as error:
        return {"cannot be built": f"{type(error).__name__}: {error}"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            report = spikepatch.check(model, tokens=12, batch=1)
        except SpikepatchError as error:
            audit = spikepatch.audit(model).at_least("at-risk")
            return {"verdict": "refused", "check": [error.what], "audit": _names(audit)}
    found = [f for part in (report, *report.streams) for f in part.findings if f.severity != "note"]
    audit = report.audit.at_least("at-risk") if report.audit is not None else ()
    ratio = float(f"{report.gradient_ratio:.3g}") if report.gradient_ratio is not None else None
    return {"verdict": report.verdict, "ratio": ratio, "check": _names(found), "audit": _names(audit)}


def _names(findings: Any) -> list[str]:
    return sorted({f.name for f in findings})


def key(mapping: str, model_type: str) -> str:
    return model_type if mapping == "causal" else f"{model_type} ({mapping})"


def tables(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The parts of the page: a row of types for each verdict, and a row for each type that the audit does not leave
    alone.
    """
    built = {name: each for name, each in found.items() if "verdict" in each}
    rows = ["| verdict | | types |", "|---|---|---|"]
    for verdict in VERDICTS:
        names = sorted(name for name, each in built.items() if each["verdict"] == verdict)
        if names:
            rows.append(f"| {verdict} | {len(names)} | {', '.join(names)} |")
    because = Counter(n for each in built.values() if each["verdict"] != "refused" for n in each["check"])
    audited = Counter(n for each in built.values() for n in each["audit"])
    why = ", ".join(f"`{name}` {count}" for name, count in because.most_common())
    why_audit = ", ".join(f"`{name}` {count}" for name, count in audited.most_common())
    summary = f"\nBecause of (types): {why}; of the audit: {why_audit}.\n"
    loud = [f"| {name} | {', '.join(each['audit'])} |" for name, each in sorted(built.items()) if each["audit"]]
    return {
        "verdicts": "\n".join(rows) + "\n" + summary,
        "fresh": "\n".join(["| type | at-risk or worse |", "|---|---|", *loud]) + "\n",
    }


def main(arguments: list[str]) -> None:
    write = arguments[:1] == ["--write"]
    path = Path(arguments[-1])
    lines = path.read_text().splitlines() if path.exists() and path != Path("--write") else []
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        found |= json.loads(line)
    if write:
        if found:
            stored = {"transformers": transformers.__version__, "types": dict(sorted(found.items()))}
            FILE.write_text(json.dumps(stored, indent=1) + "\n")
        (DOCS / PAGE).write_text(with_parts(PAGE, tables(json.loads(FILE.read_text())["types"])))
        return
    for mapping, model_type in entries():
        name = key(mapping, model_type)
        if name in found:
            continue
        try:
            row = verdict_of(mapping, model_type)
        except Exception as error:  # a bug: it is shown, and the others go on
            click.echo(f"{name}: {type(error).__name__}: {error}", err=True)
            continue
        with path.open("a") as file:
            file.write(json.dumps({name: row}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
