"""The plan: every change that a recipe makes to one model, and every tensor that it leaves alone, as plain data.

Planning is pure. A plan says nothing of where it will be applied: the live model and the checkpoint folder read the
same plan and end with the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spikepatch.errors import Refused
from spikepatch.residual.map import ResidualMap

Reinit = Literal["all", "residual", "none"]
REINITS: tuple[Reinit, ...] = ("all", "residual", "none")


@dataclass(frozen=True)
class Fill:
    """Draw every element of ``parameter`` afresh from N(0, ``std``^2); see ``fill.py`` for the bits.

    ``residual`` marks a std that falls with the number of sub-layers (as 1/sqrt(S)). An embedding's padding row is a
    row like the others, here and in a generated class, though transformers' own initialiser zeroes it: a zero row has
    no large shortcut, the norm that reads it multiplies gradients by 1/sqrt(eps).
    """

    parameter: str
    std: float
    residual: bool = False


@dataclass(frozen=True)
class ScaleEmbedding:
    """Multiply the output of the embedding ``module`` by ``factor``; ``per_width``: the factor is sqrt(width)."""

    module: str
    factor: float
    per_width: bool = False


@dataclass(frozen=True)
class NormEmbedding:
    """Put an affine LayerNorm (gain 1, bias 0 at first) behind the embedding ``module``."""

    module: str
    eps: float


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


Edit = Fill | ScaleEmbedding | NormEmbedding | Untie
_EDITS: dict[str, type[Edit]] = {kind.__name__: kind for kind in (Fill, ScaleEmbedding, NormEmbedding, Untie)}


@dataclass(frozen=True)
class Context:
    """What a transform may know beside the map.

    Attributes:
        reinit: which weights are drawn afresh: ``all``, the ``residual`` projections, or ``none``.
        embedding_std: std of the learned token embedding's elements; None where nothing learned is kept.
        untied: the head is being given its own matrix, or has one.
    """

    reinit: Reinit
    embedding_std: float | None = None
    untied: bool = False


Transform = Callable[[ResidualMap, Context], Iterator[Edit | Skip]]


@dataclass(frozen=True)
class Plan:
    """One recipe, worked out for one model.

    Attributes:
        recipe: the recipe's name.
        source, architecture, model_type, width: of the model, from its map.
        sublayers: one residual projection of each sub-layer, so S is its length.
        reinit: ``all``, ``residual`` or ``none``.
        seed: of every random fill and of the architecture's own initialiser.
        edits: what changes.
        skips: what the recipe leaves alone, each with the reason.
    """

    recipe: str
    source: str
    architecture: str
    model_type: str
    width: int
    sublayers: tuple[str, ...]
    reinit: Reinit
    seed: int
    edits: tuple[Edit, ...]
    skips: tuple[Skip, ...]

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["edits"] = [{"edit": type(edit).__name__, **dataclasses.asdict(edit)} for edit in self.edits]
        data["skips"] = [dataclasses.asdict(skip) for skip in self.skips]
        return data

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of ``to_dict``."""
        edits = tuple(_EDITS[e["edit"]](**{k: v for k, v in e.items() if k != "edit"}) for e in data["edits"])
        skips = tuple(Skip(**skip) for skip in data["skips"])
        return cls(**{**data, "edits": edits, "skips": skips, "sublayers": tuple(data["sublayers"])})

    def select(self, kind: type[Any]) -> list[Any]:
        """The edits of one kind, in order."""
        return [edit for edit in self.edits if isinstance(edit, kind)]

    @property
    def structural(self) -> bool:
        """The forward pass changes, not only values: such a model cannot be stored as its plain architecture."""
        return any(isinstance(edit, (ScaleEmbedding, NormEmbedding)) for edit in self.edits)

    def record(self, version: str) -> dict[str, Any]:
        """What a generated model class reads from ``config.spikepatch``; see ``runtime/embedding.py``."""
        embeddings: dict[str, Any] = {}
        for edit in self.edits:
            if isinstance(edit, ScaleEmbedding):
                embeddings[edit.module] = {"factor": "sqrt(width)" if edit.per_width else edit.factor}
            elif isinstance(edit, NormEmbedding):
                embeddings[edit.module] = {"norm": "layernorm", "eps": edit.eps}
        from spikepatch.runtime.embedding import pattern

        fills = self.select(Fill)
        init = None
        if self.reinit == "all" and fills:
            init = {
                "width": self.width,
                "count": len(self.sublayers),
                "sublayers": list(dict.fromkeys(pattern(name) for name in self.sublayers)),
                "fills": _by_pattern(fills),
            }
        return {
            "version": version,
            "recipe": self.recipe,
            "reinit": self.reinit,
            "seed": self.seed,
            "embeddings": embeddings,
            "init": init,
        }


