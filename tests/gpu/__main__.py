"""One table of what a GPU shows, and the same as JSON: ``python -m tests.gpu [--out gpu.json]``.

It needs one CUDA device and what pyproject.toml asks for, and no network. Each part has its time, 8 minutes in all, and
leaves out what it has none for. ``--device cpu --tiny`` runs all of it at a toy's size, so that it starts at the first
try where a device is at hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from tests.gpu.correctness import checks, fills
from tests.gpu.measuring import Budget, Finding, Place
from tests.gpu.runs import kills, spikes
from tests.gpu.speed import speeds

#: Name -> what it does, and its seconds.
PARTS: dict[str, tuple[Callable[[Place, Budget], Iterator[Finding]], float]] = {
    "a": (fills, 60), "b": (checks, 120), "c": (speeds, 180), "d": (spikes, 60), "e": (kills, 60),
}  # fmt: skip


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of a toy")
    parser.add_argument("--parts", default="abcde", help="which of them")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    given = parser.parse_args(words)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device is here; --device cpu --tiny tries the script itself", file=sys.stderr)  # noqa: T201
        return 2
    if given.device == "cpu":
        torch.set_num_threads(1)  # its children are forked
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("torch").setLevel(logging.ERROR)
    name = torch.cuda.get_device_name() if given.device.startswith("cuda") else platform.processor() or "CPU"
    versions = {n: version(n) for n in ("torch", "transformers", "accelerate")}
    print(f"{name}; {', '.join(f'{n} {at}' for n, at in versions.items())}")  # noqa: T201
    found: list[Finding] = []
    spent: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in given.parts:
            run, seconds = PARTS[part]
            place = Place(given.device, given.tiny, Path(folder) / part)
            place.folder.mkdir()
            started = time.perf_counter()
            for finding in _guarded(part, run(place, Budget(seconds))):
                found.append(finding)
                mark = {True: "ok", False: "NOT OK", None: "-"}[finding.ok]
                print(f"{finding.part}  {mark:6}  {finding.what}: {finding.found}", flush=True)  # noqa: T201
            spent[part] = time.perf_counter() - started
            place.forget()
    print(", ".join(f"{part} {seconds:.0f} s" for part, seconds in spent.items()))  # noqa: T201
    rows = [dataclasses.asdict(finding) for finding in found]
    record = {"device": name, "tiny": given.tiny, "versions": versions, "seconds": spent, "findings": rows}
    given.out.write_text(json.dumps(record, indent=2) + "\n")
    return 1 if any(finding.ok is False for finding in found) else 0


def _guarded(part: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """A part that fails is a row, and the others go on."""
    try:
        yield from findings
    except Exception as error:
        traceback.print_exc()
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield Finding(part, "the part ended", said, False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
