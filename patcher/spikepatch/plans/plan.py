"""The plan: every change that a recipe makes to one model, and every tensor that it leaves alone, as plain data.

A plan says nothing of where it will be applied: the live model and the checkpoint folder read the same plan and end
with the same bits. ``work_out.py`` makes one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from spikepatch.residual.map import NormKind, ResidualMap, pattern

Reinit = Literal["all", "residual", "none"]
REINITS: tuple[Reinit, ...] = ("all", "residual", "none")
Distribution = Literal["normal", "truncated", "uniform"]
NORM_NAMES: dict[NormKind, str] = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}


#: A part of a model of several modalities.
ModelPart = Literal["language"]


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


@dataclass(frozen=True)
class ScaleEmbedding:
    """Multiply the output of the embedding ``module`` by ``factor``; ``per_width``: the factor is sqrt(width)."""

    module: str
    factor: float
    per_width: bool = False


@dataclass(frozen=True)
class NormEmbedding:
    """Put a norm behind the embedding ``module``; ``affine``: with a gain (first 1), a LayerNorm with a bias (0)."""

    module: str
    eps: float
    kind: NormKind = "layernorm"
    affine: bool = True


@dataclass(frozen=True)
class DetachEmbedding:
    """Let the fraction ``gradient`` of the gradient reach the embedding ``module``; its output stays the same."""

    module: str
    gradient: float


@dataclass(frozen=True)
class Untie:
    """Give the head its own matrix, ``head``; with learned weights kept it starts as a copy of ``embedding``."""

    head: str
    embedding: str


@dataclass(frozen=True)
class Skip:
    """A tensor that the recipe does not fill, and why.

    With ``reinit="all"`` the architecture's own initialiser writes it, otherwise its learned value stays.
    """

    target: str
    reason: str


#: A new kind is added here, to ``planner._target``, to what a generated class does with it (``runtime/embedding.py``,
#: by ``Plan.record``) and, where it writes values, to ``apply/values/assign.py``.
ValueEdit = Fill | Constant
EmbeddingEdit = ScaleEmbedding | NormEmbedding | DetachEmbedding
Edit = ValueEdit | EmbeddingEdit | Untie
_EDITS: dict[str, type[Edit]] = {
    kind.__name__: kind for kind in (Fill, Constant, ScaleEmbedding, NormEmbedding, DetachEmbedding, Untie)
}


@dataclass(frozen=True)
class Context:
    """What a transform may know beside the map of a stream.

    Attributes:
        reinit: which weights are drawn afresh: ``all``, the ``residual`` projections, or ``none``.
        embedding_std: std of the learned token embedding's elements; None where nothing learned is kept.
        untied: the head is being given its own matrix, or has one.
        shapes: of every parameter and persistent buffer, and of a head that is being given its own matrix.
        stream: 0 for the stream that feeds the output; the others (an encoder's) follow.
        part: ``language``: what computes features of images and sounds is left as it is.
        feature_sizes: root mean square of what the last matrix before an entrance of features reads, by its name;
            measured where fresh weights are drawn.
    """

    reinit: Reinit
    embedding_std: float | None = None
    untied: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stream: int = 0
    part: ModelPart | None = None
    feature_sizes: Mapping[str, float] = field(default_factory=dict)


#: A transform is asked once for each stream. It changes nothing itself.
Transform = Callable[[ResidualMap, Context], Iterator[Edit | Skip]]


@dataclass(frozen=True)
class Recipe:
    """A name for a tuple of transforms.

    Attributes:
        name: as plans and manifests record it.
        transforms: planned in this order.
        equation: what it does to the weights and the embedding, in one line.
        source: where it comes from.
        small_sublayers, large_shortcut: whether it satisfies the paper's two conditions; None: not known.
        no_decay_embeddings: advice to the optimiser: no weight decay on embeddings; see ``param_groups``.
        advice: what else matters for training with it.
    """

    name: str
    transforms: tuple[Transform, ...]
    equation: str = ""
    source: str = ""
    small_sublayers: bool | None = None
    large_shortcut: bool | None = None
    no_decay_embeddings: bool = False
    advice: str = ""


@dataclass(frozen=True)
class StreamShape:
    """What a plan knows of one residual stream: its width d, and one residual projection of each sub-layer, so that S
    is their number. ``axis`` is the axis of the first one that is as long as the stream is wide.
    """

    width: int
    sublayers: tuple[str, ...]
    axis: int


@dataclass(frozen=True)
class Plan:
    """One recipe, worked out for one model.

    Attributes:
        recipe: the recipe's name.
        source, architecture, model_type: of the model, from its map.
        streams: the one that feeds the output first.
        reinit: ``all``, ``residual`` or ``none``.
        seed: of every random fill and of the architecture's own initialiser.
        edits: what changes.
        skips: what the recipe leaves alone, each with the reason.
        no_decay: parameters with two or more dimensions to train without weight decay: those that are no matrices, and
            embeddings where the recipe says so; see ``param_groups``.
    """

    recipe: str
    source: str
    architecture: str
    model_type: str
    streams: tuple[StreamShape, ...]
    reinit: Reinit
    seed: int
    edits: tuple[Edit, ...]
    skips: tuple[Skip, ...]
    no_decay: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """d of the stream that feeds the output."""
        return self.streams[0].width

    @property
    def sublayers(self) -> tuple[str, ...]:
        """One residual projection of each sub-layer of the stream that feeds the output."""
        return self.streams[0].sublayers

    @property
    def structural(self) -> bool:
        """The forward or backward pass changes, not only values: the plain architecture would leave that out."""
        return bool(self.select(EmbeddingEdit))

    @functools.cached_property
    def written(self) -> frozenset[str]:
        """The parameters that get their values from an edit."""
        return frozenset(edit.parameter for edit in self.edits if isinstance(edit, ValueEdit))

    def select(self, kind: Any) -> list[Any]:
        """The edits of one kind, in order."""
        return [edit for edit in self.edits if isinstance(edit, kind)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; ``from_dict`` is the inverse. Each edit says its kind as ``edit``."""
        data = dataclasses.asdict(self)
        kinds = [type(edit).__name__ for edit in self.edits]
        data["edits"] = [{"edit": kind, **edit} for kind, edit in zip(kinds, data["edits"], strict=True)]
        return data

    def to_json(self) -> str:
        """``to_dict`` as text; what ``spikepatch.json`` holds as ``plan``."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of ``to_dict``."""

        def edit(entry: Mapping[str, Any]) -> Edit:
            return _EDITS[entry["edit"]](**{k: _hashable(v) for k, v in entry.items() if k != "edit"})

        return cls(
            **{
                **data,
                "streams": tuple(StreamShape(**{k: _hashable(v) for k, v in s.items()}) for s in data["streams"]),
                "edits": tuple(edit(entry) for entry in data["edits"]),
                "skips": tuple(Skip(**skip) for skip in data["skips"]),
                "no_decay": tuple(data["no_decay"]),
            }
        )

    def record(self, version: str) -> dict[str, Any]:
        """What a generated model class reads from ``config.spikepatch``; see ``runtime/embedding.py``."""
        embeddings: dict[str, Any] = {}
        for edit in self.select(EmbeddingEdit):
            match edit:
                case ScaleEmbedding():
                    embeddings[edit.module] = {"factor": "sqrt(width)" if edit.per_width else edit.factor}
                case NormEmbedding():
                    embeddings[edit.module] = {"norm": edit.kind, "eps": edit.eps, "affine": edit.affine}
                case DetachEmbedding():
                    embeddings[edit.module] = {"gradient": edit.gradient}
        init = None
        if self.reinit == "all" and self.written:
            streams = [
                {
                    "width": stream.width,
                    "axis": stream.axis,
                    "count": len(stream.sublayers),
                    "sublayers": list(dict.fromkeys(pattern(name) for name in stream.sublayers)),
                }
                for stream in self.streams
            ]
            init = {
                "streams": streams,
                "fills": _by_pattern(self.select(Fill)),
                "constants": _by_pattern(self.select(Constant)),
            }
        return {
            "version": version,
            "recipe": self.recipe,
            "reinit": self.reinit,
            "seed": self.seed,
            "no_decay": list(dict.fromkeys(pattern(name) for name in self.no_decay)),
            "embeddings": embeddings,
            "init": init,
        }


def _by_pattern(edits: list[ValueEdit]) -> list[dict[str, Any]]:
    """One entry per pattern where all layers agree, else one per parameter."""
    groups: dict[str, list[ValueEdit]] = {}
    for edit in edits:
        groups.setdefault(pattern(edit.parameter), []).append(edit)
    entries: list[dict[str, Any]] = []
    for place, group in groups.items():
        general = {dataclasses.replace(edit, parameter=place) for edit in group}
        entries += [_jsonable(edit) for edit in (general if len(general) == 1 else group)]
    return entries


def _jsonable(edit: ValueEdit) -> dict[str, Any]:
    entry = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(edit).items()}
    return entry | ({"size": edit.size} if isinstance(edit, Fill) else {})


def _hashable(value: Any) -> Any:
    """JSON knows no tuples."""
    return tuple(value) if isinstance(value, list) else value


def small_std(width: int) -> float:
    """The paper's small initialisation: std sqrt(2 / (5 d)) for a stream of width d."""
    return math.sqrt(2 / (5 * width))


def cut_std(cut: float) -> float:
    """std of N(0, 1) cut off at -c and c: sqrt(1 - 2 c phi(c) / (2 Phi(c) - 1)); 0.987 for 3, 0.880 for 2."""
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(1 - 2 * cut * density / math.erf(cut / math.sqrt(2)))
