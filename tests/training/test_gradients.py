"""Gradients of each layer, against their definition."""

from __future__ import annotations

import pytest
import torch

from spikepatch.residual.points import points_of
from spikepatch.training.gradients import gradient_norms
from tests.architectures import ids, tiny_model

EPS = torch.finfo(torch.float32).eps


def test_gradient_norms() -> None:
    model = tiny_model("gpt2")
    points = points_of(model)
    model(ids(model), labels=ids(model)).loss.backward()
    found = gradient_norms(model, points).tolist()
    expected = [
        sum(p.grad.double().square().sum().item() for p in model.get_submodule(path).parameters()) ** 0.5
        for path in points.layers
    ]
    assert len(expected) == 3
    assert found == pytest.approx(expected, rel=64 * 64 * EPS)
