"""The paper's upper bounds on the gradient, in closed form (Takase et al., arXiv 2312.16903; equation numbers are its).

They hold for a sequential pre-norm block whose weights are Gaussian: there ||W|| is about std (sqrt(in) + sqrt(out)).
A bound that does not hold for a sub-layer is *not covered*, with the reason: never a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spikepatch.residual.map import Matrix, ResidualMap, ResidualProjection


@dataclass(frozen=True)
class Bound:
    """An upper bound on the norm of a Jacobian; None: not covered, for the ``reason``."""

    value: float | None
    reason: str = ""


def norm_jacobian(sigma: float, *, eps: float = 0.0, gain: float = 1.0) -> float:
    """(14) ||dLN(x)/dx|| <= max|g| / sqrt(sigma^2 + eps), sigma the std (RMSNorm: the RMS) of x over its width."""
    return gain / math.sqrt(sigma**2 + eps)


def gaussian_norm(std: float, fan_in: int, fan_out: int) -> float:
    """||W|| of a Gaussian matrix: std (sqrt(in) + sqrt(out)), the edge of its spectrum."""
    return std * (math.sqrt(fan_in) + math.sqrt(fan_out))


def mlp_excess(std_in: float, std_out: float, width: int, hidden: int, sigma: float) -> float:
    """(15) without the 1 of the shortcut: sigma_1 sigma_2 (sqrt(d) + sqrt(d_ffn))^2 / sigma_x'."""
    return gaussian_norm(std_in, width, hidden) * gaussian_norm(std_out, hidden, width) / sigma


def attention_excess(std_out: float, fan_in: int, width: int, sigma: float, jacobian: float) -> float:
    """(20) without the 1: sigma_O (sqrt(in) + sqrt(d)) ||J_Z|| / sigma_x, J_Z the Jacobian of the concatenated heads.

    With in = d this is the paper's sigma_O 2 sqrt(d) ||J_Z|| / sigma_x.
    """
    return gaussian_norm(std_out, fan_in, width) * jacobian / sigma


def product(bounds: Iterable[Bound]) -> Bound:
    """(7) The bound on ||dL/dx_1|| / ||dL/dy_N||: the product of all sub-layers' bounds."""
    value = 1.0
    for bound in bounds:
        if bound.value is None:
            return Bound(None, f"a factor is not covered: {bound.reason}")
        value *= bound.value
    return Bound(value)


def not_covered(residual: ResidualMap, projections: Sequence[ResidualProjection]) -> str:
    """Why the closed forms do not hold for the sub-layer of these projections, by its place on the stream; or ""."""
    kinds = {p.kind for p in projections}
    if kinds & {"moe", "mixer", "cross-attention"}:
        names = {"moe": "a mixture of experts", "mixer": "a token mixer", "cross-attention": "cross-attention"}
        return f"{names[sorted(kinds)[-1]]}: the paper has no closed form for it"
    if any(p.branch_norm is not None for p in projections):
        return "a norm on the branch: the size of the weights before it does not matter"
    if residual.placement == "post-norm" or any(norm.role == "post" for norm in residual.norms):
        return "post-norm: the norm stands on the stream itself"
    if residual.placement in {"parallel", "no-norm"}:
        return {"parallel": "parallel sub-layers: they read the same point", "no-norm": "no norm before it"}[
            residual.placement
        ]
    return ""


def mlp_matrices(sublayer: Sequence[Matrix], projections: Sequence[ResidualProjection]) -> tuple[Matrix, Matrix] | str:
    """(W_1, W_2) of a two-matrix MLP; or why it is none."""
    outputs = {p.parameter for p in projections}
    first = [m for m in sublayer if m.parameter not in outputs]
    second = [m for m in sublayer if m.parameter in outputs]
    if len(first) == len(second) == 1 and first[0].fan_out == second[0].fan_in:
        return first[0], second[0]
    fused = len(first) == len(second) == 1
    return "a gated MLP: three matrices" if fused or len(first) == 2 else f"an MLP of {len(sublayer)} matrices"
