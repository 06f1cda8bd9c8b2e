"""Real commands in real processes, some of which are killed, on one rank and on two (gloo), replicated and sharded.

    python -m tests.training.processes FOLDER

Every command is forked from this process, so that everything is imported once. FOLDER/report.json tells, for every
case, what was wrong; the names of the cases are read by ``test_checkpoints.py``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from safetensors.torch import load_file
from transformers import AutoConfig

from spikepatch.apply.disk import publish
from spikepatch.cli import main as spikepatch
from spikepatch.training import checkpoints

Case = Callable[[Path], None]
CASES: dict[str, Case] = {}

STEPS, EVERY = 10, 4

#: Forward passes in a step of one of two ranks: 8 sequences, 2 at a time.
PARTS = 2

#: The exit code of so few steps.
TOO_SHORT = 1

#: The steps of the protocol of ``checkpoints.save``, each just before it is done.
PROTOCOL = ("create", "write", "write the random states", "write the state", "commit", "delete older ones")


def add(name: str, case: Case) -> None:
    assert name not in CASES
    CASES[name] = case


class _Killer(logging.Handler):
    """SIGKILL to this very process, at the ``count``-th message of that text."""

    def __init__(self, message: str, count: int) -> None:
        super().__init__()
        self.message, self.left = message, count

    def emit(self, record: logging.LogRecord) -> None:
        self.left -= record.getMessage() == self.message
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def start(
    arguments: Sequence[str],
    log: Path,
    *,
    ranks: int = 1,
    fsdp: bool = False,
    killed_at: tuple[str, int] | None = None,
    killed_after: int | None = None,
    before: Callable[[int], None] = lambda rank: None,
) -> list[int]:
    """Run ``spikepatch ARGUMENTS`` on every rank; their exit codes, -9 for a killed one.

    Args:
        log: the output of the first rank; ``.1`` of the second.
        killed_at: the first rank kills itself at this message, the n-th time.
        killed_after: all are killed once the log of the run has so many lines.
        before: called in each process, with its rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    if fsdp:
        environment["ACCELERATE_USE_FSDP"] = "true"
    if ranks > 1:
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ.update(environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}))
        output = os.open(log if not rank else f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if killed_at is not None and rank == 0:
            killer = _Killer(*killed_at)
            for module in (checkpoints, publish):
                logging.getLogger(module.__name__).setLevel(logging.DEBUG)
                logging.getLogger(module.__name__).addHandler(killer)
        code = 70
        try:
            before(rank)
            spikepatch(list(arguments), prog_name="spikepatch")
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    if killed_after is not None:
        (lines,) = (Path(arguments[i + 1]) for i, a in enumerate(arguments) if a == "--out")
        while sum(len(f.read_bytes().splitlines()) for f in lines.rglob("log.jsonl")) < killed_after:
            time.sleep(0.002)
            assert not os.waitpid(children[0], os.WNOHANG)[0], log.read_text()
        for child in children:
            os.kill(child, signal.SIGKILL)
    codes = []
    for child in children:
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if codes[0] < 0 and child == children[0]:
            for other in children[1:]:
                os.kill(other, signal.SIGKILL)  # it waits for the first one
    return codes


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", f"tiny={folder / 'model'}@scaled-embed", "--data", str(folder / "text.txt"), "--out", str(out),
        "--steps", str(STEPS), "--lr", "1e-2", "--batch-tokens", "256", "--seq-len", "32", "--micro-batch", "2",
        "--checkpoint-every", str(EVERY), "--watch-every", "0", *more,
    ]  # fmt: skip


