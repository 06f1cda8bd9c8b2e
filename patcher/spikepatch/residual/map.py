"""The residual map: what the stream of a model is made of, as frozen data that travels as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from spikepatch.source.typed import parsed

SublayerKind = Literal["attention", "cross-attention", "mlp", "moe", "mixer"]
NormRole = Literal["embedding", "pre", "post", "branch", "final", "qk", "inner"]
NormKind = Literal["layernorm", "rmsnorm"]
Placement = Literal["pre-norm", "post-norm", "branch-norm", "parallel", "no-norm", "mixed"]


@dataclass(frozen=True)
class Embedding:
    """A lookup table whose rows enter the stream.

    Attributes:
        module: path of the module that owns the table.
        parameter: the table, (rows, width).
        kind: ``token`` (indexed by the input ids), ``position``, or ``type`` (the same row at every position).
        scale: std of what enters the stream over std of the rows looked up, measured on the traced graph. Behind a norm
            that makes it small, as one to unit length does, the std itself; behind any other norm 1.
        normed: a norm stands between the lookup and the stream, so the scale of the table does not matter there.
        width: length of a row; where it is not the stream's, a projection stands between them.
    """

    module: str
    parameter: str
    kind: Literal["token", "position", "type"]
    scale: float
    normed: bool
    width: int


@dataclass(frozen=True)
class Between:
    """A step on the way from a residual projection to its addition.

    Attributes:
        kind: ``bias`` (a learned vector is added), ``gain`` (a learned factor, such as a layer scale), ``gate`` (a
            factor computed from the tokens, such as a router's weight), ``multiplier`` (a constant factor), ``norm``,
            or ``convolution`` (along the tokens).
        parameter: what is learned there, by name; of a norm its gain.
    """

    kind: Literal["bias", "gain", "gate", "multiplier", "norm", "convolution"]
    parameter: str | None


@dataclass(frozen=True)
class ResidualProjection:
    """A weight whose product is added to the stream: W_O, W_2, an expert's down projection, a mixer's output.

    Attributes:
        parameter: its name in ``named_parameters()``.
        layer: index of the layer (the entry of the model's list of blocks) that holds it.
        sublayer: index of its sub-layer, in the order of the additions; routed and shared experts share one.
        kind: what the sub-layer computes.
        branch_norm: module of a norm between the product and the addition, if any: it cancels the weight's scale.
        multiplier: constant factor between the product and the addition (1.0: none).
        between: all that stands between the product and the addition, in this order; sums over experts are not said.
    """

    parameter: str
    layer: int | None
    sublayer: int
    kind: SublayerKind
    branch_norm: str | None = None
    multiplier: float = 1.0
    between: tuple[Between, ...] = ()


@dataclass(frozen=True)
class Norm:
    """A norm of the model.

    Attributes:
        module: path of the module whose forward computes it.
        role: its place on the stream.
        kind: ``layernorm`` subtracts the mean, ``rmsnorm`` does not.
        eps: as in its forward pass.
        layer: index of the layer that holds it.
        gain: what its result is multiplied by: its parameter ``w``, ``1+w``, or nothing.
        parameter: that gain, by name.
        bias: what is added then, by name.
    """

    module: str
    role: NormRole
    kind: NormKind
    eps: float
    layer: int | None
    gain: Literal["w", "1+w", "none"]
    parameter: str | None
    bias: str | None


@dataclass(frozen=True)
class Entrance:
    """Features of an image or a sound that enter the stream beside the tokens' embeddings.

    Attributes:
        inputs: the arguments of ``forward`` that they are computed from.
        parameter: the last matrix that computes them; None: there is none, or several.
        fan_in: number of products that each of its outputs sums; 0 without one.
        normed: a norm stands between that matrix and the stream, so its scale does not matter there.
        after: the residual projection whose output was added last before they enter; None: they enter at the start.
        size: their root mean square with weights by the architecture's own initialiser, where it was measured; see
            ``feature_size.measured``.
    """

    inputs: tuple[str, ...]
    parameter: str | None
    fan_in: int
    normed: bool
    after: str | None
    size: float | None = None


@dataclass(frozen=True)
class Head:
    """The last matmul before the output; ``tied`` when its weight is an embedding table as well."""

    parameter: str
    tied: bool


@dataclass(frozen=True)
class Matrix:
    """A matmul weight inside a sub-layer.

    Attributes:
        parameter: its name in ``named_parameters()``.
        sublayer: index of its sub-layer; the first, where several compute with it.
        kind: what the sub-layer computes.
        reads_stream: its input is the stream, normed or not.
        fan_in: number of products that each output sums.
        fan_out: number of outputs; of all matrices together, where several are fused (qkv, gate and up). Experts
            are counted in neither.
        in_axis: the axis of the parameter, as it lies in memory, that the inputs run along: the longest of several.
        out_axis: the one that the outputs run along: (1, 0) of an ``nn.Linear``, (0, 1) where it is (in, out).
    """

    parameter: str
    sublayer: int
    kind: SublayerKind
    reads_stream: bool
    fan_in: int
    fan_out: int
    in_axis: int
    out_axis: int


UseRole = Literal["embedding", "entrance", "stream", "projection", "sublayer", "head", "unread"]


@dataclass(frozen=True)
class Use:
    """One use of a parameter; a tied or shared one has several.

    Attributes:
        parameter: its name in ``named_parameters()``.
        stream: 0 for the stream that feeds the output, 1 and up for ``ResidualMap.streams``.
        role: ``embedding`` (on the way to the stream's start, or entering it later), ``entrance`` (computes features of
            an image or a sound that enter it), ``stream`` (a gain or bias on the
            stream itself), ``projection``, ``sublayer`` (all else that computes what a sub-layer adds), ``head``
            (behind the stream), or ``unread`` (the output does not depend on it in the traced pass).
    """

    parameter: str
    stream: int
    role: UseRole


@dataclass(frozen=True)
class ResidualMap:
    """Everything a plan needs to know of a model. The top level describes the stream that feeds the output.

    Attributes:
        source: where the model came from, as the user named it.
        model_type: the config's type, "" for a plain module.
        architecture: class of the model.
        width: d, the length of one token's stream vector.
        layers: N, number of blocks that hold residual projections.
        sublayers: S, counted from the additions; 2 N in a classic decoder.
        placement: where the norms stand.
        proven: both sides of the proof hold; see ``residual/proof.py``.
        leaks: why not, naming parameters; empty when proven.
        reaches: the parameters that the output still depends on with every residual projection (and its bias) cut: the
            embedding path, norms and gains on the stream, the head.
        embeddings, residual_projections, norms, head, matrices: the parts, in the order of the forward pass; the
            projections are among the matrices too, and ``head`` is None where no matmul follows the stream.
        tied: groups of parameter names that are one tensor; the name that the rest of the map uses comes first.
        streams: maps of further streams (an encoder's).
        entrances: where features of images or sounds enter the stream, in the order of the forward pass.
        uses: every use of every parameter; on the top level, for all streams.
        unread: parameters that the output does not depend on in the traced pass.
        conditions: why what is said holds for inputs like the traced ones only: blocks that were run in part, and
            branches whose other way is not known. Empty: it holds for all.
        towers: of a model that reads images or sounds beside text, the parameters and persistent buffers that compute
            features of them; see ``parts.py``.
    """

    source: str
    model_type: str
    architecture: str
    width: int
    layers: int
    sublayers: int
    placement: Placement
    proven: bool
    leaks: tuple[str, ...]
    reaches: tuple[str, ...]
    embeddings: tuple[Embedding, ...]
    residual_projections: tuple[ResidualProjection, ...]
    norms: tuple[Norm, ...]
    head: Head | None
    matrices: tuple[Matrix, ...]
    tied: tuple[tuple[str, ...], ...]
    streams: tuple[ResidualMap, ...] = field(default=())
    entrances: tuple[Entrance, ...] = ()
    uses: tuple[Use, ...] = ()
    unread: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The stream and its parts, equal ones of all layers as one: what ``spikepatch inspect`` shows, in short."""
        proof = "proven" if self.proven else f"NOT proven: {'; '.join(self.leaks)}"
        projections = [p.parameter for p in self.residual_projections]
        parts = {
            "embedding": [e.parameter for e in self.embeddings],
            "matrix": [m.parameter for m in self.matrices if m.parameter not in projections],
            "residual projection": projections,
            "norm": [n.module for n in self.norms],
            "head": [self.head.parameter] if self.head else [],
        }
        lines = [f"{what:20} {name}" for what, names in parts.items() for name in dict.fromkeys(map(pattern, names))]
        size = f"{self.placement}, width d = {self.width}, N = {self.layers} layers, S = {self.sublayers} sub-layers"
        return "\n".join([f"{self.architecture}: {size}, {proof}", *lines])

    def to_json(self) -> str:
        """The whole map as JSON, as ``spikepatch inspect --json`` prints it; ``from_dict`` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ResidualMap:
        """The inverse of ``json.loads(self.to_json())``."""
        return parsed(cls, data)

    @property
    def token_embedding(self) -> Embedding | None:
        """The table that the input ids index; the first one, where there are several."""
        return next((e for e in self.embeddings if e.kind == "token"), None)


def pattern(name: str) -> str:
    """The name with every part that is a number replaced: ``h.3.attn.weight`` -> ``h.*.attn.weight``.

    ``runtime/embedding.py``, which stands alone, has the same function.
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
