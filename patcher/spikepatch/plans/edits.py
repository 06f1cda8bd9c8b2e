"""The kinds of edit: a closed union of frozen data. A kind says itself

    target   what it is about: of one target a plan has one edit at most
    words    what it does, for people, without the name; see ``in_words.py``
    record   what ``config.spikepatch`` holds of it, as ``runtime/`` reads it

A new kind is added here; what carries it out is ``apply/values/assign.py`` for values, and ``runtime/embedding.py`` for
a change of structure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from spikepatch.residual.map import NormKind

if TYPE_CHECKING:
    from spikepatch.runtime.embedding import EmbeddingRecord

Distribution = Literal["normal", "truncated", "uniform"]
NORM_NAMES: dict[NormKind, str] = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}

#: What an edit is about: values of a parameter, the output of an embedding, or whose matrix a head has; and its name.
EditTarget = tuple[Literal["values", "embedding", "head"], str]

#: In the record: the factor is the root of the embedding's own width, whatever that is when a model is built. What runs
#: beside a model resolves it for itself (``runtime/embedding.py``): it stands alone, and this room is without torch.
_ROOT = "sqrt(width)"


@dataclass(frozen=True)
class Fill:
    """Draw every element of ``parameter`` afresh, with mean 0 and this ``std``; ``apply/values/draw.py`` has the bits.

    ``std`` is that of the values drawn, whatever the distribution. The other fields say where it comes from, so that a
    generated class can follow a config with another width or depth. An embedding's padding row is a row like the
    others, here and in a generated class, though transformers' own initialiser zeroes it: a zero row has no large
    shortcut, the norm that reads it multiplies gradients by 1/sqrt(eps).

    Attributes:
        parameter: its name in ``named_parameters()``.
        std: above 0.
        distribution: ``normal``; ``truncated``: a normal distribution cut off; ``uniform`` on +- sqrt(3) std.
        cut: of a truncated one: where it is cut, in units of its std before the cut. 0 otherwise.
        fan: the length F that the std falls with, as 1/sqrt(F): the stream's width, or a sum of the parameter's own
            dimensions, such as fan-in; 0 where the std is a constant of the recipe.
        axes: the axes of the parameter whose lengths add up to ``fan``; none where it is the stream's width.
        depth: the power of S that the std goes with: -0.5 for 1/sqrt(S).
        stream: index of the stream whose width and S are meant; set by the planner.
    """

    parameter: str
    std: float
    distribution: Distribution = "normal"
    cut: float = 0.0
    fan: int = 0
    axes: tuple[int, ...] = ()
    depth: float = 0.0
    stream: int = 0

    @property
    def size(self) -> float:
        """What draws of unit size are multiplied by: N(0, 1), N(0, 1) cut off at +- ``cut``, or uniform on +- 1."""
        match self.distribution:
            case "normal":
                return self.std
            case "truncated":
                return self.std / cut_std(self.cut)
            case "uniform":
                return math.sqrt(3) * self.std

    @property
    def target(self) -> EditTarget:
        return "values", self.parameter

    @property
    def words(self) -> str:
        return f"std {self.std:.6g}"

    @property
    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"axes": list(self.axes), "size": self.size}


@dataclass(frozen=True)
class Constant:
    """Set every element of ``parameter`` to ``value + offset``.

    ``value`` goes with S to the power of ``depth``; ``offset`` does not: a norm that multiplies by 1 + w and is to have
    the gain 1/sqrt(S) gets the value 1/sqrt(S) and the offset -1. ``stream`` as in ``Fill``.
    """

    parameter: str
    value: float
    offset: float = 0.0
    depth: float = 0.0
    stream: int = 0

    @property
    def written(self) -> float:
        """What every element becomes."""
        return self.value + self.offset

    @property
    def target(self) -> EditTarget:
        return "values", self.parameter

    @property
    def words(self) -> str:
        return f"all {self.written:.6g}"

    @property
    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ScaleEmbedding:
    """Multiply the output of the embedding ``module`` by ``factor``; ``per_width``: the factor is sqrt(width)."""

    module: str
    factor: float
    per_width: bool = False

    @property
    def target(self) -> EditTarget:
        return "embedding", self.module

    @property
    def words(self) -> str:
        return f"output * {self.factor:.6g}" + (" = sqrt(d)" if self.per_width else "")

    @property
    def record(self) -> EmbeddingRecord:
        return {"factor": _ROOT if self.per_width else self.factor}


@dataclass(frozen=True)
class NormEmbedding:
    """Put a norm behind the embedding ``module``; ``affine``: with a gain (first 1), a LayerNorm with a bias (0)."""

    module: str
    eps: float
    kind: NormKind = "layernorm"
    affine: bool = True

    @property
    def target(self) -> EditTarget:
        return "embedding", self.module

    @property
    def words(self) -> str:
        return f"output through a {NORM_NAMES[self.kind]}" + ("" if self.affine else " without gain")

    @property
    def record(self) -> EmbeddingRecord:
        return {"norm": self.kind, "eps": self.eps, "affine": self.affine}


@dataclass(frozen=True)
class DetachEmbedding:
    """Let the fraction ``gradient`` of the gradient reach the embedding ``module``; its output stays the same."""

    module: str
    gradient: float

    @property
    def target(self) -> EditTarget:
        return "embedding", self.module

    @property
    def words(self) -> str:
        return f"{self.gradient:g} of its gradient"

    @property
    def record(self) -> EmbeddingRecord:
        return {"gradient": self.gradient}


@dataclass(frozen=True)
class Untie:
    """Give the head its own matrix, ``head``; with learned weights kept it starts as a copy of ``embedding``."""

    head: str
    embedding: str

    @property
    def target(self) -> EditTarget:
        return "head", self.head

    @property
    def words(self) -> str:
        return f"its own matrix, no longer tied to {self.embedding}"


@dataclass(frozen=True)
class Skip:
    """A tensor that the recipe does not fill, and why.

    With ``reinit="all"`` the architecture's own initialiser writes it, otherwise its learned value stays.
    """

    target: str
    reason: str


ValueEdit = Fill | Constant
EmbeddingEdit = ScaleEmbedding | NormEmbedding | DetachEmbedding
Edit = ValueEdit | EmbeddingEdit | Untie


def recorded_edit(module: str, entry: Mapping[str, Any], width: int) -> EmbeddingEdit:
    """The inverse of ``record``: what a config says of the embedding ``module``, whose rows are ``width`` long.

    Raises:
        ValueError: it is of no kind that is known.
    """
    match dict(entry):
        case {"factor": factor, **more} if not more:
            root = factor == _ROOT
            return ScaleEmbedding(module, math.sqrt(width) if root else float(factor), root)
        case {"norm": "layernorm" | "rmsnorm" as kind, "eps": eps, "affine": affine, **more} if not more:
            return NormEmbedding(module, eps, kind, affine)
        case {"gradient": gradient, **more} if not more:
            return DetachEmbedding(module, gradient)
    raise ValueError(f"config.spikepatch has an edit for {module} that this version does not know: {entry}")


def cut_std(cut: float) -> float:
    """std of N(0, 1) cut off at -c and c: sqrt(1 - 2 c phi(c) / (2 Phi(c) - 1)); 0.987 for 3, 0.880 for 2."""
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(1 - 2 * cut * density / math.erf(cut / math.sqrt(2)))
