"""What the long examples do before and after they train; that they run is tried by CI itself."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from examples.spikes_on_a_cpu import ARMS, SEEDS, SHARES, digits, jobs
from examples.study.picture import draw
from examples.study.side_by_side import BETAS, EPS, WEIGHT_DECAY, SideBySide
from examples.study.study import (
    COLUMNS,
    RECIPES,
    RESULTS,
    TURNS,
    UNITS,
    Curve,
    Row,
    Unit,
    batches,
    built,
    inputs,
    judged,
    read,
    windows,
    write,
)
from examples.study.study import (
    SEEDS as STUDIED,
)
from examples.study.tables import correlations, interval, outcomes, spearman, text, with_turns
from examples.study.turn import MEASURED, growth, turns

import spikepatch
from tests import ROOT

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.mark.parametrize("seeds", [SEEDS, SEEDS[:4], SEEDS[:1]])
@pytest.mark.parametrize("arms", [ARMS, ARMS[:1], (*ARMS, "vanilla", "xavier")])
def test_jobs_are_two_halves(arms: tuple[str, ...], seeds: tuple[int, ...]) -> None:
    found = jobs(arms, seeds)
    runs = Counter((arm, seed) for job in found for arm in job.arms for seed in job.seeds)
    assert runs == Counter((arm, seed) for arm in arms for seed in seeds)
    halves = [sum(len(job.arms) * len(job.seeds) for job in found[i::2]) for i in range(2)]
    assert abs(halves[0] - halves[1]) <= 1


def test_digits_have_the_entropy_that_is_said() -> None:
    assert sum(SHARES) == 1000
    assert -sum(n / 1000 * math.log(n / 1000) for n in SHARES) == pytest.approx(2.37, abs=0.005)
    found = digits(100_000, 0)
    assert found[:20] == digits(20, 0) != digits(20, 1)
    for digit, share in zip("0123456789abcdef", SHARES, strict=True):
        assert abs(found.count(digit) - 100 * share) < 5 * math.sqrt(100 * share)


def row(cell: tuple[str, ...], **values: str) -> Row:
    return dict.fromkeys(COLUMNS, "0") | dict(zip(COLUMNS, cell, strict=False)) | {"verdict": "healthy"} | values


def test_the_study_is_what_it_says(tmp_path: Path) -> None:
    cells = [cell for unit in UNITS for cell in unit.cells]
    assert len(cells) == len(set(cells)) == 240 + 24
    assert read(tmp_path / "none.csv") == []
    rows = [row(cell) for cell in cells[:7]]
    write(rows, tmp_path / "x.csv")
    assert read(tmp_path / "x.csv") == rows


@pytest.mark.parametrize("clip", [None, 1.0])
def test_side_by_side_is_one_by_one(tmp_path: Path, clip: float | None) -> None:
    """Against AdamW and clip_grad_norm_ of torch, on one model after the other."""
    inputs(tmp_path)
    rows, seeds, rates = windows(tmp_path / "text.txt"), (1, 2), (3e-3, 1e-2)
    assert torch.equal(rows[:-1, -1], rows[1:, 0])
    models = [built(tmp_path, "gpt2", "embed-ln", seed) for seed in seeds]
    group = SideBySide(models, rates, clip)
    found = list(group.train(batches(rows, seeds, 6), 4))
    for i, (model, seed, lr) in enumerate(zip(models, seeds, rates, strict=True)):
        optimizer = torch.optim.AdamW(spikepatch.param_groups(model, WEIGHT_DECAY), lr=lr, betas=BETAS, eps=EPS)
        for step, (own,) in enumerate(batches(rows, (seed,), 6), 1):
            for settings in optimizer.param_groups:
                settings["lr"] = lr * min(1, step / 4)
            logits = model(input_ids=own[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), own[:, 1:].flatten())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
            optimizer.step()
            assert found[step - 1].losses[i].item() == pytest.approx(loss.item(), rel=1e-4)
            assert found[step - 1].norms[i].item() == pytest.approx(norm.item(), rel=1e-3)
    assert found[5].losses[0] < found[0].losses[0] - 0.1


def test_what_all_have_is_the_datas() -> None:
    rng = np.random.default_rng(0)
    noise, spike = rng.normal(0, 0.1, 400), np.where(np.arange(400) == 300, 5.0, 0.0)
    mine, others = np.where(np.arange(400) == 200, 4.0, 0.0), [rng.normal(0, 0.01, 400) for _ in range(4)]
    curves = [Curve(2 + noise + spike + own, np.ones(400), 2.0) for own in (mine, *others)]
    assert judged(curves[0], [])["loss_events"] == 2
    assert judged(curves[0], curves[1:])["loss_events"] == 1
    assert judged(curves[1], curves[:1] + curves[2:])["loss_events"] == 0
    assert judged(curves[1], curves[2:])["largest_excess"] == pytest.approx(5, abs=0.5)


def test_the_results_are_the_studys() -> None:
    rows = with_turns(read(RESULTS), read(TURNS))
    wanted = {cell for unit in UNITS for cell in unit.cells}
    found = [tuple(r[key] for key in COLUMNS[:5]) for r in rows]
    assert len(set(found)) == len(found)
    assert set(found) <= wanted == {tuple(r[key] for key in COLUMNS[:5]) for r in read(TURNS)}
    assert text(rows) in (ROOT / "docs" / "study.md").read_text(encoding="utf-8")


def test_tables(tmp_path: Path) -> None:
    def value(cell: tuple[str, ...]) -> dict[str, str]:
        i = RECIPES.index(cell[2])
        return {
            "loss_events": str(3 * (i == 0)), "largest_excess": str(5 - i), "gradient_ratio": str(9 - i),
            "eq15_excess_layer1": "", "sigma_start": "0.5", "largest_gradient_ratio": "7" if i == 0 else "",
        }  # fmt: skip

    rows = [row(cell, **value(cell)) for name in ("gpt2", "llama") for cell in Unit("plateau", name).cells]
    lines = list(outcomes(rows))
    assert lines[0].startswith("| regime | model | recipe | lr 0.001 | lr 0.003 | lr 0.01 | events |")
    assert (
        lines[2] == "| plateau | gpt2 | vanilla-2304 | 4 of 4 | 4 of 4 | 4 of 4 | 36 | 5.00 / 5.00 | 7 / 7 | 0.000 |  |"
    )
    assert (
        lines[3]
        == "| plateau | gpt2 | vanilla | 0 of 4 | 0 of 4 | 0 of 4 | 0 | 4.00 / 4.00 | 1 / 1 | 0.000 | 7.4e-07 |"
    )
    assert len(lines) == 2 + 2 * len(RECIPES)
    few = list(outcomes([r for r in rows if r["recipe"] != "xavier" or r["lr"] == "0.003"]))
    assert few[4] == "| plateau | gpt2 | xavier |  | 0 of 4 |  | 0 | 3.00 / 3.00 | 1 / 1 | 0.000 | 0.00055 |"
    draw(rows, tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert all(drawn.count(f">{name}<") == 1 for name in (*RECIPES, "gpt2, plateau", "llama, plateau"))
    turned = with_turns(
        rows, [r | dict.fromkeys(MEASURED, str(RECIPES.index(r["recipe"]) / 9)) for r in rows if r["seed"] != "301"]
    )
    assert sum("turn" in r for r in turned) == 2 * 3 * 15
    head, _, flat, none, ratio, _, turn, _ = correlations(turned)
    assert head.startswith("| known before training | gpt2, 15 cells | gpt2, plateau | others, 15 cells |")
    assert flat.startswith("| 1 / std of the stream |  |  |")
    assert none.startswith("| Eq. 15 excess |  |  |  |")
    assert ratio.startswith("| gradient ratio | 0.71 | 0.71 | 0.71 |")
    assert turn.startswith("| turn (the less, the more) | 0.71 | 0.71 | 0.71 |")
    assert list(correlations(rows[: len(rows) // 2])) == []  # nothing but what it is chosen on
    assert list(correlations([r for r in rows if r["seed"] == str(STUDIED[0])])) == []  # one seed


def test_the_interval_is_around_the_correlation() -> None:
    pairs = [(i, i + (5 if i % 3 else 0)) for i in range(30)]
    low, high = interval(pairs)
    assert 0.8 < low < spearman(*zip(*pairs, strict=True)) < high <= 1
    assert interval([(1.0, 2.0)] * 5) != interval(pairs)


def test_a_turn() -> None:
    """Against the stream as hooks see it, and by an optimiser of torch's own; the model is as before."""
    config = transformers.AutoConfig.for_model("gpt2", n_embd=8, n_layer=3, n_head=1, vocab_size=20, **NO_DROPOUT)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    before = [p.detach().clone() for p in model.parameters()]
    ids = torch.randint(20, (2, 6))
    still, turned = turns(model, ids, (0.0, 0.05))
    still_at_random, turned_at_random = turns(model, ids, (0.0, 0.05), seed=1)
    assert still == pytest.approx(1) == still_at_random
    assert turned_at_random not in (still, turned)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))

    seen: list[torch.Tensor] = []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    step = torch.optim.SGD(model.parameters(), lr=0.05)
    for p in model.parameters():
        p.grad = torch.sign(p.grad)
    step.step()
    model(ids)
    means = [torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in zip(seen[:3], seen[3:], strict=True)]
    assert turned == pytest.approx(min(means), rel=1e-4)
    assert turned < 0.9


def test_growth() -> None:
    """Each block doubles what changes and leaves what does not, which is most of the stream."""

    class Blocks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(20, 8, dtype=torch.float64)

        def get_input_embeddings(self) -> torch.nn.Embedding:
            return self.table

        def forward(self, inputs_embeds: torch.Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(hidden_states=[1e6 + inputs_embeds * 2**i for i in range(7)])

    assert growth(Blocks(), torch.arange(12).view(2, 6), 0) == pytest.approx(2**5, rel=1e-3)


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, math.inf]) == pytest.approx(1)
    assert spearman([1, 1, 2], [3, 3, 0]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert math.isnan(spearman([1, 1], [1, 2]))
