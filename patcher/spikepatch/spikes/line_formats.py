"""The lines that trainers print: one table. A format is in it only where a real log of it, or its writer's source, was
read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

#: What a row's loss is of: one step, the mean since the row before, or an exponential average.
LossOf = Literal["one step", "mean", "moving average"]

_NUMBER = r"([-+]?(?:nan|inf|\d[\d,]*(?:\.\d*)?(?:e[-+]?\d+)?))"


@dataclass(frozen=True)
class LineFormat:
    """One trainer's lines.

    Attributes:
        name: as it is told.
        step, loss, norm: a pattern with a group for each; a row begins at a line with ``step``, and the others are
            looked for in that line and, where ``lines``, in those up to the next row. Without ``step`` rows are
            counted.
        loss_of: what the loss is of. The norm is before clipping in all of them.
        evals: lines of evaluations, which are counted and left out.
        seen_in: the writer, or where a log was seen.
    """

    name: str
    step: str | None
    loss: str
    norm: str | None = None
    loss_of: LossOf = "one step"
    evals: str | None = None
    lines: bool = False
    seen_in: str = ""


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace("NUMBER", _NUMBER), re.IGNORECASE)


LINE_FORMATS: tuple[LineFormat, ...] = (
    LineFormat("nanoGPT's output", r"^iter (\d+): loss", r": loss NUMBER, time", evals=r"^step \d+: train loss",
               seen_in="karpathy/nanoGPT train.py; loss of the last micro-batch"),
    LineFormat("llm.c's output", r"^step +(\d+)/\d+ \| (?:train )?loss", r"loss +NUMBER", r"norm +NUMBER",
               evals=r"^val loss", seen_in="karpathy/llm.c train_gpt2.cu"),
    LineFormat("llm.c's main.log", r"^s:(\d+) trl:", r"trl:NUMBER", r"norm:NUMBER", evals=r"^s:\d+ (?:tel|eval):",
               seen_in="karpathy/llm.c llmc/logger.h"),
    LineFormat("build-nanogpt's log.txt", r"^(\d+) train ", r"train NUMBER", evals=r"^\d+ (?:val|hella) ",
               seen_in="karpathy/build-nanogpt train_gpt2.py"),
    LineFormat("modded-nanogpt's log", r"^step:(\d+)/\d+ .*?train_loss:", r"train_loss:NUMBER",
               evals=r"^step:\d+/\d+ val_loss:", seen_in="KellerJordan/modded-nanogpt records"),
    LineFormat("Megatron-LM's output", r"\biteration +(\d+)/ *\d+ \|", r"\blm loss: NUMBER", r"\bgrad norm: NUMBER",
               loss_of="mean", evals=r"validation loss at iteration", seen_in="NVIDIA/Megatron-LM training_log"),
    LineFormat("MiniMind's output", r"^Epoch:\[\d+/\d+\]\((\d+)/\d+\)", r"\bloss: ?NUMBER",
               seen_in="jingyaogong/minimind trainer"),
    LineFormat("nanochat's output", r"^step (\d+)(?:/\d+)? \([\d.]+%\) \| loss:", r"\| loss: NUMBER",
               r"\| grad norm: NUMBER", loss_of="moving average", evals=r"^Step \d+ \| Validation",
               seen_in="karpathy/nanochat scripts/base_train.py: debiased average, 0.9"),
    LineFormat("torchtitan's output", r"(?<!validate )step: +(\d+) +loss:", r"\bloss: +NUMBER",
               r"grad_norm: +NUMBER", evals=r"validate step:", seen_in="pytorch/torchtitan components/metrics.py"),
    LineFormat("torchtitan's losses", r"^(\d+) \d+\.\d+(?:e-?\d+)?$", r"^\d+ NUMBER$",
               seen_in="pytorch/torchtitan tests/assets/losses"),
    LineFormat("OLMo-core's output", r"\[step=(\d+)/", r"train/CE loss=NUMBER", r"optim/total grad norm=NUMBER",
               lines=True, seen_in="allenai/OLMo-core callbacks/console_logger.py"),
    LineFormat("Trainer's output", None, r"^\{'loss': '?NUMBER", r"'grad_norm': '?NUMBER", loss_of="mean",
               evals=r"^\{'eval_loss':", seen_in="huggingface/transformers PrinterCallback"),
)  # fmt: skip

#: What a colour on a terminal is written as.
COLOUR = re.compile(r"\x1b\[[\d;]*m")

#: What launchers write before a line of a rank: [rank0]:, [default0]:, 0:
_RANK = re.compile(r"^(?:\s*(?:\[[^\]=]*\]:?|\d+:)\s?)+")


def rows_of(form: LineFormat, lines: list[str]) -> tuple[list[tuple[int, float | None, float | None]], int]:
    """Step, loss and norm of each row; None where a line has none. And the number of evaluations left out."""
    step_at, loss_at = form.step and _compiled(form.step), _compiled(form.loss)
    norm_at, eval_at = form.norm and _compiled(form.norm), form.evals and _compiled(form.evals)
    rows: list[tuple[int, float | None, float | None]] = []
    evals, begun = 0, False
    for raw in lines:
        line = _RANK.sub("", COLOUR.sub("", raw).strip("\r\n "))
        if eval_at and eval_at.search(line):
            evals, begun = evals + 1, False
            continue
        found = step_at.search(line) if step_at else loss_at.search(line)
        if found is not None:
            rows.append((int(found[1][:15]) if step_at else len(rows) + 1, None, None))
            begun = True
        if begun and (found is not None or form.lines):
            step, loss, norm = rows[-1]
            value, size = loss_at.search(line), norm_at and norm_at.search(line)
            rows[-1] = (step, _number(value) if value else loss, _number(size) if size else norm)
    return rows, evals


def _number(found: re.Match[str]) -> float:
    return float(found[1].replace(",", ""))
