"""The audit on bugs that reached users, on healthy designs, and on one group broken at a time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

import spikepatch
from spikepatch.auditing.fault import LEVELS
from spikepatch.recipes.built_in import RECIPES
from tests.auditing import bug_models, init_bugs, more_bugs, outside_bugs, outside_designs
from tests.auditing.diagnosis import Case, Control, judge
from tests.auditing.healthy_designs import CONTROLS, by_recipe
from tests.auditing.mutations import build, outcomes
from tests.residual.configs import CLASSES, Mapping
from tests.residual.generator import Model, example
from tests.residual.test_generated import draw

MORE = (*more_bugs.CASES, *outside_bugs.CASES)
CASES = [*init_bugs.CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)]
DESIGNS = [*CONTROLS, *(pytest.param(each, marks=pytest.mark.slow) for each in outside_designs.CONTROLS)]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in (*init_bugs.CASES, *MORE)])
def test_a_bug_is_named(case: Case) -> None:
    model, extra = case.build()
    found = spikepatch.audit(model, **extra).findings
    right, why = judge(case, [(f.severity, f.parameters, f.what) for f in found])
    assert right, why
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert {name for f in found for name in f.parameters} <= names
    assert all(f.expected and f.measured and f.remedy and f.severity in LEVELS for f in found)


def test_there_are_many_bugs() -> None:
    assert len({case.name for case in (*init_bugs.CASES, *MORE)}) >= 90


@pytest.mark.parametrize("control", DESIGNS, ids=[each.name for each in (*CONTROLS, *outside_designs.CONTROLS)])
def test_a_healthy_design_is_left_alone(control: Control) -> None:
    model, extra = control.build()
    assert spikepatch.audit(model, **extra).at_least("at-risk") == ()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_left_alone(recipe: str) -> None:
    torch.manual_seed(0)
    for kind in (bug_models.gpt2, bug_models.llama, bug_models.mixtral):
        model = by_recipe(kind, recipe)
        audit = spikepatch.audit(model)
        assert audit.at_least("at-risk") == ()
        assert not audit.learned


@pytest.mark.parametrize(("width", "layers"), [(32, 6), (64, 12)])
def test_a_depth_scaled_std_that_is_a_variance_by_chance(width: int, layers: int) -> None:
    """sqrt(2/(5d)) / sqrt(S) is 1/d where S = 2d/5."""
    sizes: dict[str, Any] = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 64, "vocab_size": 256}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    spikepatch.patch(model, "scaled-embed", reinit="all", seed=0)
    assert spikepatch.audit(model).findings == ()


@pytest.mark.slow
def test_weights_of_a_patched_model_are_learned_after_some_steps() -> None:
    """Large weights change slowly, relative to their size: the gains tell with them."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=24, vocab_size=256, tie_word_embeddings=True)
    )  # fmt: skip
    spikepatch.patch(model, "scaled-embed", reinit="all", seed=0)
    assert not spikepatch.audit(model).learned
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    bytes_ = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    for _ in range(100):
        rows = bytes_.unfold(0, 65, 1)[torch.randint(len(bytes_) - 65, (4,))]
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert spikepatch.audit(model).learned
    assert spikepatch.check(model, tokens=32).verdict == "learned"


#: Of different structure; ``python -m tests.auditing.mutations`` runs all.
MUTATED: tuple[tuple[Mapping, str], ...] = (
    ("causal", "llama"), ("causal", "gpt2"), ("causal", "mixtral"), ("causal", "gemma2"), ("seq2seq", "t5"),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("mapping", "model_type"), MUTATED)
def test_a_broken_group_is_named_and_no_other(mapping: Mapping, model_type: str) -> None:
    found = list(outcomes(mapping, model_type, count=8))
    assert len(found) == 8
    assert [each for each in found if not each.named or each.outside] == []


#: Every tenth type; ``docs/audit.md`` has what is said of all.
TASKS: tuple[Mapping, ...] = ("causal", "seq2seq", "masked")
FRESH = [(mapping, name) for mapping in TASKS for name in sorted(CLASSES[mapping])][::10]


@pytest.mark.slow
def test_fresh_types_are_left_alone() -> None:
    loud, quiet = [], 0
    for mapping, model_type in FRESH:
        found = spikepatch.audit(build(mapping, model_type)).at_least("at-risk")
        loud += [(model_type, f.name) for f in found][:1]
        quiet += not found
    assert quiet >= 9 * len(loud)


@pytest.mark.parametrize(("std", "named"), [(0.02, False), (0.4, True)])
def test_logits_without_a_closed_form_are_run(std: float, named: bool) -> None:
    """An MLP with a cap behind the final norm: the size that is said is that of the model's own logits."""
    torch.manual_seed(0)
    model: Any = bug_models.plain()
    model.head = nn.Sequential(nn.Linear(128, 64, bias=False), nn.SiLU(), nn.Linear(64, bug_models.V, bias=False))
    for p in model.head.parameters():
        nn.init.normal_(p, 0, std)
    ids = torch.arange(64).view(1, 64) * 7 % bug_models.V
    found = [f for f in spikepatch.audit(model, {"input_ids": ids}).findings if f.name == "head"]
    assert bool(found) == named
    if named:
        with torch.no_grad():
            size = float(model(ids).std(-1, correction=0).mean())
        assert f"logits with a std of {size:.3g}:" in found[0].what


def test_weights_are_not_changed() -> None:
    model = bug_models.llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spikepatch.audit(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_cannot_be_mapped_is_still_read() -> None:
    """NaN and copies need no map; of stds nothing is said, and why is."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.second(self.first(x))
            return result

    model = Odd()
    with torch.no_grad():
        model.second.weight[3, 4] = torch.nan
    audit = spikepatch.audit(model, {"x": torch.zeros(2, 64)})
    assert [(f.name, f.parameters) for f in audit.findings] == [("non-finite", ("second.weight",))]
    assert audit.not_said


def test_architectures_drawn_at_random_are_left_alone() -> None:
    """As torch initialises them; whatever stands on their streams, no rule fails.

    ``nn.Embedding``'s N(0, 1) times sqrt(d) is what ``embedding`` is about, tied to the head what ``head`` is, experts
    at N(0, 1) what ``size`` is, and a router at ``nn.Linear``'s default among such experts what ``torch-default`` is.
    """
    rng, loud, checked = random.Random(0), [], 0
    for _ in range(12):
        model = Model(draw(rng)).eval()
        found = spikepatch.audit(model, example())
        checked += bool(found.scheme)
        loud += [f for f in found.at_least("at-risk") if f.name not in {"embedding", "head", "size", "torch-default"}]
    assert loud == []
    assert checked >= 3
