"""The loop against a bare one of torch, and what it does to broken numbers and to spikes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from transformers import get_scheduler

import spikepatch
from spikepatch.residual.points import Points, points_of
from spikepatch.training import checkpoints, loop
from spikepatch.training.batches import batch, held_out_batches
from spikepatch.training.log import RunLog, read
from spikepatch.training.loop import train
from spikepatch.training.settings import Settings
from spikepatch.training.tokens import Tokens
from tests.training.models import on_cpu, small_model, small_tokens

pytestmark = pytest.mark.slow  # processes, trainings, or models at full size

EPS = torch.finfo(torch.float32).eps
NOWHERE = Points((), (), 0)
LR = 3e-3


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return small_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def settings(**changes: Any) -> Settings:
    return Settings(
        **{"steps": 12, "batch_tokens": 256, "seq_len": 32, "watch_every": 0, "checkpoint_every": 0} | changes
    )


def run(
    model: Any,
    tokens: Tokens,
    folder: Path,
    wanted: Settings,
    *,
    lr: float = LR,
    points: Points = NOWHERE,
    seen: Any = None,
    scaler: Any = None,
) -> RunLog:
    accelerator = on_cpu(wanted.precision)
    accelerator.scaler = scaler
    about: dict[str, Any] = {
        "name": "a", "source": "a", "recipe": None, "patched": False, "lr": lr, "multiplier": 1.0, "seed": 0,
        "steps": wanted.steps, "parameters": 1, "versions": {}, "command": "",
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    train(
        model, tokens, wanted, folder, accelerator=accelerator, lr=lr, seed=0, about=about, points=points,
        progress=seen or (lambda record: None),
    )  # fmt: skip
    return read(folder / "log.jsonl")


def losses(log: RunLog) -> list[float | None]:
    return [step.loss for step in log.steps]


def bare(model: Any, tokens: Tokens, wanted: Settings, lr: float = LR) -> Iterator[tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of each step of a loop as it is written without any library."""
    groups = spikepatch.param_groups(model, wanted.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=wanted.betas, fused=True)
    names = {"cosine": "cosine", "constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}
    decay = {"num_decay_steps": round(0.2 * wanted.steps), "decay_type": "linear"}
    schedule = get_scheduler(
        names[wanted.schedule], optimizer, wanted.warmup_steps, wanted.steps, decay if wanted.schedule == "wsd" else {}
    )
    for index in range(wanted.steps):
        rows = torch.from_numpy(batch(tokens, seed=0, index=index, sequences=wanted.sequences, length=wanted.seq_len))
        logits = model(rows[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), wanted.grad_clip or math.inf)
        yield loss.item(), norm.item(), schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "cosine", "warmup": 0.25},
        {"schedule": "constant", "warmup": 3, "grad_clip": 0.0},
        {"schedule": "wsd", "weight_decay": 0.0, "grad_clip": 0.3},
    ],
    ids=["cosine", "constant", "wsd"],
)
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_bit_equal_to_a_bare_loop(model_type: str, changes: dict[str, Any], tokens: Tokens, tmp_path: Path) -> None:
    wanted = settings(**changes)
    model, other = small_model(model_type), small_model(model_type)
    log = run(model, tokens, tmp_path / "run", wanted)
    expected = list(bare(other, tokens, wanted))
    assert [(s.loss, s.gradient_norm, s.lr) for s in log.steps] == expected
    assert len(expected) == wanted.steps
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    norms = [norm for _, norm, _ in expected]
    assert wanted.grad_clip in (0.0, 1.0) or max(norms) > wanted.grad_clip
    assert [s.batch for s in log.steps] == list(range(wanted.steps))
    assert log.steps[-1].tokens == wanted.steps * wanted.batch_tokens


@pytest.mark.parametrize("micro", [1, 2, 3, 8])
def test_micro_batches_add_up(micro: int, tokens: Tokens, tmp_path: Path) -> None:
    """The mean over 8 sequences of 32 tokens, in another order: each of the sums errs by at most n eps."""
    wanted = settings(steps=1)
    whole = run(small_model(), tokens, tmp_path / "whole", wanted).steps[0]
    parts = run(small_model(), tokens, tmp_path / "parts", settings(steps=1, micro_batch=micro)).steps[0]
    assert parts.loss == pytest.approx(whole.loss, rel=wanted.batch_tokens * EPS)
    assert parts.gradient_norm == pytest.approx(whole.gradient_norm, rel=wanted.batch_tokens * EPS)


