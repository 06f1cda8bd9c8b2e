"""``inspect(model) -> ResidualMap``: trace, find the stream, prove it, and name what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from spikepatch.errors import Refused
from spikepatch.residual import ops
from spikepatch.residual.facts import Facts
from spikepatch.residual.map import (
    Embedding,
    Head,
    Matrix,
    Norm,
    NormRole,
    Placement,
    ResidualMap,
    ResidualProjection,
    SublayerKind,
)
from spikepatch.residual.measure import measure
from spikepatch.residual.ops import op, operands
from spikepatch.residual.proof import Term
from spikepatch.residual.stream import Stream, find
from spikepatch.residual.trace import TOKENS, Trace, trace
from spikepatch.residual.weights import fan, gain


def inspect(
    model: nn.Module, *, example_inputs: Mapping[str, torch.Tensor] | None = None, source: str = ""
) -> ResidualMap:
    """Find and prove the residual stream of ``model``. The model is neither changed nor run.

    Args:
        model: a transformers model, or any module with ``example_inputs``; weights may be on any device, meta included.
        example_inputs: keyword arguments of ``forward``; not needed for a transformers model.
        source: how to name the model in the map.

    Returns:
        The map. ``map.proven`` tells whether both sides of the proof hold; ``map.leaks`` why not.

    Raises:
        Refused: the forward pass cannot be traced, or there is no residual sum in it.
    """
    return map_of(model, trace(model, example_inputs), source or type(model).__name__)


def map_of(model: nn.Module, graph: Trace, source: str) -> ResidualMap:
    """The map of ``model`` from its traced forward pass; see ``inspect``."""
    streams = find(graph)
    if isinstance(streams, str):
        raise Refused(
            what="no residual stream found",
            where=source,
            why=streams,
            remedy="if the model does add sub-layer outputs to a stream, please report its architecture",
        )
    main, *others = (_Naming(model, stream).map(source) for stream in streams)
    return dataclasses.replace(main, streams=tuple(others))


def sublayers_of(stream: Stream) -> tuple[list[SublayerKind], list[int]]:
    """For each term of ``stream``: what it computes, and the index of its sub-layer.

    Terms that read the same point and are both feed-forward (routed and shared experts) are one sub-layer.
    """
    kinds = [_kind(stream.facts, term) for term in stream.terms]
    keys = []
    for term, kind in zip(stream.terms, kinds, strict=True):
        keys.append((_point(term.reads), "feed-forward" if kind in {"mlp", "moe"} else kind))
    order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return kinds, [order[key] for key in keys]


def _point(node: Node) -> Node:
    while op(node) in ops.VIEWS:
        node = operands(node)[0]
    return node


class _Naming:
    """Turns nodes into names: modules from the trace's call stack, layers from the model's lists of blocks."""

    def __init__(self, model: nn.Module, stream: Stream) -> None:
        self.model, self.stream, self.facts = model, stream, stream.facts
        self.kinds, self.sublayer = sublayers_of(stream)
        parameters = [parameter for term in stream.terms for _, parameter in term.projections]
        self.layers = _layers(model, list(dict.fromkeys(parameters)))

    def map(self, source: str) -> ResidualMap:
        norms = self._norms()
        embeddings = self._embeddings()
        return ResidualMap(
            source=source,
            model_type=getattr(getattr(self.model, "config", None), "model_type", ""),
            architecture=type(self.model).__name__,
            width=ops.last(self.stream.end),
            layers=len(set(self.layers.values())),
            sublayers=len(set(self.sublayer)),
            placement=self._placement(norms),
            proven=not self.stream.leaks,
            leaks=self.stream.leaks,
            reaches=self.stream.reaches,
            embeddings=embeddings,
            residual_projections=self._projections(),
            norms=norms,
            head=self._head(embeddings),
            matrices=self._matrices(),
            tied=_tied(self.model),
        )

    def _layer(self, path: str) -> int | None:
        return next((i for block, i in self.layers.items() if path == block or path.startswith(block + ".")), None)

    def _projections(self) -> tuple[ResidualProjection, ...]:
        found: dict[str, ResidualProjection] = {}
        feed_forward = {s for s, kind in zip(self.sublayer, self.kinds, strict=True) if kind == "moe"}
        for term, kind, sublayer in zip(self.stream.terms, self.kinds, self.sublayer, strict=True):
            for (matmul, parameter), biases in zip(term.projections, term.biases, strict=True):
                between = _chain(self.facts, term.node, matmul)
                norm = next((n for n in between if n in self.facts.norm_at), None)
                found.setdefault(
                    parameter,
                    ResidualProjection(
                        parameter=parameter,
                        layer=self._layer(parameter),
                        sublayer=sublayer,
                        kind="moe" if sublayer in feed_forward else kind,
                        branch_norm=_module(norm) if norm is not None else None,
                        multiplier=self._multiplier(between),
                        biases=biases,
                    ),
                )
        return tuple(found.values())

    def _multiplier(self, chain: list[Node]) -> float:
        factor = 1.0
        for node in chain:
            if op(node) not in ops.PRODUCTS or node in self.facts.norm_at:
                continue
            for argument in node.args:
                value: Any = argument
                if isinstance(argument, Node) and argument in self.facts.trace.buffers:
                    value = self.facts.trace.buffers[argument]
                    value = value.item() if value.numel() == 1 else None
                if isinstance(value, (int, float)):
                    factor = factor * value if op(node) == "mul" else factor / value
        return factor

    def _matrices(self) -> tuple[Matrix, ...]:
        found: dict[str, Matrix] = {}
        moe = {s for s, kind in zip(self.sublayer, self.kinds, strict=True) if kind == "moe"}
        for term, kind, sublayer in zip(self.stream.terms, self.kinds, self.sublayer, strict=True):
            for node in sorted(term.interior, key=self.facts.order.__getitem__):
                if op(node) not in ops.MATMULS:
                    continue
                weights = [a for a in operands(node) if a in self.facts.weight and len(ops.shape(a)) > 1]
                data = self.facts.data(node)
                size = fan(self.facts, node, weights[0]) if weights and len(data) == 1 else None
                if size is not None:
                    name = self.facts.weight[weights[0]]
                    reads = _reads_stream(self.facts, data[0])
                    matrix = Matrix(name, sublayer, "moe" if sublayer in moe else kind, reads, *size)
                    found.setdefault(name, matrix)
        return tuple(found.values())

    def _norms(self) -> tuple[Norm, ...]:
        projected = {m for t in self.stream.terms for m, _ in t.projections}
        between = {n for t in self.stream.terms for m, _ in t.projections for n in _chain(self.facts, t.node, m)}
        attention = {
            n for t, kind in zip(self.stream.terms, self.kinds, strict=True) if kind == "attention" for n in t.interior
        }
        stream = self.stream
        region = set(stream.spine | stream.suffix | self.facts.behind([stream.start]))
        region.update(*(term.interior for term in stream.terms))
        here = [norm for node, norm in self.facts.norm_at.items() if node in region]
        on_stream = [norm.output for norm in here if norm.output in stream.spine]
        start = self.facts.order[self.stream.start]
        last_add = max(self.facts.order[n] for n in stream.additions)
        after_start = [n for n in on_stream if self.facts.order[n] > start]
        found: dict[tuple[str, str], Norm] = {}
        for norm in here:
            role: NormRole
            if norm.output in self.stream.spine:
                if self.facts.order[norm.output] <= start:
                    role = "embedding"
                elif self.facts.order[norm.output] > last_add and len(after_start) == 1:
                    role = "final"
                else:
                    role = "post"
            elif norm.output in self.stream.suffix and _point(norm.input) in self.stream.spine:
                role = "final"
            elif norm.output in between and norm.output not in projected:
                role = "branch"
            elif _point(norm.input) in self.stream.spine:
                role = "pre"
            else:
                role = "qk" if norm.output in attention and _heads(norm.output) else "inner"
            module = _module(norm.output)
            layer = self._layer(module)
            found.setdefault((module, role), Norm(module, role, norm.kind, norm.eps, layer, *gain(self.facts, norm)))
        return tuple(found.values())

    def _placement(self, norms: tuple[Norm, ...]) -> Placement:
        placements: set[Placement] = set()
        points = [_point(t.reads) for t in self.stream.terms]
        normed_inputs = {
            s
            for t, s in zip(self.stream.terms, self.sublayer, strict=True)
            for n in t.interior
            if n in self.facts.norm_at and _point(self.facts.norm_at[n].input) in self.stream.spine
        }
        post = any(norm.role == "post" for norm in norms)
        for projection in self._projections():
            mine = [p for p, s in zip(points, self.sublayer, strict=True) if s == projection.sublayer]
            others = [p for p, s in zip(points, self.sublayer, strict=True) if s != projection.sublayer]
            if post:
                placements.add("post-norm")
            elif projection.branch_norm is not None:
                placements.add("branch-norm")
            elif any(p in others for p in mine):
                placements.add("parallel")
            else:
                placements.add("pre-norm" if projection.sublayer in normed_inputs else "no-norm")
        return placements.pop() if len(placements) == 1 else "mixed"

    def _embeddings(self) -> tuple[Embedding, ...]:
        try:
            measured = measure(self.facts.trace, self.stream)
        except (IndexError, RuntimeError, NotImplementedError) as error:
            raise Refused(
                what="the embedding path cannot be run, so the factor that it applies is not known",
                where=type(self.model).__name__,
                why=str(error).splitlines()[0],
                remedy="please report the architecture",
            ) from error
        found: dict[str, Embedding] = {}
        for table in self.stream.tables:
            parameter = self.facts.weight.get(operands(table)[0] if op(table) in ops.LOOKUPS else table)
            if parameter is not None:  # None: a fixed table, such as sinusoidal positions kept in a buffer
                kind, scale, normed = measured[table]
                module = _module(table) or parameter.rpartition(".")[0]
                width = ops.last(table)
                found.setdefault(parameter, Embedding(module, parameter, kind, scale, normed, width))
        return tuple(found.values())

    def _head(self, embeddings: tuple[Embedding, ...]) -> Head | None:
        for node in sorted(self.stream.suffix, key=self.facts.order.__getitem__, reverse=True):
            weights = [a for a in operands(node) if a in self.facts.weight and len(ops.shape(a)) > 1]
            if op(node) in ops.MATMULS and weights:
                name = self.facts.weight[weights[0]]
                tied = any(name == e.parameter for e in embeddings)
                return Head(_own_name(self.model, name, _module(node)), tied)
        return None


def _kind(facts: Facts, term: Term) -> SublayerKind:
    """What a sub-layer computes, from its operations."""
    inside = [n for n in term.interior if n in facts.varies]
    names = {op(n) for n in inside}
    if names & ops.FUSED_ATTENTION or any(_weighs(facts, n, term.interior) for n in inside if op(n) in ops.SOFTMAX):
        return "cross-attention" if term.crosses else "attention"
    products = any(op(n) in ops.MATMULS and len(facts.data(n)) > 1 for n in inside)
    unrolled = sum(op(n) == "select" for n in inside) >= TOKENS  # a loop over the positions
    if products or unrolled or names & (ops.CONVOLUTIONS | ops.SCANS):
        return "mixer"
    return "moe" if "topk" in names else "mlp"


def _weighs(facts: Facts, softmax: Node, interior: frozenset[Node]) -> bool:
    """The softmax's result is multiplied, as a matrix, with another activation: attention, not routing."""
    todo = [softmax]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user not in interior:
                continue
            if op(user) in ops.MATMULS and len(facts.data(user)) > 1:
                return True
            if op(user) in ops.VIEWS and user in facts.varies:
                todo.append(user)
    return False


