"""The comparison of "Spike No More" at a size for two CPU cores: four initialisations of one GPT-2, on the same
batches, at several learning rates and seeds, and what pre-flight had said of each.

    python examples/reproduce_paper_small.py                # 12 layers of width 128: 32 runs x 300 steps, 40 minutes
    python examples/reproduce_paper_small.py --full --data 'c4/*.jsonl'   # the paper's 350M, on a GPU in bfloat16
    python examples/reproduce_paper_small.py --smoke        # seconds: does it run?

The risk grows as the embedding's std falls, and that falls with the width: the small vanilla model gets the embedding
std of the one that it stands for, sqrt(2 / (5 * 2304)) of the paper's 1.7B. Scaled Embed multiplies by sqrt(d), so its
std on the stream is the same at any width. The head is untied, as the recipes' embeddings differ in scale.

Printed is what became of the loss, then spikes, then the rank correlation of pre-flight and outcome. OUT holds the page
with all curves.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import click
from transformers import GPT2Config

import spikepatch
from spikepatch.report.html import write_page
from spikepatch.training.entries import build, parse_entries
from spikepatch.training.page import page
from spikepatch.training.runs import run_all
from spikepatch.training.settings import Settings, TrainingCommand
from spikepatch.training.verdict import RunResult, Verdict

VANILLA = """
name = "vanilla-1.7b"
[[transform]]
kind = "small_init"
token_embedding = false
[[transform]]
kind = "residual_init"
[[transform]]
kind = "embed_init"
std = 0.01318
"""

VERDICTS = ("stable", "at-risk", "unstable")


def config(layers: int, width: int, heads: int, positions: int) -> GPT2Config:
    bytes_and_end = 257
    return GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, n_positions=positions, vocab_size=bytes_and_end,
        bos_token_id=256, eos_token_id=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        tie_word_embeddings=False, architectures=["GPT2LMHeadModel"],
    )  # fmt: skip


def ranks(values: Sequence[float]) -> list[float]:
    """Ties get the mean of their places."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return statistics.correlation(ranks(first), ranks(second))


def preflight(models: Sequence[str], seeds: Sequence[int], tokens: int) -> dict[str, dict[str, object]]:
    """Model and seed -> what ``check`` says of exactly the weights that are trained."""
    found: dict[str, dict[str, object]] = {}
    for entry in parse_entries(models):
        for seed in seeds:
            report = spikepatch.check(build(entry, seed=seed), tokens=tokens, seed=seed)
            found[f"{entry.name}, seed {seed}"] = {
                "verdict": report.verdict, "gradient_ratio": report.gradient_ratio, "sigma_start": report.sigma_start,
                "eq15_excess_layer1": report.eq15_excess_layer1, "initial_loss": report.initial_loss,
            }  # fmt: skip
    return found


def outcome(run: RunResult) -> float:
    """Held-out loss; a run whose loss is not back is worse than any."""
    return math.inf if run.verdict == "not back" or run.eval_loss is None else run.eval_loss


def show(verdict: Verdict, before: dict[str, dict[str, object]]) -> None:
    rates = sorted({run.lr for run in verdict.runs})
    click.echo("\nheld-out loss, mean over seeds (runs not back / events of the loss)")
    click.echo(
        f"{'':16}" + "".join(f"{f'lr {rate:g}':>20}" for rate in rates) + f"{'sensitivity':>14}{'stable lr':>11}"
    )
    for model in verdict.models:
        cells = []
        for rate in rates:
            runs = [run for run in verdict.runs if run.name == model.name and run.lr == rate]
            losses = [run.eval_loss for run in runs if run.eval_loss is not None]
            mean = f"{statistics.fmean(losses):.3f}" if losses else "-"
            gone = sum(r.verdict == "not back" for r in runs)
            events = sum(e.kind != "gradient_norm" for r in runs for e in r.events)
            cells.append(f"{f'{mean} ({gone}/{events})':>20}")
        sensitivity = "n/a" if model.sensitivity is None else f"{model.sensitivity:.4f}"
        stable = "none" if model.stable_lr is None else f"{model.stable_lr:g}"
        click.echo(f"{model.name:16}" + "".join(cells) + f"{sensitivity:>14}{stable:>11}")

    click.echo("\npre-flight, by model and seed")
    for name, said in before.items():
        values = (f"{k} {v:.3g}" if isinstance(v, float) else str(v) for k, v in said.items())
        click.echo(f"{name:24}" + "  ".join(values))
    click.echo(
        "\nrank correlation of pre-flight and outcome (Spearman; 1: what is judged riskier ends with the higher loss)"
    )
    for label, chosen in [("all runs", verdict.runs)] + [
        (f"lr {rate:g}", tuple(run for run in verdict.runs if run.lr == rate)) for rate in rates
    ]:
        numbers = [before[f"{run.name}, seed {run.seed}"] for run in chosen]
        losses = [outcome(run) for run in chosen]
        order = spearman([VERDICTS.index(str(n["verdict"])) for n in numbers], losses)
        ratio = spearman([float(str(n["gradient_ratio"])) for n in numbers], losses)
        click.echo(f"{label:12} verdict {order:6.2f}   gradient ratio {ratio:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    parser.add_argument("--data", default="builtin:stdlib")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true")
    size.add_argument("--smoke", action="store_true")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()

    seeds: tuple[int, ...] = (0, 1)
    multipliers: tuple[float, ...] = (1.0, 10**0.5, 10.0, 10**1.5)
    lr = 3e-3
    if arguments.full:
        model, lr = config(24, 1024, 16, 1024), 5e-4
        settings = Settings(steps=50_000, batch_tokens=524_288, seq_len=1024, micro_batch=16, precision="bf16")
    elif arguments.smoke:
        model, seeds, multipliers = config(2, 32, 2, 16), (0,), (1.0,)
        settings = Settings(steps=4, batch_tokens=64, seq_len=16, warmup=1, checkpoint_every=0, watch_every=2)
    else:
        model = config(12, 128, 4, 64)
        settings = Settings(steps=300, batch_tokens=512, seq_len=64, warmup=20, checkpoint_every=0)

    inputs = arguments.out.with_name(arguments.out.name + "-inputs")
    inputs.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(inputs / "gpt2")
    (inputs / "vanilla-1.7b.toml").write_text(VANILLA)
    recipe = "vanilla" if arguments.full else inputs / "vanilla-1.7b.toml"
    models = [
        f"vanilla={inputs}/gpt2@{recipe}",
        *(f"{name}={inputs}/gpt2@{name}" for name in ("scaled-embed", "embed-ln", "xavier")),
    ]
    before = preflight(models, seeds, settings.seq_len)
    (inputs / "preflight.json").write_text(json.dumps(before, indent=2))

    def say(record: object) -> None:
        if isinstance(record, dict) and record["type"] in {"run", "eval", "stop"}:
            kept = ("name", "lr", "seed", "why", "loss")
            click.echo(" ".join([record["type"], *(f"{k} {record[k]}" for k in kept if k in record)]))

    asked = TrainingCommand(
        tuple(models), (arguments.data,), settings, lr, multipliers=tuple(multipliers), seeds=tuple(seeds)
    )
    verdict = run_all(asked, arguments.out, resume=arguments.resume, progress=say)
    show(verdict, before)
    write_page(page(arguments.out), arguments.out / "report.html")
    click.echo(f"\npage: {arguments.out / 'report.html'}")


if __name__ == "__main__":
    main()
