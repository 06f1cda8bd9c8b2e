"""Lines as trainers print them, by code that formats as theirs does; the loss is of a curve of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

#: Format -> lines of a row; ``evals`` says what an evaluation looks like.
Writer = Callable[[int, float, float], str]

LINES: dict[str, tuple[Writer, str]] = {
    "nanoGPT's output": (
        lambda s, x, n: f"iter {s}: loss {x:.4f}, time {227.62:.2f}ms, mfu {106.93:.2f}%",
        "step 0: train loss 4.4501, val loss 4.4402",
    ),
    "llm.c's output": (
        lambda s, x, n: (
            f"step {s:4d}/19560 | loss {x:7.6f} (+nanz)| norm {n:6.4f} (+1.20z)| lr 8.57e-07 | 4230.95 ms | 31.9%"
            " bf16 MFU | 123917 tok/s"
        ),
        "val loss 11.007921",
    ),
    "llm.c's main.log": (lambda s, x, n: f"s:{s} trl:{x:.4f} lr:0.000001 norm:{n:.2f}", "s:250 tel:6.1565"),
    "build-nanogpt's log.txt": (lambda s, x, n: f"{s} train {x:.6f}", "0 val 11.0864"),
    "modded-nanogpt's log": (
        lambda s, x, n: f"step:{s}/5100 train_loss:{x:.4f} train_time:1368ms step_avg:nanms",
        "step:0/5100 val_loss:15.9936 train_time:227ms step_avg:nanms",
    ),
    "Megatron-LM's output": (
        lambda s, x, n: (
            f" [2026-01-02 03:04:05] iteration {s:8d}/   10000 | consumed samples: 638144 | elapsed time per iteration"
            f" (ms): 10215.3 | learning rate: 1.000187E-05 | global batch size:    64 | lm loss: {x:.6E} | loss scale:"
            f" 1.0 | grad norm: {n:.3f} | number of skipped iterations:   0 | number of nan iterations:   0 |"
        ),
        "validation loss at iteration 1000 | lm loss value: 2.8E+00 | lm loss PPL: 1.6E+01 |",
    ),
    "MiniMind's output": (
        lambda s, x, n: (
            f"Epoch:[1/1]({s}/39695), loss: {x:.4f}, logits_loss: {x:.4f}, lr: 0.00050000, epoch_time: 1min"
        ),
        "",
    ),
    "nanochat's output": (
        lambda s, x, n: (
            f"step {s:05d}/21400 (0.05%) | loss: {x:.6f} | grad norm: {n:.4f} | lrm: 1.00 | dt: 5.71ms | tok/sec:"
            " 22,429 | mfu: 0.00 | total time: 0.00m"
        ),
        "Step 00250 | Validation bpb: 1.2345",
    ),
    "torchtitan's output": (
        lambda s, x, n: (
            f"[rank0]:[titan] 2026-01-02 03:04:05,678 - root - INFO - \x1b[31mstep: {s:2}  \x1b[32mloss: {x:7.4f} "
            f" \x1b[33mgrad_norm: {n:7.4f}  \x1b[36mmemory: 11.50GiB(12.10%)  \x1b[34mtps: 1,234  \x1b[0m"
        ),
        "[titan] root - INFO - \x1b[33mvalidate step: 20  \x1b[32mloss:  4.5000  \x1b[36mmemory: 1GiB\x1b[0m",
    ),
    "torchtitan's losses": (lambda s, x, n: f"{s} {x!r}", ""),
    "OLMo-core's output": (
        lambda s, x, n: (
            f"2026-01-02 03:04:05.678 host:0 INFO [step={s}/1000,epoch=1,eta=1h]\n    train/CE loss={x:.3f}\n   "
            f" train/PPL=1,234\n    optim/total grad norm={n:.4f}"
        ),
        "",
    ),
    "Trainer's output": (
        lambda s, x, n: f"{{'loss': {x:.4f}, 'grad_norm': {n!r}, 'learning_rate': 5e-05, 'epoch': 0.1}}",
        "{'eval_loss': 2.5, 'eval_runtime': 1.0, 'epoch': 0.1}",
    ),
}


def text(name: str, losses: list[float], norms: list[float]) -> str:
    """A log with some noise around it, and an evaluation in the middle."""
    writer, evaluation = LINES[name]

    def lines() -> Iterator[str]:
        yield "Using device: cuda"
        yield "number of parameters: 123.59M"
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
            yield writer(step, loss, norm)
            if step == len(losses) // 2 and evaluation:
                yield evaluation
        yield "done"

    return "\n".join(lines()) + "\n"