def _by_pattern(fills: list[Fill]) -> list[dict[str, Any]]:
    """One entry per pattern where all layers agree, else one per parameter."""
    from spikepatch.runtime.embedding import pattern

    groups: dict[str, list[Fill]] = {}
    for fill in fills:
        groups.setdefault(pattern(fill.parameter), []).append(fill)
    entries: list[dict[str, Any]] = []
    for place, group in groups.items():
        agreed = len({(fill.std, fill.residual) for fill in group}) == 1
        for fill in group[:1] if agreed else group:
            name = place if agreed else fill.parameter
            entries.append({"parameter": name, "std": fill.std, "residual": fill.residual})
    return entries


def make_plan(
    residual: ResidualMap,
    tensors: Sequence[str],
    recipe: str,
    transforms: Iterable[Transform],
    *,
    reinit: Reinit,
    seed: int,
    embedding_std: float | None = None,
) -> Plan:
    """Work ``transforms`` out on ``residual``. Pure: equal arguments give an equal plan.

    Args:
        residual: a proven map.
        tensors: every parameter and persistent buffer of the model; those that no transform fills become skips.
        recipe: the recipe's name, for the record.
        transforms: applied in order.
        reinit: which weights are drawn afresh.
        seed: at least 0.
        embedding_std: std of the learned token embedding, where learned weights are kept.

    Raises:
        Refused: the map is not proven, a transform does not fit, or the recipe would change nothing.
    """
    if not residual.proven:
        raise Refused(
            what="the residual map is not proven, so nothing is changed",
            where=residual.source,
            why="; ".join(residual.leaks[:5]) + (f"; and {len(residual.leaks) - 5} more" if residual.leaks[5:] else ""),
            remedy="run `spikepatch inspect` for the whole list; a model whose sum cannot be followed is left alone",
        )
    if residual.streams:
        raise Refused(
            what="models with an encoder and a decoder are mapped, but not patched yet",
            where=residual.source,
            why=f"they have {1 + len(residual.streams)} residual streams, and recipes are worked out for one",
            remedy="use a decoder-only model; `spikepatch inspect` shows the streams",
        )
    edits: list[Edit] = []
    skips: list[Skip] = []
    context = Context(reinit, embedding_std, residual.head is None or not residual.head.tied)
    for transform in transforms:
        for item in transform(residual, context):
            if isinstance(item, Skip):
                skips.append(item)
            else:
                edits.append(item)
            if isinstance(item, Untie):
                context = dataclasses.replace(context, untied=True)
    _guard_duplicates(edits, residual.source)
    if not edits:
        raise Refused(
            what=f"the recipe {recipe} changes nothing with reinit={reinit}",
            where=residual.source,
            why="it only draws weights, and none are to be drawn",
            remedy="use --reinit all or residual, or a recipe that changes the embedding: scaled-embed, embed-ln",
        )
    named = {edit.parameter for edit in edits if isinstance(edit, Fill)} | {skip.target for skip in skips}
    left = "not a weight that this recipe draws" if reinit == "all" else "learned, kept"
    skips += [Skip(name, left) for name in tensors if name not in named]
    return Plan(
        recipe=recipe,
        source=residual.source,
        architecture=residual.architecture,
        model_type=residual.model_type,
        width=residual.width,
        sublayers=tuple({p.sublayer: p.parameter for p in reversed(residual.residual_projections)}.values())[::-1],
        reinit=reinit,
        seed=seed,
        edits=tuple(edits),
        skips=tuple(skips),
    )


def _guard_duplicates(edits: list[Edit], source: str) -> None:
    targets = Counter(_target(edit) for edit in edits)
    twice = [f"{name} ({kind})" for (kind, name), count in targets.items() if count > 1]
    if twice:
        raise Refused(
            what="two transforms of the recipe edit the same tensor",
            where=source,
            why=", ".join(twice[:5]),
            remedy="keep one of them",
        )


def _target(edit: Edit) -> tuple[str, str]:
    match edit:
        case Fill(parameter=name):
            return "values", name
        case Untie(head=name):
            return "head", name
        case ScaleEmbedding(module=name) | NormEmbedding(module=name):
            return "embedding", name


def small_std(width: int) -> float:
    """The paper's small initialisation: std sqrt(2 / (5 d)) for a stream of width d."""
    return math.sqrt(2 / (5 * width))
