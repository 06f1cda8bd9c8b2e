"""What the long examples do before and after they train; that they run is tried by CI itself."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from examples.spikes_on_a_cpu import ARMS, SEEDS, SHARES, digits, jobs
from examples.study.study import COLUMNS, RATES, RECIPES, RESULTS, TURNS, Row, Unit, read, undone, units, write
from examples.study.tables import correlations, interval, outcomes, spearman, text, with_turns
from examples.study.turn import turns

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


def row(unit: Unit, recipe: str, **values: str) -> Row:
    key = {"regime": unit.regime, "architecture": unit.architecture, "seed": str(unit.seed), "lr": f"{unit.lr:g}"}
    return dict.fromkeys(COLUMNS, "0") | key | {"recipe": recipe, "verdict": "healthy"} | values


def test_the_study_goes_on_where_it_was(tmp_path: Path) -> None:
    every = list(units())
    assert sum(len(unit.recipes) for unit in every) == 240 + 24
    assert len(set(every)) == len(every)
    assert read(tmp_path / "none.csv") == []
    rows = [row(unit, recipe) for unit in every[:2] for recipe in unit.recipes][:-1]
    write(rows, tmp_path / "x.csv")
    assert read(tmp_path / "x.csv") == rows
    assert undone(rows, every) == every[1:]
    assert undone([], every) == every


def test_the_results_are_the_studys() -> None:
    rows = with_turns(read(RESULTS), read(TURNS))
    wanted = {(u.regime, u.architecture, r, f"{u.lr:g}", str(u.seed)) for u in units() for r in u.recipes}
    found = [tuple(r[key] for key in COLUMNS[:5]) for r in rows]
    assert len(set(found)) == len(found)
    assert set(found) <= wanted
    assert text(rows) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_tables() -> None:
    rows = [
        row(Unit("plateau", "gpt2", seed, lr), recipe, loss_events=str(3 * (recipe == RECIPES[0])),
            largest_excess=str(5 - i), gradient_ratio=str(9 - i), eq15_excess_layer1="", sigma_start="0.5")
        for seed in range(4) for lr in RATES for i, recipe in enumerate(RECIPES)
    ]  # fmt: skip
    lines = list(outcomes(rows))
    assert lines[2] == "| plateau | gpt2 | 0.003 | vanilla-2304 | 4 of 4 | 12 | 5.00 / 5.00 | 0 |  |"
    assert lines[3] == "| plateau | gpt2 | 0.003 | vanilla | 0 of 4 | 0 | 4.00 / 4.00 | 0 | 0.029 |"
    assert len(lines) == 2 + len(RECIPES) * len(RATES)
    turned = with_turns(rows, [r | {"turn": str(RECIPES.index(r["recipe"]) / 9)} for r in rows[: 3 * 15]])
    assert sum("turn" in r for r in turned) == 3 * 15
    flat, ratio, turn = list(correlations(turned))[2:]
    assert flat.startswith("| 1 / std of the stream | 15 | nan |")
    assert ratio.startswith("| gradient ratio | 15 | 0.71 |")
    assert turn.startswith("| turn (the less, the more) | 15 | 0.71 |")
    assert list(correlations(rows[: 9 * 4]))[2:] != []
    assert list(correlations(rows[:15]))[2:] == []  # one seed


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
    assert still == pytest.approx(1)
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


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, math.inf]) == pytest.approx(1)
    assert spearman([1, 1, 2], [3, 3, 0]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert math.isnan(spearman([1, 1], [1, 2]))
