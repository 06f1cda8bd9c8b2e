"""Logs of every format, and what real files have in store: each by code that writes as the trainer does."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikepatch import BadSource, Refused, SpikepatchError, TrainingLog, judge, read_log
from spikepatch.spikes.line_formats import LINE_FORMATS
from tests.spikes.curves import fall, spike
from tests.spikes.logs import LINES, text

LOSSES = [float(x) for x in fall(120) + spike(120, 80, 3.0, 3.0)]
NORMS = [float(x) for x in np.exp(np.random.default_rng(0).normal(0, 0.1, 120))]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(**more: Any) -> list[dict[str, Any]]:
    return [
        {"step": i, "loss": x, "grad_norm": n, **more} for i, (x, n) in enumerate(zip(LOSSES, NORMS, strict=True), 1)
    ]


def test_every_format_of_the_table_is_tried() -> None:
    assert {form.name for form in LINE_FORMATS} == set(LINES)
    assert all(form.seen_in for form in LINE_FORMATS)


@pytest.mark.parametrize("form", LINES)
def test_lines(form: str, tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(text(form, LOSSES, NORMS))
    log = read_log(path)
    about = next(f for f in LINE_FORMATS if f.name == form)
    assert (log.format, log.loss_of) == (form, about.loss_of)
    assert log.steps == tuple(range(1, 121))
    assert log.evals == (1 if LINES[form][1] else 0)
    assert [x for x in log.losses if x is not None] == pytest.approx(LOSSES, abs=6e-4)
    if about.norm:
        assert [n for n in log.norms if n is not None] == pytest.approx(NORMS, abs=6e-3)
    else:
        assert set(log.norms) == {None}
    assert any(e.kind == "loss" and e.onset == 81 for e in judge(log).events)


@pytest.mark.parametrize("rank", ["[rank0]:", "[default0]:[2026-01-02 03:04:05] ", "0: "])
def test_lines_of_a_rank_and_of_windows(rank: str, tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    for form in LINES:
        lines = text(form, LOSSES, NORMS).splitlines()
        path.write_text("".join(f"{rank}{line}\n" for line in lines), encoding="utf-16")
        log = read_log(path)
        assert (log.format, len(log.steps)) == (form, 120)


def test_lines_with_nan_and_without_a_loss(tmp_path: Path) -> None:
    writer = LINES["llm.c's output"][0]
    path = tmp_path / "log.txt"
    path.write_text("\n".join(writer(s, math.nan, math.nan) for s in range(1, 60)))
    assert judge(path).verdict == "not back"
    megatron = [LINES["Megatron-LM's output"][0](s, x, 1.0) for s, x in enumerate(LOSSES, 1)]
    skipped = [
        line.split(" lm loss:")[0] + " loss scale: 8388608.0 | number of skipped iterations:   1 |" for line in megatron
    ]
    path.write_text("\n".join([*skipped[:5], *megatron[5:]]))
    log = read_log(path)
    assert log.losses[:6] == (*[None] * 5, pytest.approx(LOSSES[5], abs=1e-6))
    assert "5 rows have no loss (skipped by the loss scaler, for example)" in list(log.describe())


def test_json_lines(tmp_path: Path) -> None:
    log = read_log(jsonl(tmp_path / "a.jsonl", [*rows(), {"step": 120, "val_loss": 2.5}]))
    assert log.format == "JSON lines, 'loss' by 'step'"
    assert (log.losses, log.norms, log.evals) == (tuple(LOSSES), tuple(NORMS), 1)
    assert log.interval == 1
    factory = [{"current_steps": 10 * r["step"], "total_steps": 1200, "loss": r["loss"]} for r in rows()]
    log = read_log(jsonl(tmp_path / "trainer_log.jsonl", factory))
    assert (log.format, log.loss_of, log.interval) == ("LLaMA-Factory's trainer_log.jsonl", "mean", 10)
    assert "a row is the mean of 10 steps: a spike of n of them is n / 10 as high" in list(log.limits())


def test_other_keys_and_the_list_of_those_that_are_there(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"i": r["step"], "cross_entropy": r["loss"], "size": 1.0} for r in rows()])
    with pytest.raises(Refused, match="its keys are cross_entropy, i, size") as error:
        read_log(path)
    assert error.value.remedy == "--loss with the one of these that it is"  # no column that is surely another
    log = read_log(path, loss="cross_entropy", step="i", norm="size")
    assert (log.losses, set(log.norms)) == (tuple(LOSSES), {1.0})
    with pytest.raises(Refused, match="it has no 'crossentropy'") as error:
        read_log(path, loss="crossentropy")
    assert "did you mean cross_entropy?" in str(error.value)


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", "train_loss_epoch", "train_loss_step", "val_loss"])
        writer.writeheader()
        for step, loss in enumerate(LOSSES, 1):
            writer.writerow({"epoch": 0, "step": 50 * step - 1, "train_loss_step": loss})
            if step % 40 == 0:
                writer.writerow({"epoch": 0, "step": 50 * step - 1, "val_loss": 3.0})
    log = read_log(path)
    assert (log.format, log.loss_of) == ("Lightning's metrics.csv, 'train_loss_step' by 'step'", "one step")
    assert (log.losses, log.evals, log.interval) == (tuple(LOSSES), 3, 50)
    assert "one step in 50 is logged: a spike shorter than 100 steps may be invisible" in list(log.limits())


def test_a_file_that_lightning_wrote() -> None:
    """By CSVLogger of Lightning 2.6.6, from a tiny model whose batches 70 to 72 had random targets, in two epochs."""
    log = read_log(Path(__file__).parent / "files/lightning_metrics.csv")
    assert log.format == "Lightning's metrics.csv, 'train_loss_step' by 'step'"
    assert (log.steps, log.evals) == (tuple(range(120)), 2)
    report = judge(log)
    assert [(e.onset, e.back) for e in report.events if e.form != "blip"] == [(70, 73)]
    assert report.verdict == "spikes"


def test_an_export_with_several_runs_asks_which(tmp_path: Path) -> None:
    path = tmp_path / "wandb.csv"
    lines = ['"Step","a - train/loss","a - train/loss__MIN","b - train/loss"']
    path.write_text("\n".join([*lines, *(f'"{s}","{x}","{x}","{x + 1}"' for s, x in enumerate(LOSSES))]))
    with pytest.raises(Refused, match="2 columns may be its loss"):
        read_log(path)
    log = read_log(path, loss="b - train/loss")
    assert log.losses == tuple(x + 1 for x in LOSSES)
    thin = read_log(jsonl(tmp_path / "thin.jsonl", [{**r, "step": 10 * r["step"]} for r in rows()]))
    assert any(
        note.startswith("the format does not say whether a loss is of one step or a mean") for note in thin.notes
    )
    assert "Step counts calls of the logger, which may not be steps of the optimiser" in log.notes


def test_documents(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    history = [{"step": 5 * r["step"], "loss": r["loss"], "grad_norm": r["grad_norm"], "epoch": 0.1} for r in rows()]
    path.write_text(json.dumps({"global_step": 600, "log_history": [*history, {"step": 600, "eval_loss": 2.5}]}))
    log = read_log(path)
    assert log.format.startswith("Trainer's trainer_state.json")
    assert (log.loss_of, log.interval, log.evals, log.losses) == ("mean", 5, 1, tuple(LOSSES))
    golden: dict[str, Any] = {"lm loss": {"start_step": 1, "end_step": 120, "step_interval": 5, "values": {
        str(5 * i): "nan" if i % 3 else x for i, x in enumerate(LOSSES, 1)}},
        "iteration-time": {"values": {"5": 1.0}}}  # fmt: skip
    path.write_text(json.dumps(golden))
    log = read_log(path)
    assert log.format == "Megatron-LM's golden values"
    assert sum(x is None for x in log.losses) == 80  # "nan" is not logged
    odd = {"lm loss": {"values": {**golden["lm loss"]["values"], "9" * 5000: 1.0}}, "odd": {"values": 3}}
    path.write_text(json.dumps(odd))
    assert read_log(path).losses == log.losses
    assert judge(log).verdict != "not back"


def test_our_own(tmp_path: Path) -> None:
    from tests.training.synthetic import folder

    made = folder(tmp_path, ("a",), curve=lambda m, lr, s, n: math.nan if n == 100 else LOSSES[0] / n + 2, steps=200)
    run = next(made.glob("a/*"))
    with pytest.raises(Refused, match="it is the folder of a whole training"):
        read_log(made)
    for path in (run, run / "log.jsonl"):
        log = read_log(path)
        assert (log.format, len(log.steps), log.evals) == ("spikepatch's log.jsonl", 200, 1)
        assert math.isnan(log.losses[99] or 0)


def test_tensorboard(tmp_path: Path) -> None:
    """Written by tensorboard's own writer."""
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    file = writer.EventFileWriter(str(tmp_path / "run"))
    for step, (loss, norm) in enumerate(zip(LOSSES, NORMS, strict=True), 1):
        values = [("train/loss", loss), ("train/grad_norm", norm), ("eval/loss", 3.0)]
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values]
        file.add_event(Event(step=step, summary=Summary(value=scalars)))
    file.close()
    log = read_log(tmp_path / "run")
    assert read_log(tmp_path).losses == log.losses
    assert log.format == "TensorBoard's events, 'train/loss'"
    assert [x for x in log.losses if x is not None] == pytest.approx(LOSSES, rel=1e-6)
    assert [n for n in log.norms if n is not None] == pytest.approx(NORMS, rel=1e-6)
    assert log.steps == tuple(range(1, 121))
    other = writer.EventFileWriter(str(tmp_path / "other"))
    other.close()
    with pytest.raises(Refused, match="it has the event files of 2 runs") as error:
        read_log(tmp_path)
    assert "they are in other, run" in str(error.value)


