"""Loss spikes on two CPU cores, and a patch that they do not come with.

    python examples/spikes_on_a_cpu.py            # 15 trainings, two at a time: 6 to 10 minutes
    python examples/spikes_on_a_cpu.py --arms vanilla-2304,vanilla,xavier,scaled-embed,embed-ln
    python examples/spikes_on_a_cpu.py --smoke    # seconds: does it run?

It is a stress test on a plateau, not language modelling: a GPT-2 that is far too deep for its width learns random hex
digits, of which nothing but the shares can be learnt, at a high learning rate. Where embeddings enter the stream as
small as those of a model of width 2304, single updates can throw the loss from 2.4 nats to 15, for some steps.
`spikepatch train` trains the arms on the same batches; `spikepatch report` compares them over the seeds and draws them.
The same command again goes on where a stopped one was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

#: Declared before any of them was run.
SEEDS = (201, 202, 203, 204, 205)
ARMS = ("vanilla-2304", "scaled-embed", "embed-ln")

#: Of a thousand hex digits of English text in ASCII, how many are 0, 1, ... f.
SHARES = (114, 27, 170, 47, 51, 64, 229, 120, 18, 33, 20, 3, 19, 26, 32, 27)

#: Vanilla as a model of width 2304 has it. One of width 16 draws its embeddings 12 times larger, and a smaller std
#: alone would not last, as one step of Adam is as large as it: so a factor of sqrt(16 / 2304), which stays.
VANILLA_2304 = """
name = "vanilla-2304"
large_shortcut = false
[[transform]]
kind = "small_init"
[[transform]]
kind = "residual_init"
[[transform]]
kind = "embed_scale"
factor = 0.08333333333
positions = true
"""


def gpt2(layers: int) -> dict[str, object]:
    """Its config: width 16, one head, 32 positions, bytes, an untied head, no dropout."""
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": layers, "n_embd": 16, "n_head": 1,
        "n_positions": 32, "vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "tie_word_embeddings": False,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip


def digits(count: int, seed: int) -> str:
    """Independent draws, the same on every machine: the loss stays at their entropy, 2.37 nats."""
    return "".join(random.Random(seed).choices("0123456789abcdef", SHARES, k=count))


def write_inputs(folder: Path, layers: int) -> None:
    (folder / "gpt2").mkdir(parents=True, exist_ok=True)
    (folder / "gpt2" / "config.json").write_text(json.dumps(gpt2(layers), indent=2))
    (folder / "vanilla-2304.toml").write_text(VANILLA_2304)
    (folder / "digits.txt").write_text(digits(1_000_000, 0))
    (folder / "held-out.txt").write_text(digits(4_000, 1))


@dataclass(frozen=True)
class Job:
    """One command: some arms, some seeds."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{'+'.join(self.arms)}-{'+'.join(map(str, self.seeds))}"


def jobs(arms: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Two halves, each a list of seeds; where their number is odd, the arms of the last one are shared out."""
    whole, half = seeds[: len(seeds) // 2 * 2], len(arms) // 2
    found = [Job(tuple(arms), tuple(whole[i::2])) for i in range(2) if whole]
    return found + [Job(tuple(a), (seeds[-1],)) for a in (arms[half:], arms[:half]) if a and len(seeds) % 2]


def train(job: Job, out: Path, steps: int) -> None:
    """``spikepatch train``, with what it says of its progress behind the seeds' numbers."""
    folder, inputs = out / job.name, out / "inputs"
    recipes = {"vanilla-2304": str(inputs / "vanilla-2304.toml")}
    command = [
        sys.executable, "-m", "spikepatch", "train", *(f"{a}={inputs / 'gpt2'}@{recipes.get(a, a)}" for a in job.arms),
        "--data", str(inputs / "digits.txt"), "--eval-data", str(inputs / "held-out.txt"), "--out", str(folder),
        "--seeds", ",".join(map(str, job.seeds)), "--steps", str(steps), "--lr", "3e-3", "--warmup", str(steps // 75),
        "--schedule", "constant", "--seq-len", "32", "--batch-tokens", "128", "--watch-every", "0",
        "--checkpoint-every", "0", "--json",
        *(["--resume"] if (folder / "run.json").exists() else []),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stderr or ():
            print(f"{','.join(map(str, job.seeds))}: {line}", end="", flush=True)  # noqa: T201
    if process.returncode not in (0, 1):  # 1: something spiked
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")


def show(folders: Sequence[Path], picture: Path) -> None:
    """The comparison of the arms, of all seeds together."""
    command = [sys.executable, "-m", "spikepatch", "report", *map(str, folders)]
    picture.unlink(missing_ok=True)
    done = subprocess.run([*command, "--out", str(picture), "--json"], stdout=subprocess.PIPE, text=True, check=True)
    line = "{:14}{:>23}{:>8}{:>22}{:>12}".format
    print(line("", "runs with loss events", "events", "largest excess, nats", "Fisher's p"))  # noqa: T201
    for arm in json.loads(done.stdout)["arms"]:
        excess = arm["excess"][1]
        p = "" if arm["fisher"] is None else f"{arm['fisher']:.2g}"
        seen = f"{arm['with_events']} of {arm['runs']}", arm["events"], "-" if excess is None else f"{excess:.2f}"
        print(line(arm["model"], *seen, p))  # noqa: T201
    print(f"\nthe curves: {picture}\nall of it:  {shlex.join(['spikepatch', *command[3:], '--out', 'page.html'])}")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/spikes"))
    parser.add_argument("--arms", default=",".join(ARMS), help="the first is what the others are compared with")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    arms, out, begun = tuple(arguments.arms.split(",")), arguments.out, time.monotonic()
    layers, steps, seeds = (2, 60, SEEDS[:2]) if arguments.smoke else (32, 1500, SEEDS)

    if arguments.smoke:
        arms = arms[:2]
    write_inputs(out / "inputs", layers)
    todo = jobs(arms, seeds)
    with ThreadPoolExecutor(2) as two:
        list(two.map(train, todo, itertools.repeat(out), itertools.repeat(steps)))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = f"{(time.monotonic() - begun) / 60:.1f} minutes, {(used.ru_utime + used.ru_stime) / 60:.1f} of a processor"
    print(f"trained in {spent}\n")  # noqa: T201
    show([out / job.name for job in todo], out / "arms.svg")


if __name__ == "__main__":
    main()