def test_activation_checkpointing_changes_no_bit(tokens: Tokens, tmp_path: Path) -> None:
    expected = losses(run(small_model(resid_pdrop=0.1), tokens, tmp_path / "a", settings()))
    found = run(small_model(resid_pdrop=0.1), tokens, tmp_path / "b", settings(activation_checkpointing=True))
    assert losses(found) == expected


def test_the_z_loss_is_trained_on_and_not_shown(tokens: Tokens, tmp_path: Path) -> None:
    plain = run(small_model(), tokens, tmp_path / "plain", settings())
    model = small_model()
    with_it = run(small_model(), tokens, tmp_path / "z", settings(z_loss=1.0))
    assert with_it.steps[0].loss == plain.steps[0].loss
    rows = torch.from_numpy(batch(tokens, seed=0, index=0, sequences=8, length=32))
    logits = model(rows[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()) + logits.logsumexp(-1).square().mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert with_it.steps[0].gradient_norm == pytest.approx(norm.item(), rel=256 * EPS)
    assert with_it.steps[0].gradient_norm != plain.steps[0].gradient_norm


def test_bf16_computes_in_bf16_and_keeps_float32_weights(tokens: Tokens, tmp_path: Path) -> None:
    model = small_model("llama")
    half = run(model, tokens, tmp_path / "half", settings(precision="bf16"))
    AcceleratorState._reset_state(reset_partial_state=True)
    full = run(small_model("llama"), tokens, tmp_path / "full", settings())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert half.steps[0].loss != full.steps[0].loss
    assert half.steps[0].loss == pytest.approx(full.steps[0].loss, rel=torch.finfo(torch.bfloat16).eps)


def test_weight_decay_is_the_recipes(tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """unit-embed asks for none on embeddings; norms and biases never have any."""
    model = small_model("llama", tie_word_embeddings=False)
    spikepatch.patch(model, "unit-embed", reinit="all")
    groups: list[Any] = []
    real = torch.optim.AdamW.__init__

    def spy(self: Any, params: Any, **options: Any) -> None:
        groups.extend(params)
        real(self, params, **options)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", spy)
    run(model, tokens, tmp_path / "run", settings(steps=1))
    decayed, others = groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert any(p is model.get_input_embeddings().weight for p in others["params"])
    assert any(p is model.lm_head.weight for p in decayed["params"])


def test_evaluation_is_the_mean_over_all_that_is_held_out(tokens: Tokens, tmp_path: Path) -> None:
    model = small_model()
    log = run(model, tokens, tmp_path / "run", settings())
    total, count = 0.0, 0
    with torch.no_grad():
        for rows in map(torch.from_numpy, held_out_batches(tokens, sequences=5, length=32)):
            logits = model.eval()(rows[:, :-1]).logits.double()
            total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
            count += rows[:, 1:].numel()
    assert count > 1000
    (found,) = log.evals
    assert found.step == 12
    assert found.loss == pytest.approx(total / count, rel=256 * EPS)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_load_balancing_loss_is_trained_on_where_the_config_asks_for_it(
    wanted: bool, tokens: Tokens, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"num_local_experts": 4, "output_router_logits": wanted, "router_aux_loss_coef": 0.5}
    model = small_model("mixtral", **sizes)
    log = run(model, tokens, tmp_path / "run", settings(steps=1, weight_decay=0.0), lr=0.0)
    rows = torch.from_numpy(batch(tokens, seed=0, index=0, sequences=8, length=32))
    output = model(rows[:, :-1], labels=rows[:, :-1], shift_labels=rows[:, 1:].contiguous())
    output.loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    entropy = F.cross_entropy(output.logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert log.steps[0].loss == pytest.approx(entropy, rel=256 * EPS)
    assert (output.loss.item() > entropy + 0.1) == wanted
    assert log.steps[0].gradient_norm == pytest.approx(norm.item(), rel=256 * EPS)


class Planted:
    """Does something to the logits of those batches whose first row is that of one of ``batches``."""

    def __init__(self, model: Any, tokens: Tokens, batches: Any, change: Any) -> None:
        rows = (batch(tokens, seed=0, index=i, sequences=8, length=32)[0, :-1] for i in itertools.islice(batches, 200))
        self.rows = {row.tobytes() for row in rows}
        self.change, self.seen = change, 0
        model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, model: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if model.training and kwargs["input_ids"][0].numpy().tobytes() in self.rows:
            self.seen += 1
            output.logits = self.change(output.logits)
        return output


class Ruin(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf


def loud(logits: torch.Tensor) -> torch.Tensor:
    return logits * 40.0


@pytest.mark.parametrize(
    ("change", "finite_loss"),
    [(lambda x: x * math.nan, False), (lambda x: x * math.inf, False), (Ruin.apply, True)],
    ids=["nan", "inf", "gradient"],
)
@pytest.mark.parametrize("on_spike", ["log", "skip"])
def test_what_is_not_finite_never_reaches_the_optimizer(
    change: Any, finite_loss: bool, on_spike: Any, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    planted = Planted(model, tokens, [3, 4], change)
    steps: list[bool] = []
    real = torch.optim.AdamW.step

    def spy(self: Any, closure: Any = None) -> Any:
        steps.append(all(bool(p.grad.isfinite().all()) for g in self.param_groups for p in g["params"]))
        return real(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    log = run(model, tokens, tmp_path / "run", settings(on_spike=on_spike))
    assert planted.seen == 2
    assert steps == [True] * 10
    assert [s.step for s in log.steps if not s.applied] == [4, 5]
    assert all("nonfinite" in s.flags for s in log.steps if s.step in (4, 5))
    assert (log.steps[3].loss is not None) == finite_loss
    assert log.steps[3].gradient_norm is None
    assert log.steps[4].tokens == log.steps[2].tokens
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert [(e.kind, e.onset) for e in log.events] == [("nonfinite", 4)]
    assert log.stop is None


def test_a_scaled_loss(tokens: Tokens, tmp_path: Path) -> None:
    """As in fp16: a power of two changes no bit; what overflows is dropped, lowers the scale, and is no spike."""
    expected = losses(run(small_model(), tokens, tmp_path / "plain", settings()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert losses(run(small_model(), tokens, tmp_path / "scaled", settings(), scaler=scaler)) == expected
    assert scaler.get_scale() == 1024.0

    model = small_model()
    Planted(model, tokens, [3], Ruin.apply)
    log = run(model, tokens, tmp_path / "run", settings(checkpoint_every=6, on_spike="rewind"), scaler=scaler)
    assert [s.step for s in log.steps if not s.applied] == [4]
    assert "overflow" in log.steps[3].flags
    assert log.events == ()
    assert log.rewinds == ()
    assert scaler.get_scale() == 512.0
    state = json.loads((tmp_path / "run/checkpoints/step-00000012/state.json").read_text())
    assert state["scaler"]["scale"] == 512.0

    again = torch.amp.GradScaler("cpu", init_scale=4.0)
    run(small_model(), tokens, tmp_path / "run", settings(checkpoint_every=6, on_spike="rewind"), scaler=again)
    assert again.get_scale() == 512.0


def test_a_run_ends_where_nothing_changes_any_more(tokens: Tokens, tmp_path: Path) -> None:
    model = small_model()
    Planted(model, tokens, range(5, 200), lambda x: x * math.nan)
    log = run(model, tokens, tmp_path / "run", settings(steps=150))
    assert log.stop is not None
    assert log.stop.step == 5 + loop.MAX_IDLE
    assert "did not change the weights" in log.stop.why
    assert not log.evals
    assert [e.back for e in log.events] == [None]


def spiked(
    tokens: Tokens,
    folder: Path,
    on_spike: Any,
    batches: Any = (45,),
    seen: Any = None,
    resid_pdrop: float = 0.0,
    **more: Any,
) -> tuple[RunLog, Planted]:
    model = small_model(resid_pdrop=resid_pdrop)
    planted = Planted(model, tokens, batches, loud)
    return run(model, tokens, folder, settings(steps=60, on_spike=on_spike, warmup=0.0, **more), seen=seen), planted


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tokens: Tokens, tmp_path: Path) -> None:
    """The spike at step 46 is seen by a detector that was saved at step 40, whose baseline is of the steps before."""

    class Interruption(Exception):
        pass

    def interrupt(record: Any) -> None:
        if record["type"] == "step" and record["step"] == 44:
            raise Interruption

    wanted = {"checkpoint_every": 20, "resid_pdrop": 0.1}
    expected, _ = spiked(tokens, tmp_path / "whole", "log", **wanted)
    with pytest.raises(Interruption):
        spiked(tokens, tmp_path / "run", "log", seen=interrupt, **wanted)
    found, _ = spiked(tokens, tmp_path / "run", "log", **wanted)
    assert ("loss", 46) in {(e.kind, e.onset) for e in found.events}
    assert found.events == expected.events
    assert [dataclasses.replace(s, seconds=0) for s in found.steps] == [
        dataclasses.replace(s, seconds=0) for s in expected.steps
    ]


def test_on_spike_log(tokens: Tokens, tmp_path: Path) -> None:
    log, planted = spiked(tokens, tmp_path / "run", "log")
    assert planted.seen == 1
    assert all(step.applied for step in log.steps)
    assert ("loss", 46) in {(e.kind, e.onset) for e in log.events}


def test_on_spike_skip(tokens: Tokens, tmp_path: Path) -> None:
    log, planted = spiked(tokens, tmp_path / "run", "skip")
    assert planted.seen == 1
    assert [s.step for s in log.steps if not s.applied] == [46]
    assert [s.step for s in log.steps] == list(range(1, 61))
    assert "loss" in log.steps[45].flags
    assert log.stop is None


def test_on_spike_stop(tokens: Tokens, tmp_path: Path) -> None:
    log, _ = spiked(tokens, tmp_path / "run", "stop")
    assert log.stop is not None
    assert log.stop.step == 46
    assert "loss" in log.stop.why
    assert len(log.steps) == 46
    assert not log.steps[-1].applied


def test_on_spike_rewind(tokens: Tokens, tmp_path: Path) -> None:
    """Back to step 40; the batches of steps 41 to 46 are left out; from there on as if they had never been there."""
    log, planted = spiked(tokens, tmp_path / "run", "rewind", checkpoint_every=20)
    assert planted.seen == 1
    (rewind,) = log.rewinds
    assert (rewind.step, rewind.to, rewind.skipped) == (46, 40, (40, 45))
    assert [s.step for s in log.kept] == list(range(1, 61))
    assert [s.batch for s in log.kept] == [*range(40), *range(46, 66)]
    assert all(s.applied for s in log.kept)
    assert log.steps[45].batch == 45
    assert not log.steps[45].applied
    assert [p.name for p in checkpoints.committed(tmp_path / "run/checkpoints")] == ["step-00000040", "step-00000060"]
    calm, _ = spiked(tokens, tmp_path / "calm", "rewind", batches=(), checkpoint_every=20)
    assert losses(calm)[:40] == [s.loss for s in log.kept][:40]
    assert calm.rewinds == ()


def test_a_rewind_without_a_checkpoint_goes_back_to_the_start(tokens: Tokens, tmp_path: Path) -> None:
    log, _ = spiked(tokens, tmp_path / "run", "rewind", checkpoint_every=0)
    (rewind,) = log.rewinds
    assert (rewind.step, rewind.to, rewind.skipped) == (46, 0, (0, 45))
    assert [s.batch for s in log.kept] == list(range(46, 106))
    again = run(small_model(), tokens, tmp_path / "again", settings(steps=60, warmup=0.0))
    assert log.steps[0].loss == again.steps[0].loss


def test_rewinds_have_an_end(tokens: Tokens, tmp_path: Path) -> None:
    log, _ = spiked(tokens, tmp_path / "run", "rewind", batches=range(45, 200), checkpoint_every=20)
    assert len(log.rewinds) == loop.MAX_REWINDS
    assert log.stop is not None
    assert "10 rewinds" in log.stop.why
    skipped = [range(r.skipped[0], r.skipped[1] + 1) for r in log.rewinds]
    assert list(itertools.chain(*skipped)) == list(range(40, 55))


def test_what_is_watched_is_in_the_log(tokens: Tokens, tmp_path: Path) -> None:
    model = small_model()
    points = points_of(model)
    seen: list[Any] = []
    log = run(model, tokens, tmp_path / "run", settings(watch_every=5, micro_batch=4), points=points, seen=seen.append)
    assert [record["type"] for record in seen[:4]] == ["run", "step", "layers", "step"]
    assert seen[1]["loss"] == log.steps[0].loss
    assert [layers.step for layers in log.layers] == [1, 6, 11]
    assert all(len(layers.stream) == 4 and len(layers.gradients) == 2 for layers in log.layers)
    assert losses(log) == losses(run(small_model(), tokens, tmp_path / "b", settings(micro_batch=4)))
