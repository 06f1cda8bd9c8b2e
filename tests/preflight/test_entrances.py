"""Where images enter among the tokens, ``check`` has a size for each kind of position; the truth is from hooks."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import spikepatch
from spikepatch.preflight.judge import Thresholds
from spikepatch.preflight.present import summary_table
from spikepatch.preflight.result import StabilityReport
from spikepatch.residual.trace import full_example
from tests.residual.test_features import llava


def seen(model: PreTrainedModel) -> tuple[float, float]:
    """RMS of the first layer's input at the image's positions, and at the others."""
    example = full_example(model)
    inputs: list[torch.Tensor] = []
    layer = model.get_submodule("model.language_model.layers.0")
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    pixels = torch.randn(example["pixel_values"].shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model(**{**example, "pixel_values": pixels})
    handle.remove()
    image = example["input_ids"] == 99
    sizes = inputs[0].square().mean(-1).sqrt()
    assert bool(image.any())
    assert bool((~image).any())
    return float(sizes[image].mean()), float(sizes[~image].mean())


def only(report: StabilityReport) -> tuple[float | None, float | None]:
    (entrance,) = report.entrances
    assert entrance.inputs == ("pixel_values",)
    return entrance.sigma, entrance.others


def test_a_small_shortcut_of_images_alone_is_no_stable_start() -> None:
    model = llava()
    torch.nn.init.normal_(model.get_input_embeddings().weight, generator=torch.Generator().manual_seed(0))
    report = spikepatch.check(model)
    assert only(report) == pytest.approx(seen(model), rel=0.2)
    assert report.verdict == "at-risk"
    (finding,) = [each for each in report.findings if each.severity == "at-risk"]
    assert finding.name == "entrance"
    assert "features of pixel_values" in finding.what
    rows = {row[0]: row[1] for row in summary_table(report, Thresholds(), details=False).rows}
    assert "others" in rows["of it, pixel_values"]


def test_what_the_recipe_makes_of_both() -> None:
    model = llava()
    spikepatch.patch(model, spikepatch.plan(model, "scaled-embed", reinit="all"))
    report = spikepatch.check(model)
    images, tokens = only(report)
    assert (images, tokens) == pytest.approx(seen(model), rel=0.2)
    assert images == pytest.approx(1, rel=0.2)
    assert tokens == pytest.approx((2 / 5) ** 0.5, rel=0.1)  # sqrt(2 / (5 d)) times sqrt(d)
    assert "entrance" not in {finding.name for finding in report.findings}