def _reads_stream(facts: Facts, node: Node) -> bool:
    """The node is a copy of the stream: normed, cast, gathered or scaled, but not multiplied by a matrix."""
    while node not in facts.carries:
        if op(node) not in ops.VIEWS or _parts(node):
            return False
        node = operands(node)[0]
    return True


def _parts(node: Node) -> bool:
    return op(node) in {"split", "chunk", "split_with_sizes"}


def _chain(facts: Facts, term: Node, matmul: Node) -> list[Node]:
    """Nodes from the addition's operand back to the projection (exclusive), along the data."""
    back: dict[Node, Node] = {}
    todo = [term]
    while todo:
        node = todo.pop()
        if node is matmul:
            break
        inside = facts.norm_at.get(node)
        for argument in [inside.input] if inside is not None else facts.data(node):
            if argument not in back and facts.order[argument] >= facts.order[matmul]:
                back[argument] = node
                todo.append(argument)
    chain: list[Node] = []
    node = matmul
    while node is not term:
        node = back[node]
        chain.append(node)
    return chain


def _module(node: Node | None) -> str:
    """Path of the innermost module whose forward made the node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values()) if node is not None else []
    return str(stack[-1][0]) if stack else ""


def _heads(node: Node) -> bool:
    return len(ops.shape(node)) >= 3


def _layers(model: nn.Module, parameters: list[str]) -> dict[str, int]:
    """Path of each block that holds one of ``parameters`` -> its layer.

    A block is an entry of the outermost list of modules on the parameter's path. Where one layer is spread over several
    lists (all attentions in one, all MLPs in another), equal indices are one layer.
    """
    blocks = list(dict.fromkeys(block for name in parameters if (block := _block(model, name)) is not None))
    indices = [block.rpartition(".")[2] for block in blocks]
    lists = {block.rpartition(".")[0] for block in blocks}
    if len(lists) > 1 and all(i.isdigit() for i in indices):
        numbers = [int(i) for i in indices]
        if numbers == sorted(numbers):
            return dict(zip(blocks, numbers, strict=True))
    return {block: i for i, block in enumerate(blocks)}


def _block(model: nn.Module, parameter: str) -> str | None:
    parts = parameter.split(".")
    for i in range(1, len(parts)):
        holder = model.get_submodule(".".join(parts[: i - 1]))
        if isinstance(holder, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            return ".".join(parts[:i])
    return None


def _tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def _own_name(model: nn.Module, parameter: str, module: str) -> str:
    """The name that a tied parameter has on the module that uses it, such as ``lm_head.weight``."""
    owner = dict(model.named_modules()).get(module)
    target = model.get_parameter(parameter)
    for name, value in owner.named_parameters(recurse=False) if owner is not None else ():
        if value is target:
            return f"{module}.{name}"
    return parameter
