"""The stds that initialisations give to one weight of shape (out, in), and the laws by which they go.

    small     sqrt(2 / (5 d))               d: width of the residual stream
    xavier    sqrt(2 / (fan_in + fan_out))
    fan_in    1 / sqrt(fan_in)
    normal    a given std

Of fused matrices (queries, keys and values in one) fan_out counts all outputs; of experts each by itself counts. An
embedding of shape (rows, width) has fan_in = width and fan_out = rows, as ``torch.nn.init`` counts; so has the head.

``std`` is the std of what is drawn, for every distribution: a normal one cut off at ``cut`` of its own stds is drawn
wider before the cut, and a uniform one goes to +- sqrt(3) std. (``torch.nn.init.trunc_normal_`` takes the std before
the cut: what it gives is narrower, by 1.3 % at 3 and by 12 % at 2.)

Sources: small: Nguyen and Salazar 2019; xavier: Glorot and Bengio 2010, who draw it uniformly, as ``uniform`` does; it
is normal by default, as in Takase et al., arXiv 2312.16903, whose bound takes weights as Gaussian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from spikepatch.errors import Refused
from spikepatch.plans.plan import Distribution, Fill, small_std
from spikepatch.residual.map import Matrix


@dataclass(frozen=True)
class Drawn:
    """What the configs of ``small_init`` and ``residual_init`` share.

    Attributes:
        base: the rule above.
        std: with ``normal`` only.
        cut: cut a normal distribution off there, in units of its std before the cut; 0: nowhere.
        uniform: draw uniformly.
    """

    base: Literal["small", "xavier", "fan_in", "normal"] = "small"
    std: float | None = None
    cut: float = 0.0
    uniform: bool = False

    def __post_init__(self) -> None:
        problem = None
        if (self.base == "normal") != (self.std is not None):
            problem = "std goes with base = normal, and base = normal needs one"
        elif self.std is not None and not 0 < self.std < math.inf:
            problem = f"std is {self.std}, and must be a positive number"
        elif not 0 <= self.cut < math.inf or (self.cut and self.uniform):
            problem = f"cut is {self.cut}, and must be a positive number, of a distribution that is not uniform"
        if problem:
            raise Refused(
                what="this is no distribution to draw weights from",
                where=type(self).__name__,
                why=problem,
                remedy="see spikepatch_transforms/distributions.py",
            )

    @property
    def distribution(self) -> Distribution:
        """As ``Fill`` names it."""
        return "uniform" if self.uniform else "truncated" if self.cut else "normal"

    def fill(self, parameter: str, width: int, shape: tuple[int, ...], matrix: Matrix | None = None) -> Fill:
        """``parameter``, of this shape, by the rule.

        Args:
            width: d.
            matrix: of a sub-layer; None for an embedding and the head.
        """
        fans, axes = (shape[-1], shape[-2]), (len(shape) - 1, len(shape) - 2)  # (inputs, outputs)
        if matrix is not None:
            fans, axes = (matrix.fan_in, matrix.fan_out), (matrix.in_axis, matrix.out_axis)

        def fill(std: float, fan: int = 0, along: tuple[int, ...] = ()) -> Fill:
            return Fill(parameter, std, self.distribution, self.cut, fan, along)

        match self.base:
            case "small":
                return fill(small_std(width), width)
            case "xavier":
                return fill(math.sqrt(2 / sum(fans)), sum(shape[axis] for axis in axes), axes)
            case "fan_in":
                return fill(1 / math.sqrt(fans[0]), shape[axes[0]], axes[:1])
            case "normal":
                assert self.std is not None
                return fill(self.std)
