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
from typing import Any, Literal, get_args

from spikepatch.errors import Refused, on_one_line

# A plan's edits are part of it: what makes or reads a plan imports them from here.
from spikepatch.plans.edits import NORM_NAMES as NORM_NAMES
from spikepatch.plans.edits import Constant as Constant
from spikepatch.plans.edits import DetachEmbedding as DetachEmbedding
from spikepatch.plans.edits import Distribution as Distribution
from spikepatch.plans.edits import Edit as Edit
from spikepatch.plans.edits import EmbeddingEdit as EmbeddingEdit
from spikepatch.plans.edits import Fill as Fill
from spikepatch.plans.edits import NormEmbedding as NormEmbedding
from spikepatch.plans.edits import ScaleEmbedding as ScaleEmbedding
from spikepatch.plans.edits import Skip as Skip
from spikepatch.plans.edits import Untie as Untie
from spikepatch.plans.edits import ValueEdit as ValueEdit
from spikepatch.plans.edits import cut_std as cut_std
from spikepatch.plans.edits import recorded_edit as recorded_edit
from spikepatch.residual.map import ResidualMap, pattern
from spikepatch.source.typed import parsed

Reinit = Literal["all", "residual", "none"]
REINITS: tuple[Reinit, ...] = ("all", "residual", "none")

#: What is patched of a model of several modalities: all but towers with learned weights, or all of it.
ModelPart = Literal["language", "all"]


@dataclass(frozen=True)
class Context:
    """What a transform may know beside the map of a stream.

    Attributes:
        reinit: which weights are drawn afresh: ``all``, the ``residual`` projections, or ``none``.
        embedding_std: std of the learned token embedding's elements; None where nothing learned is kept.
        untied: the head is being given its own matrix, or has one.
        shapes: of every parameter and persistent buffer, and of a head that is being given its own matrix.
        stream: 0 for the stream that feeds the output; the others (an encoder's) follow.
        part: ``language``: features of images and sounds may stay as small as they are.
        kept: tensors that are left as they are, whatever the recipe: of towers with learned weights.
        feature_sizes: root mean square of what the last matrix before an entrance of features reads, by its name;
            measured where fresh weights are drawn.
    """

    reinit: Reinit
    embedding_std: float | None = None
    untied: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stream: int = 0
    part: ModelPart | None = None
    kept: frozenset[str] = frozenset()
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
class PartShape:
    """A part of a model of several modalities, and what becomes of it.

    Attributes:
        part: ``language``; ``projector``, which brings features to the stream's width; or ``towers``, which compute
            them.
        tensors, elements: how many it has.
        modules: the outermost modules that hold nothing else.
        weights: what becomes of them, in words.
    """

    part: Literal["language", "projector", "towers"]
    tensors: int
    elements: int
    modules: tuple[str, ...]
    weights: str


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
        kept: tensors that stay as they are with ``reinit="all"`` too: those of towers with learned weights.
        parts: of a model of several modalities.
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
    kept: tuple[str, ...] = ()
    parts: tuple[PartShape, ...] = ()

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
        """The inverse of ``to_dict``.

        Raises:
            Refused: it is no plan; the first thing that is wrong is named.
        """
        kinds = {kind.__name__: kind for kind in get_args(Edit)}
        try:
            edits = [{**entry} for entry in data["edits"]]
            found = tuple(parsed(kinds[entry.pop("edit")], entry) for entry in edits)
            plan = dataclasses.replace(parsed(cls, {**data, "edits": []}), edits=found)
            if not plan.streams:
                raise ValueError("it has no stream")
            return plan
        except (TypeError, KeyError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            raise Refused(
                what="this is no plan",
                where="Plan.from_dict",
                why=on_one_line(error),
                remedy="give what Plan.to_dict returned, or the plan of a spikepatch.json, as it was written",
            ) from error

    def record(self, version: str) -> dict[str, Any]:
        """What a generated model class reads from ``config.spikepatch``; see ``runtime/embedding.py``."""
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
            "embeddings": {edit.module: edit.record for edit in self.select(EmbeddingEdit)},
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
        entries += [edit.record for edit in (general if len(general) == 1 else group)]
    return entries


def small_std(width: int) -> float:
    """The paper's small initialisation: std sqrt(2 / (5 d)) for a stream of width d."""
    return math.sqrt(2 / (5 * width))