@pytest.mark.slow
def test_a_file_that_trainer_wrote(tmp_path: Path) -> None:
    """trainer_state.json and the events of a real run."""
    from tests.training.test_callback import trainer

    run = trainer(
        tmp_path, "random", logging_steps=1, save_strategy="steps", save_steps=64, logging_nan_inf_filter=False
    )
    run.train()
    log = read_log(tmp_path / "checkpoint-64" / "trainer_state.json")
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert list(log.losses) == losses
    assert len(losses) == 64
    assert any(e.kind == "loss" and e.onset == 50 for e in judge(log).events)


# Traps.


def test_every_row_twice(tmp_path: Path) -> None:
    log = read_log(jsonl(tmp_path / "a.jsonl", [row for r in rows() for row in (r, r)]))
    assert log.losses == tuple(LOSSES)
    assert log.notes == ("120 rows repeat the step of the row before, which they replace",)


def test_a_counter_that_begins_anew_with_each_epoch(tmp_path: Path) -> None:
    parts = [{"step": 1 + i % 40, "loss": x} for i, x in enumerate(LOSSES)]
    log = read_log(jsonl(tmp_path / "a.jsonl", parts))
    assert (log.steps, log.losses) == (tuple(range(1, 121)), tuple(LOSSES))
    assert log.notes[0] == "the counter begins anew at 1 (an epoch): it is counted on as 41"