def outcome(out: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The log without its times, and the weights of the trained model."""
    (run,) = out.glob("tiny/*")
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("seconds", None)
        record.pop("command", None)
    return records, load_file(run / "model" / "model.safetensors")


def same(one: Path, other: Path) -> None:
    (records, weights), (expected, expected_weights) = outcome(one), outcome(other)
    assert records == expected, "\n".join(f"{a}\n{b}\n" for a, b in zip(records, expected, strict=False) if a != b)
    assert sum(record["type"] == "step" for record in records) == STEPS
    assert weights.keys() == expected_weights.keys()
    assert len(weights) > 10
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


def reference(folder: Path, ranks: int, fsdp: bool) -> Path:
    """The run that nothing disturbs, once for each kind."""
    out = folder / f"reference-{ranks}-{fsdp}"
    if not out.exists():
        log = folder / f"{out.name}.txt"
        codes = start(arguments(folder, out), log, ranks=ranks, fsdp=fsdp)
        assert codes == [TOO_SHORT] * ranks, log.read_text()
    return out


def killed_and_resumed(folder: Path, name: str, *, ranks: int = 1, fsdp: bool = False, **kill: Any) -> None:
    out, log = folder / name.replace(" ", "-"), folder / f"{name.replace(' ', '-')}.txt"
    codes = start(arguments(folder, out), log, ranks=ranks, fsdp=fsdp, **kill)
    assert codes[0] == -signal.SIGKILL, log.read_text()
    found = checkpoints.committed(next(out.glob("tiny/*")) / "checkpoints")
    for path in found:
        assert (path / "state.json").exists()
        assert (path / ".metadata").exists()
    codes = start(arguments(folder, out, "--resume"), log, ranks=ranks, fsdp=fsdp)
    assert codes == [TOO_SHORT] * ranks, log.read_text()
    same(out, reference(folder, ranks, fsdp))
    left = [path.name for path in next(out.glob("tiny/*")).joinpath("checkpoints").iterdir()]
    assert sorted(left) == ["step-00000004", "step-00000008"]


def not_a_number_on_one_rank(folder: Path, name: str, *, fsdp: bool) -> None:
    """At step 3 the second rank's loss is NaN: both drop it, go back to the start, and leave out three batches."""

    def spoil(rank: int) -> None:
        real, calls = functional.cross_entropy, iter(range(1000))
        ruined = {2 * PARTS} if rank else set()

        def cross_entropy(*arguments: Any) -> Any:
            return real(*arguments) * (torch.nan if next(calls) in ruined else 1.0)

        functional.cross_entropy = cross_entropy  # type: ignore[assignment]

    out, log = folder / name.replace(" ", "-"), folder / f"{name.replace(' ', '-')}.txt"
    wanted = arguments(folder, out, "--on-spike", "rewind")
    assert start(wanted, log, ranks=2, fsdp=fsdp, before=spoil) == [TOO_SHORT] * 2, log.read_text()
    records, weights = outcome(out)
    steps = [r for r in records if r["type"] == "step"]
    assert [(r["step"], r["batch"]) for r in steps] == [
        (1, 0),
        (2, 1),
        (3, 2),
        *((n, n + 2) for n in range(1, STEPS + 1)),
    ]
    assert [r["step"] for r in steps if not r["applied"]] == [3]
    assert (steps[2]["loss"], steps[2]["gradient_norm"], steps[2]["flags"]) == (None, None, ["nonfinite"])
    assert [r["skipped"] for r in records if r["type"] == "rewind"] == [[0, 2]]
    assert all(bool(w.isfinite().all()) for w in weights.values())


def _cases() -> None:
    for fsdp in (False, True):
        name = f"two ranks, {'sharded' if fsdp else 'replicated'}, one with NaN"
        add(name, lambda folder, n=name, f=fsdp: not_a_number_on_one_rank(folder, n, fsdp=f))  # type: ignore[misc]
    for message in PROTOCOL:
        name = f"killed before: {message}"
        add(name, lambda folder, n=name, m=message: killed_and_resumed(folder, n, killed_at=(m, 2)))  # type: ignore[misc]
    first = "killed before the first checkpoint is committed"
    add(first, lambda folder: killed_and_resumed(folder, first, killed_at=("commit", 1)))
    last = "killed while the trained model is written"
    add(last, lambda folder: killed_and_resumed(folder, last, killed_at=("swap", 1)))
    between = "killed between checkpoints"
    add(between, lambda folder: killed_and_resumed(folder, between, killed_after=7))
    for fsdp in (False, True):
        kind = "sharded" if fsdp else "replicated"
        for message in ("write the random states", "commit"):
            name = f"two ranks, {kind}, killed before: {message}"
            add(
                name,
                lambda folder, n=name, m=message, f=fsdp: killed_and_resumed(  # type: ignore[misc]
                    folder, n, ranks=2, fsdp=f, killed_at=(m, 2)
                ),
            )


_cases()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    config = AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=256, bos_token_id=0, eos_token_id=0
    )
    assert config.resid_pdrop > 0  # so that random states matter
    config.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(f"{i} {i * i} {i**3} {i**5 % 9973}" for i in range(1000)))
    with pytest.raises(SystemExit) as end:  # in this process, so that the others have everything imported
        spikepatch(arguments(folder, folder / "reference-1-False"), prog_name="spikepatch")
    assert end.value.code == TOO_SHORT
    report = {}
    for name, case in CASES.items():
        try:
            case(folder)
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
