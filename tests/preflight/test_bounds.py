"""The closed forms against the paper's setting, numbers worked out by hand, and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

import spikepatch
from spikepatch.plans.plan import small_std
from spikepatch.preflight import bounds
from spikepatch.preflight.bounds import Bound
from tests.architectures import tiny_model

#: Excess of Eq. 15 at layer 1 for (layers, width), by the std of what enters it.
TABLE = {
    (24, 1024): {"Embed LN": 0.520, "Scaled Embed": 0.822, "Vanilla": 26.3, "Xavier": 576},
    (24, 2304): {"Embed LN": 0.520, "Scaled Embed": 0.822, "Vanilla": 39.4, "Xavier": 584},
    (40, 5120): {"Embed LN": 0.402, "Scaled Embed": 0.636, "Vanilla": 45.5, "Xavier": 599},
}


@pytest.mark.parametrize(("layers", "width"), TABLE)
def test_the_excess_of_each_initialisation(layers: int, width: int) -> None:
    small, vocabulary = small_std(width), 50257
    scaled = small / math.sqrt(2 * layers)
    xavier = math.sqrt(2 / (width + 4 * width))
    excess = {
        "Embed LN": bounds.mlp_excess(small, scaled, width, 4 * width, 1.0),
        "Scaled Embed": bounds.mlp_excess(small, scaled, width, 4 * width, small * math.sqrt(width)),
        "Vanilla": bounds.mlp_excess(small, scaled, width, 4 * width, small),
        "Xavier": bounds.mlp_excess(xavier, xavier, width, 4 * width, math.sqrt(2 / (vocabulary + width))),
    }
    assert excess == pytest.approx(TABLE[layers, width], rel=0.02)


def test_small_init_does_not_depend_on_the_width() -> None:
    for width in (64, 1024, 8192):
        small = small_std(width)
        assert bounds.mlp_excess(small, small, width, 4 * width, 1.0) == pytest.approx(3.6)
        # sigma_O 2 sqrt(d) = 1.265
        assert bounds.attention_excess(small, width, width, 1.0, 1.0) == pytest.approx(2 * math.sqrt(0.4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_the_jacobian_of_a_norm(kind: str, dtype: torch.dtype) -> None:
    """(14) is an equality, up to the gain: the largest singular value is 1 / sqrt(sigma^2 + eps)."""
    width, eps = 24, 1e-3
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(width, generator=generator, dtype=dtype)
    gain = torch.rand(width, generator=generator, dtype=dtype) + 0.5

    def norm(x: torch.Tensor) -> torch.Tensor:
        if kind == "layernorm":
            return functional.layer_norm(x, (width,), gain, None, eps)
        return functional.rms_norm(x, (width,), gain, eps)

    sigma = x.std(correction=0) if kind == "layernorm" else x.pow(2).mean().sqrt()
    jacobian = torch.autograd.functional.jacobian(norm, x)  # type: ignore[no-untyped-call]
    measured = float(torch.linalg.svdvals(jacobian)[0])
    bound = bounds.norm_jacobian(float(sigma), eps=eps, gain=float(gain.max()))
    assert measured <= bound * (1 + 100 * torch.finfo(dtype).eps)

    plain = torch.autograd.functional.jacobian(lambda x: norm(x) / gain, x)  # type: ignore[no-untyped-call]
    exact = bounds.norm_jacobian(float(sigma), eps=eps)
    assert float(torch.linalg.svdvals(plain)[0]) == pytest.approx(exact, rel=100 * torch.finfo(dtype).eps)


def test_the_product_names_the_factor_that_is_missing() -> None:
    assert bounds.product([Bound(2.0), Bound(1.5)]) == Bound(3.0)
    missing = bounds.product([Bound(2.0), Bound(None, "a gated MLP: three matrices")])
    assert missing.value is None
    assert "gated" in missing.reason


@pytest.mark.parametrize(
    ("model_type", "sublayer", "reason"),
    [
        ("mixtral", 1, "mixture of experts"),
        ("mamba", 0, "token mixer"),
        ("gpt_neox", 0, "parallel"),
        ("gemma2", 0, "norm on the branch"),
        ("olmo2", 1, "norm on the branch"),
        ("gpt2", 1, ""),
        ("llama", 0, ""),
    ],
)
def test_what_the_closed_forms_do_not_cover(model_type: str, sublayer: int, reason: str) -> None:
    residual = spikepatch.inspect(tiny_model(model_type))
    projections = [p for p in residual.residual_projections if p.sublayer == sublayer]
    assert projections
    found = bounds.not_covered(residual, projections)
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(("model_type", "gated"), [("gpt2", False), ("opt", False), ("llama", True), ("gemma2", True)])
def test_the_two_matrices_of_an_mlp(model_type: str, gated: bool) -> None:
    residual = spikepatch.inspect(tiny_model(model_type))
    projections = [p for p in residual.residual_projections if p.sublayer == 1]
    pair = bounds.mlp_matrices([m for m in residual.matrices if m.sublayer == 1], projections)
    if gated:
        assert "gated" in pair
    else:
        assert not isinstance(pair, str)
        assert pair[1].parameter == projections[0].parameter
        assert pair[0].fan_out == pair[1].fan_in