def test_a_resume(tmp_path: Path) -> None:
    again = [*rows()[:70], *({**r, "loss": r["loss"] + 0.001} for r in rows()[50:])]
    log = read_log(jsonl(tmp_path / "a.jsonl", again))
    assert log.steps == tuple(range(1, 121))
    assert log.losses[49:51] == (LOSSES[49], LOSSES[50] + 0.001)
    assert log.notes == ("resumed at step 51: 20 rows come again, the later ones count",)


def test_starts_in_one_file(tmp_path: Path) -> None:
    log = read_log(jsonl(tmp_path / "a.jsonl", [*rows()[:2], *rows()[:30], *rows()]))
    assert log.losses == tuple(LOSSES)
    assert log.notes == (
        "3 starts are in one file: the longest is judged, of 120 rows, and 32 rows of the others are not",
    )


def test_nan_that_means_not_logged(tmp_path: Path) -> None:
    """As a word in JSON; and in a table where it stands between all the others."""
    words = [{"step": r["step"], "loss": r["loss"] if r["step"] % 5 == 0 else "nan"} for r in rows()]
    log = read_log(jsonl(tmp_path / "a.jsonl", words))
    assert sum(x is not None for x in log.losses) == 24
    path = tmp_path / "a.csv"
    path.write_text("step,loss\n" + "".join(f"{s},{x if s % 5 == 0 else 'nan'}\n" for s, x in enumerate(LOSSES, 1)))
    log = read_log(path)
    assert (len(log.steps), log.interval) == (24, 5)
    assert "'nan' stands at regular rows: it is read as not logged" in log.notes
    path.write_text("step,loss\n" + "".join(f"{s},{x if s < 100 else 'nan'}\n" for s, x in enumerate(LOSSES, 1)))
    assert judge(path).verdict == "not back"


