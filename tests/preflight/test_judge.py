"""Each finding, on a model that calls for it and on one that does not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

import spikepatch
from spikepatch import StabilityReport
from spikepatch.preflight.judge import PROMISE, Thresholds, at_or_above, judged
from spikepatch.preflight.result import TrialStep
from tests.architectures import tiny_model
from tests.preflight.initialisations import gpt2


def check(model: torch.nn.Module, **options: Any) -> StabilityReport:
    return spikepatch.check(model, tokens=24, batch=1, **options)


def small_gpt2(layers: int = 6) -> GPT2LMHeadModel:
    return gpt2(layers, 64, 4, vocabulary=500, positions=64)


def names(report: StabilityReport) -> set[str]:
    return {finding.name for finding in report.findings}


def audited(report: StabilityReport) -> set[str]:
    assert report.audit is not None
    return {fault.name for fault in report.audit.findings}


def test_missing_depth_scaling_is_told() -> None:
    model = small_gpt2()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(parameter.numel()))
        report = check(model)
        for block in model.transformer.h:
            block.attn.c_proj.weight /= math.sqrt(12)
            block.mlp.c_proj.weight /= math.sqrt(12)
    assert "depth-scaling" not in audited(check(model))
    assert report.audit is not None
    finding = next(f for f in report.audit.findings if f.name == "depth-scaling")
    assert "no depth scaling" in finding.what
    assert "1/sqrt(S) = 0.289" in finding.expected
    assert finding.severity == "note"


def test_the_size_of_the_stream() -> None:
    report = check(small_gpt2(), recipes=["scaled-embed"])
    assert "stream" in names(report)
    assert "stream" not in names(report.models[0])
    model = small_gpt2()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(500)
    large = next(f for f in check(model).findings if f.name == "stream")
    assert "far above 1" in large.what


def test_the_stream_is_relative_to_what_the_branch_adds() -> None:
    """A norm on the branch makes it add 1; a factor 0.22 on the branch wants a stream that is as much smaller."""
    olmo2 = tiny_model("olmo2")
    assert any("norm on the branch" in f.what for f in check(olmo2).findings if f.name == "stream")
    granite = tiny_model("granite", embedding_multiplier=12.0, residual_multiplier=0.22)
    assert check(granite).sigma_start == pytest.approx(0.24, rel=0.1)
    assert "stream" not in names(check(granite))


def test_a_nan_is_unstable() -> None:
    model = small_gpt2(2)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 3] = math.nan
    report = check(model)
    assert report.verdict == "unstable"
    assert "non-finite" in names(report)
    assert '"initial_loss": null' in report.to_json()


def test_a_tied_head_and_a_large_shortcut() -> None:
    model = gpt2(2, 256, 4, vocabulary=200, positions=64)
    report = spikepatch.check(model, recipes=["scaled-embed"], tokens=64)
    assert "initial-loss" not in names(report)
    finding = next(f for f in report.models[0].findings if f.name == "initial-loss")
    assert "tied" in finding.what
    assert finding.remedy == 'spikepatch.check(model, recipes=["scaled-embed"], untie=True)'
    assert finding.severity == "note"
    untied = spikepatch.check(model, recipes=["scaled-embed"], untie=True, tokens=64).models[0]
    assert "initial-loss" not in names(untied)


def test_weights_that_are_no_gaussians() -> None:
    model = small_gpt2(2)
    with torch.no_grad():
        for block in model.transformer.h:
            for matrix in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                rows = torch.linspace(-2, 2, matrix.weight.shape[0]).exp()
                matrix.weight.mul_(rows[torch.randperm(len(rows))].unsqueeze(1))
    report = check(model, deep=True)
    assert "learned" in names(report)
    assert report.verdict == "learned"
    assert "learned" in report.weights
    assert report.eq15_excess_layer1 is None
    mlp = report.layers[0].sublayers[1]
    assert mlp.bound is None
    assert "no Gaussian" in mlp.not_covered or "not that of a Gaussian" in mlp.not_covered
    assert mlp.bound_norms is not None
    assert mlp.jacobian is not None
    assert mlp.bound_norms >= mlp.jacobian


@pytest.fixture(scope="module")
def report() -> StabilityReport:
    return check(small_gpt2(2), recipes=["embed-ln"]).models[0]


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.0, "stable"), (4.9, "stable"), (5.0, "at-risk"), (49.0, "at-risk"), (50.0, "unstable")]
)
def test_the_gradient_ratio(report: StabilityReport, ratio: float, verdict: str) -> None:
    residual = spikepatch.inspect(small_gpt2(2))
    changed = dataclasses.replace(report, gradient_ratio=ratio)
    assert judged(changed, residual, Thresholds(), finite=True).verdict == verdict


@pytest.mark.parametrize("model_type", ["olmo2", "gemma2"])
def test_a_stream_that_norms_on_the_branches_make_grow(model_type: str) -> None:
    """sigma^2 grows by the square of each norm's gain, and the gradient falls as sigma grows, by no weight's fault."""
    model = tiny_model(model_type, num_hidden_layers=6)
    with torch.no_grad():  # far from the norms' eps
        for name, p in model.named_parameters():
            if "layers" in name and p.ndim == 2:
                p.mul_(10)
    report = check(model)
    assert report.sigma_start is not None
    assert report.sigma_end is not None
    assert report.sigma_end**2 - report.sigma_start**2 == pytest.approx(report.sublayers, rel=0.2)
    assert (report.gradient_ratio or 0) > Thresholds().ratio_at_risk
    assert 0.2 < (report.relative_gradient_ratio or 0) < 5
    (finding,) = (f for f in report.findings if f.name == "gradient-ratio")
    assert (finding.severity, finding.limit, finding.remedy) == ("note", None, "")
    assert "norms on the branches" in finding.what


def test_a_gradient_that_outgrows_such_a_stream(report: StabilityReport) -> None:
    residual = spikepatch.inspect(tiny_model("olmo2"))
    for relative, verdict in ((4.9, "stable"), (5.0, "at-risk"), (50.0, "unstable")):
        changed = dataclasses.replace(report, gradient_ratio=500.0, relative_gradient_ratio=relative)
        assert judged(changed, residual, Thresholds(), finite=True).verdict == verdict


@pytest.mark.parametrize(("layers", "limit"), [(24, 1.0), (12, math.sqrt(2)), (96, 0.5)])
def test_the_excess_is_judged_by_depth(report: StabilityReport, layers: int, limit: float) -> None:
    residual = spikepatch.inspect(small_gpt2(2))
    for factor, found in ((0.99, False), (1.01, True)):
        changed = dataclasses.replace(report, sublayers=2 * layers, eq15_excess_layer1=factor * limit)
        assert ("eq15" in names(judged(changed, residual, Thresholds(), finite=True))) == found


@pytest.mark.parametrize(
    ("losses", "verdict"), [((5.0, 4.0), "stable"), ((5.0, 5.1), "unstable"), ((5.0, math.nan), "unstable")]
)
def test_the_loss_after_steps(report: StabilityReport, losses: tuple[float, float], verdict: str) -> None:
    steps = tuple(TrialStep(i, loss, 1.0, 1.0, 1.0, None) for i, loss in enumerate(losses))
    residual = spikepatch.inspect(small_gpt2(2))
    changed = dataclasses.replace(report, steps=steps)
    assert judged(changed, residual, Thresholds(), finite=True).verdict == verdict


def test_limits_of_fresh_weights_do_not_judge_learned_ones(report: StabilityReport) -> None:
    residual = spikepatch.inspect(small_gpt2(2))
    changed = dataclasses.replace(report, gradient_ratio=373.0, eq15_excess_layer1=100.0, initial_loss=50.0)
    assert judged(changed, residual, Thresholds(), finite=True).verdict == "unstable"
    learned = judged(changed, residual, Thresholds(), finite=True, learned=True)
    assert (learned.verdict, names(learned)) == ("learned", {"learned"})
    assert "convert" not in learned.findings[0].remedy
    assert "373" in learned.findings[0].what
    assert judged(changed, residual, Thresholds(), finite=False, learned=True).verdict == "unstable"


def test_a_small_shortcut_alone_is_a_note(report: StabilityReport) -> None:
    residual = spikepatch.inspect(small_gpt2(2))
    changed = dataclasses.replace(report, sigma_start=0.02, gradient_ratio=1.36, eq15_excess_layer1=None)
    found = judged(changed, residual, Thresholds(), finite=True)
    assert (found.verdict, names(found)) == ("stable", {"stream"})


def test_a_bug_in_the_weights_is_the_verdict() -> None:
    """A tied table at N(0, 1) makes a large shortcut and no gradient grows; the loss is many times log V."""
    model = small_gpt2(2)
    with torch.no_grad():
        model.transformer.wte.weight.normal_(0, 1)
        model.transformer.wpe.weight.normal_(0, 1)
    report = check(model)
    assert report.verdict == "at-risk"
    assert "head" in audited(report)
    assert report.models == ()


def test_thresholds_are_settable() -> None:
    model = small_gpt2()
    assert check(model).verdict == "at-risk"
    lenient = {"stream_low": 1e-3, "excess": 1e3, "ratio_at_risk": 1e3, "ratio_unstable": 1e4}
    assert check(model, thresholds=lenient).verdict == "stable"
    assert check(model, thresholds={**lenient, "ratio_unstable": 0.5, "ratio_at_risk": 0.1}).verdict == "unstable"
    with pytest.raises(spikepatch.Refused, match="no threshold nothing"):
        check(model, thresholds={"nothing": 1.0})


def test_what_counts_as_a_failure(report: StabilityReport) -> None:
    for verdict, expected in {
        "stable": (0, 0),
        "learned": (0, 0),
        "at-risk": (1, 0),
        "unstable": (1, 1),
        "unknown": (1, 1),
    }.items():
        changed = dataclasses.replace(report, verdict=verdict)  # type: ignore[arg-type]
        assert (at_or_above(changed, "at-risk"), at_or_above(changed, "unstable")) == expected


def test_nothing_is_promised() -> None:
    assert "Not predicted: spikes" in PROMISE.replace("\n", " ")