def test_a_nan_that_stays_in_an_average(tmp_path: Path) -> None:
    history = [{"step": r["step"], "loss": r["loss"] if r["step"] < 60 else math.nan, "grad_norm": 1.0} for r in rows()]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": history}))
    log = read_log(path)
    assert log.losses[59:] == (pytest.approx(math.nan, nan_ok=True), *[None] * 60)
    assert any("one NaN stays in an average" in note for note in log.notes)


def test_irregular_steps_and_a_moving_average_are_told(tmp_path: Path) -> None:
    log = TrainingLog(tuple(s for s in range(1, 121) if not 50 < s < 90), tuple(LOSSES[:50] + LOSSES[89:]), name="x")
    assert "1 times rows are not 1 apart; the longest gap is 40 steps after step 50" in list(log.describe())
    average = 8.0
    smooth: list[dict[str, Any]] = []
    for loss in [float(x) for x in fall(2000, 0.3)]:
        average = 0.99 * average + 0.01 * loss
        smooth.append({"step": len(smooth), "loss": average})
    log = read_log(jsonl(tmp_path / "a.jsonl", smooth))
    assert log.loss_of == "moving average"
    assert any(line.startswith("the loss is a moving average") for line in log.limits())
    noise = [{"step": i, "loss": float(x)} for i, x in enumerate(fall(2000, 0.3))]
    assert read_log(jsonl(tmp_path / "b.jsonl", noise)).loss_of == "one step"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "the file is empty"),
        ("\ufeff \n", "the file is empty"),
        ("hello\nworld\n", "no line of it is in a format that is known"),
        ('{"log_history": [', "it begins as JSON and is not whole"),
        ("\x00\x01\x00\x00", "it is no text"),
        ("\ufffd" * 50 + "a" * 500, "it is no text"),
        ("a,b\n" + "x" * 200_000 + ",1\n", "as a table it is broken"),
        ("step,loss\n", "it has no columns"),
    ],
)
def test_what_is_no_log_is_refused(content: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text(content)
    with pytest.raises(Refused, match="this is no training log that is known") as error:
        read_log(path)
    assert why in str(error.value)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadSource, match="the log cannot be read"):
        read_log(tmp_path / "none")
    with pytest.raises(Refused, match=r"neither TensorBoard's events nor a log\.jsonl"):
        read_log(tmp_path)
    with pytest.raises(Refused, match="it has no losses"):
        read_log(jsonl(tmp_path / "a.jsonl", [{"step": 1, "loss": None}]))


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_logs_are_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever stands in it: an error of ours, or rows that can be judged."""
    form = data.draw(st.sampled_from([*LINES, "jsonl", "csv", "state", "own"]))
    if form == "jsonl":
        whole = "".join(json.dumps(row) + "\n" for row in rows())
    elif form == "csv":
        whole = "step,loss,norm\n" + "".join(f"{r['step']},{r['loss']},{r['grad_norm']}\n" for r in rows())
    elif form == "state":
        whole = json.dumps({"log_history": rows()})
    elif form == "own":
        whole = "".join(json.dumps({"type": "step", "flags": [], "gradient_norm": 1.0, **r}) + "\n" for r in rows())
        whole = json.dumps({"type": "run"}) + "\n" + whole
    else:
        whole = text(form, LOSSES, NORMS)
    damaged = whole.encode()
    for _ in range(data.draw(st.integers(1, 6))):
        at, cut = data.draw(st.integers(0, len(damaged))), data.draw(st.integers(0, 200))
        piece = data.draw(
            st.sampled_from(
                [b"", b"nan", b"1e999", b"9" * 400, b"null", b'"x"', b"[" * 3000, b"\n", b"\x00", b"{}", b"-"]
            )
        )
        damaged = damaged[:at] + piece + damaged[at + cut :]
    path = tmp_path_factory.mktemp("damaged") / "log"
    path.write_bytes(damaged)
    try:
        log = read_log(path)
    except SpikepatchError:
        return
    json.dumps(judge(log).to_dict(), allow_nan=False)


def test_rows_by_hand() -> None:
    report = judge(TrainingLog(tuple(range(1, 121)), tuple(LOSSES), tuple(NORMS), name="mine"))
    assert report.verdict == "spikes"
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["log"]["name"] == "mine"
    with pytest.raises(Refused, match="its steps do not increase"):
        TrainingLog((1, 1), (1.0, 2.0))
    with pytest.raises(Refused, match="it has 1 steps, 2 losses"):
        TrainingLog((1,), (1.0, 2.0))


# Lines of text of one's own.


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("[2026-11-30 03:00:01,123] INFO step={s} nll={x} | gnorm={n}", ("nll", "gnorm", "step")),
        ("2026-11-30T03:00:01Z INFO:root:update {s}: nll {x}, gnorm {n}", ("nll", "gnorm", "update")),
        (
            "[03:00:01 host-3] train | iter {s:>6} | lm nll: {x} | grad size: {n} | 227.6ms",
            ("nll", "grad size", "iter"),
        ),
        ("step {s} {{'nll': {x}, 'gnorm': tensor({n}, device='cuda:0'), 'lr': 1e-3}}", ("nll", "gnorm", None)),
        ('03:00:01 INFO {{"step": {s}, "nll": "{x}", "gnorm": {n}}}', ("nll", "gnorm", "step")),
        ("step {s}: train loss {x}, grad norm {n}", (None, None, None)),
        ("INFO trainer step={s}, loss={x}, grad_norm={n}, lr=1e-3", (None, None, None)),
        ("Train Epoch: 1 [{s}/120 (3%)] step {s}\tLoss: {x} gnorm {n}", ("loss", "gnorm", "step")),
    ],
)
def test_lines_of_free_text(line: str, named: tuple[str | None, str | None, str | None], tmp_path: Path) -> None:
    lines = ["start, of a run with 8 layers", "device: cuda:0, 1 GPU"]
    for row in rows():
        lines.append(line.format(s=row["step"], x=row["loss"], n=row["grad_norm"]))
        if row["step"] % 40 == 0:
            lines += [
                f"eval step {row['step']} loss: 9.5 nll=9.5",
                f"Evaluation at step {row['step']}: nll 9, loss=9.5",
            ]
    path = tmp_path / "mine.log"
    path.write_text("\n".join(lines))
    loss, norm, step = named
    log = read_log(path, loss=loss, norm=norm, step=step)
    assert (log.losses, log.norms, log.steps) == (tuple(LOSSES), tuple(NORMS), tuple(range(1, 121)))
    assert log.format.startswith("lines of text, ")
    if loss is not None:
        with pytest.raises(Refused, match=r"of no trainer that is known; numbers stand behind .*(nll|Loss)") as error:
            read_log(path)
        assert "step,loss,grad_norm" in error.value.remedy
    with pytest.raises(Refused, match="it has no 'size of it'"):
        read_log(path, loss="size of it")


def test_an_ambiguous_name_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "mine.log"
    path.write_text("".join(f"step {s} aux loss {x / 9} lm nll {x} moe nll 2\n" for s, x in enumerate(LOSSES)))
    with pytest.raises(Refused, match=r"it has no 'nll'(.|\n)*aux loss, lm nll, moe nll, step"):
        read_log(path, loss="nll")
    with pytest.raises(Refused, match="its loss is not found"):
        read_log(path)  # a loss that is only a part of it is not taken for it
    assert read_log(path, loss="lm nll").losses == tuple(LOSSES)
    path.write_text("".join(f"aux loss={x / 9} lm loss={x} step={s}\n" for s, x in enumerate(LOSSES)))
    assert read_log(path).losses == tuple(LOSSES)


def test_a_trainer_that_is_known_by_the_names_of_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(text("llm.c's output", LOSSES, NORMS))
    log = read_log(path, loss="loss", norm="norm", step="step")
    assert (log.steps, log.losses) == (read_log(path).steps, read_log(path).losses)


@pytest.mark.parametrize("more", [", step={s}", ""])
def test_a_bar_of_tqdm(more: str, tmp_path: Path) -> None:
    """It writes each state over the one before; of a step the last one counts."""
    states = []
    for row in rows():
        bar = f"Training: {row['step']:3}%|█▌  | {row['step']}/120 [00:01<00:20,  4.50it/s, loss="
        states += [f"{bar}9.99{more.format(s=row['step'])}]", f"{bar}{row['loss']}{more.format(s=row['step'])}]"]
    path = tmp_path / "log.txt"
    path.write_bytes("\r".join(states).encode() + b"\n")
    log = read_log(path)
    assert (log.steps, log.losses) == (tuple(range(1, 121)), tuple(LOSSES))
    path.write_bytes("\r".join(["step,loss", *(f"{s},{x}" for s, x in enumerate(LOSSES))]).encode())
    assert read_log(path).losses == tuple(LOSSES)


def test_a_table_needs_a_header(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("".join(f"{s},{x},1.0\n" for s, x in enumerate(LOSSES)))
    with pytest.raises(Refused, match="it is a table without a header"):
        read_log(path)
    path.write_text("step,loss,grad_norm\n" + path.read_text())  # the remedy
    assert read_log(path).losses == tuple(LOSSES)
    path.write_text("step,0,1\n" + "".join(f"{s},{x},{x + 1}\n" for s, x in enumerate(LOSSES)))
    assert read_log(path, loss="0").losses == tuple(LOSSES)  # a pivot by seeds


def test_keys_within_keys(tmp_path: Path) -> None:
    nested = [
        {"_step": r["step"], "train": {"loss": r["loss"], "grad": {"norm": r["grad_norm"]}}, "val": {"loss": 9.0}}
        for r in rows()
    ]
    path = jsonl(tmp_path / "a.jsonl", nested)
    for names in ({}, {"loss": "train.loss", "norm": "train.grad.norm"}, {"loss": "train/loss"}):
        log = read_log(path, **names)
        assert (log.steps, log.losses, log.norms) == (tuple(range(1, 121)), tuple(LOSSES), tuple(NORMS))
    with pytest.raises(Refused, match=r"its keys are _step, train\.grad\.norm, train\.loss, val\.loss"):
        read_log(path, loss="train")
    path = jsonl(
        tmp_path / "a.jsonl", [{"m": {"ce": r["loss"], "z": {"loss": 0.1}, "aux": {"loss": 0}}} for r in rows()]
    )
    with pytest.raises(Refused, match=r"2 columns may be its loss\n.*m\.aux\.loss, m\.ce, m\.z\.loss"):
        read_log(path)
    assert read_log(path, loss="m/ce").losses == tuple(LOSSES)
    flat = jsonl(tmp_path / "flat.jsonl", [{"x/ce": r["loss"]} for r in rows()])
    assert read_log(flat, loss="x.ce").losses == tuple(LOSSES)


def test_the_output_folder_of_a_trainer(tmp_path: Path) -> None:
    for last in (9, 80, 100):
        (tmp_path / f"checkpoint-{last}").mkdir()
        (tmp_path / f"checkpoint-{last}/trainer_state.json").write_text(
            json.dumps({"global_step": last, "log_history": rows()[:last]})
        )
    (tmp_path / "checkpoint-110").mkdir()  # killed while it was written
    log = read_log(tmp_path)
    assert len(log.steps) == 100
    assert log.notes[0] == f"read from {tmp_path}/checkpoint-100/trainer_state.json"
    assert len(read_log(tmp_path / "checkpoint-80").steps) == 80
    own = tmp_path / "trainer_state.json"
    for reached, count in ((120, 120), (90, 100)):  # the end of the run; the end of one that was resumed
        own.write_text(json.dumps({"global_step": reached, "log_history": rows()[:reached]}))
        assert len(read_log(tmp_path).steps) == count
