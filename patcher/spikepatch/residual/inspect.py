"""``inspect(model) -> ResidualMap``: trace, find the stream, prove it, and name what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Node

from spikepatch.errors import Refused, first_line
from spikepatch.quiet import quiet
from spikepatch.residual import ops
from spikepatch.residual.embedding_path import measure, vectors
from spikepatch.residual.example import Given
from spikepatch.residual.feature_size import own_values
from spikepatch.residual.kinds import addition, between, steps, sublayers_of
from spikepatch.residual.map import (
    Embedding,
    Entrance,
    Head,
    Matrix,
    Norm,
    NormRole,
    Placement,
    ResidualMap,
    ResidualProjection,
)
from spikepatch.residual.multipliers import multiplier
from spikepatch.residual.names import layers, own_name
from spikepatch.residual.norms import NormNode
from spikepatch.residual.ops import behind_views, op, operands, place, table_of
from spikepatch.residual.parts import towers
from spikepatch.residual.stream import Stream, find, projections
from spikepatch.residual.trace import Trace, trace
from spikepatch.residual.uses import entrances_not_run, not_read, parts_not_run, uses_of
from spikepatch.residual.ways import compared
from spikepatch.residual.weights import fan, gain, matrix_weight
from spikepatch.source.meta import build_meta, check_default_device, unwrapped
from spikepatch.source.private import is_transformers_model
from spikepatch.source.tied import tied

#: Views of a part, which is no copy.
_PARTS = frozenset(("split", "chunk", "split_with_sizes"))


def inspect(model: nn.Module, *, example_inputs: Given = None, source: str = "") -> ResidualMap:
    """Find and prove the residual stream of ``model``. The model is neither changed nor run.

    Args:
        model: a transformers model, or any module with ``example_inputs``; weights may be on any device, meta included.
        example_inputs: keyword arguments of ``forward``, as a dict of tensors; or ``module:NAME`` of such a dict, or of
            a function of the model that returns one. A transformers model needs none, but for parts that it runs with
            further inputs only.
        source: how to name the model in the map.

    Returns:
        The map. ``map.proven`` tells whether both sides of the proof hold; ``map.leaks`` why not.

    Raises:
        Refused: it is no module, its forward pass cannot be traced, or there is no residual sum in it.
    """
    check_default_device()
    model = unwrapped(model)
    source = source or type(model).__name__
    if any(buffer.is_meta for buffer in model.buffers()) and is_transformers_model(model):
        model = build_meta(type(model), model.config, where=source)  # some embeddings' factor is the value of a buffer
    with quiet():  # once for all passes: to silence a logger costs, and finds it silent within
        return followed(model, trace(model, example_inputs), source).residual


@dataclass(frozen=True)
class Followed:
    """The streams of one traced pass, and the map of them."""

    streams: tuple[Stream, ...]
    residual: ResidualMap


def followed(model: nn.Module, graph: Trace, source: str) -> Followed:
    """Find and prove the streams of ``model`` in its traced forward pass; see ``inspect``."""
    streams = find(graph)
    if isinstance(streams, str):
        reads_ids = any(not value.is_floating_point() for value in graph.inputs.values())
        raise Refused(
            what="no residual stream found",
            where=source,
            why=streams if reads_ids else f"{streams}; it reads no token ids: it is no language model",
            remedy="if the model does add sub-layer outputs to a stream, please report its architecture",
        )
    main, *others = (_Naming(model, stream).map(source) for stream in streams)
    whole = dataclasses.replace(main, streams=tuple(others))
    unread = not_read(model, graph)
    whole = dataclasses.replace(
        whole, entrances=whole.entrances or tuple(entrances_not_run(model, graph, whole, unread))
    )
    strayed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    if main.proven:
        strayed, unknown = compared(model, graph, streams, main, lambda stream: _Naming(model, stream).map(source))
    leaks = (*strayed, *main.leaks)
    found = dataclasses.replace(
        whole,
        unread=unread,
        uses=tuple(uses_of(model, streams, unread)),
        leaks=leaks,
        proven=not leaks,
        conditions=(*unknown, *parts_not_run(model, whole, unread)),
    )
    return Followed(streams, dataclasses.replace(found, towers=towers(model, streams, found)))


class _Naming:
    """Turns nodes into names: modules from the trace's call stack, layers from the model's lists of blocks."""

    def __init__(self, model: nn.Module, stream: Stream) -> None:
        self.model, self.stream, self.facts = model, stream, stream.facts
        self.copies = self._copies()
        self.kinds, self.sublayer = sublayers_of(stream)
        parameters = [parameter for term in stream.terms for _, parameter in term.projections]
        self.layers = layers(model, list(dict.fromkeys(parameters)))

    def map(self, source: str) -> ResidualMap:
        norms = self._norms()
        embeddings, odd = self._embeddings()
        projections = self._projections()
        leaks = (*self.stream.leaks, *odd)
        return ResidualMap(
            source=source,
            model_type=getattr(getattr(self.model, "config", None), "model_type", ""),
            architecture=type(self.model).__name__,
            width=self._width(),
            layers=len(set(self.layers.values())),
            sublayers=len(set(self.sublayer)),
            placement=self._placement(projections),
            proven=not leaks,
            leaks=leaks,
            reaches=self.stream.reaches,
            embeddings=embeddings,
            residual_projections=projections,
            norms=norms,
            entrances=tuple(self._entrances()),
            head=self._head(embeddings),
            matrices=self._matrices(),
            tied=tied(self.model),
        )

    def _width(self) -> int:
        """What a projection puts out: the stream may have its channels first, or end as two tracks side by side."""
        for term in self.stream.terms:
            for matmul, _ in term.projections:
                weight = matrix_weight(self.facts, matmul)
                size = fan(self.facts, matmul, weight) if weight is not None else None
                if size is not None or not self.facts.product(matmul):  # a sum with a bias, which lies along the width
                    return size.fan_out if size is not None else ops.last(matmul)
        return ops.last(self.stream.end)

    def _copies(self) -> set[Node]:
        """What carries this stream and no other: its own nodes, and those that they reach unmultiplied by a matrix."""
        copies = set(self.stream.spine)
        for node, through in self.facts.carries.items():
            if any(a in copies for a in through):
                copies.add(node)
        return copies

    def _behind_gains(self, node: Node) -> Node:
        """The norm or addition on the stream that ``node`` is, up to views, gains and biases."""
        while node not in self.facts.norm_at and node not in self.stream.additions:
            before = self.facts.carries.get(node, ())
            if len(before) != 1:
                break
            node = before[0]
        return node

    def _ends(self, node: Node) -> Iterator[Node]:
        """The additions of sub-layers, and the norms, that ``node`` is a sum of, with whatever factors."""
        todo, seen = [node], {node}
        for part in todo:
            if part in self.facts.norm_at or part in self.stream.additions:
                yield part
                continue
            fresh = [a for a in self.facts.carries.get(part, ()) if a not in seen]
            todo += fresh
            seen.update(fresh)

    def _layer(self, path: str) -> int | None:
        return next((i for block, i in self.layers.items() if path == block or path.startswith(block + ".")), None)

    def _projections(self) -> tuple[ResidualProjection, ...]:
        found: dict[str, ResidualProjection] = {}
        for term, kind, sublayer in zip(self.stream.terms, self.kinds, self.sublayer, strict=True):
            for matmul, parameter in term.projections:
                way = steps(self.facts, term.node, matmul)
                times = multiplier(self.facts, term, matmul, way, addition(self.stream, term))
                norms = (n for n in way if n in self.facts.norm_at)
                norm = next(norms, self.stream.divided.get(term.node))
                projection = ResidualProjection(
                    parameter=parameter,
                    layer=self._layer(parameter),
                    sublayer=sublayer,
                    kind=kind,
                    branch_norm=place(norm) if norm is not None else None,
                    multiplier=times,
                    between=between(self.stream, term, matmul, times),
                )
                first = found.setdefault(parameter, projection)
                if first.sublayer == sublayer and len(first.between) < len(projection.between):
                    found[parameter] = projection  # a way past a convolution tells less than the way through it
        return tuple(found.values())

    def _matrices(self) -> tuple[Matrix, ...]:
        found: dict[str, Matrix] = {}
        for term, kind, sublayer in zip(self.stream.terms, self.kinds, self.sublayer, strict=True):
            for node in sorted(term.interior, key=self.facts.order.__getitem__):
                weight, data = matrix_weight(self.facts, node), self.facts.data(node)
                size = fan(self.facts, node, weight) if weight is not None and len(data) == 1 else None
                if weight is not None and size is not None:
                    name = self.facts.weight[weight]
                    reads = self._reads_stream(data[0])
                    found.setdefault(name, Matrix(name, sublayer, kind, reads, *size))
        return tuple(found.values())

    def _reads_stream(self, node: Node) -> bool:
        """The node is a copy of the stream: normed, cast, gathered or scaled, but not multiplied by a matrix."""
        while node not in self.copies:
            if op(node) not in ops.VIEWS - _PARTS:
                return False
            node = operands(node)[0]
        return True

    def _norms(self) -> tuple[Norm, ...]:
        stream = self.stream
        features = {node for nodes in stream.entrances.values() for node in nodes}
        before = self.facts.behind([stream.start], stop=features) - self.facts.picking(self.facts.trace.output)
        region = set(stream.spine | stream.suffix | before)
        region.update(*(term.interior for term in stream.terms))
        found: dict[tuple[str, str], Norm] = {}
        for norm, role in self._roles([norm for node, norm in self.facts.norm_at.items() if node in region]):
            module = place(norm.output)
            layer = self._layer(module)
            found.setdefault((module, role), Norm(module, role, norm.kind, norm.eps, layer, *gain(self.facts, norm)))
        return tuple(found.values())

    def _roles(self, norms: list[NormNode]) -> Iterator[tuple[NormNode, NormRole]]:
        """Each norm's place: on the stream itself, behind it, on a sub-layer's output, at its input or inside it."""
        stream, order = self.stream, self.facts.order
        products = [(term.node, matmul) for term in stream.terms for matmul, _ in term.projections]
        on_branch = {n for node, matmul in products for n in steps(self.facts, node, matmul)} - {m for _, m in products}
        terms = zip(stream.terms, self.kinds, strict=True)
        attention = {n for term, kind in terms if "attention" in kind for n in term.interior}
        start, last_addition = order[stream.start], max(order[n] for n in stream.additions)
        after_start = [n.output for n in norms if n.output in stream.spine and order[n.output] > start]
        for norm in norms:
            reads_stream = behind_views(norm.input) in stream.spine
            if norm.output in stream.spine and norm.output not in after_start:
                yield norm, "embedding"
            elif norm.output in stream.spine:
                yield norm, "final" if len(after_start) == 1 and order[norm.output] > last_addition else "post"
            elif norm.output in stream.suffix and reads_stream:
                yield norm, "final"
            elif norm.output in on_branch:
                yield norm, "branch"
            elif reads_stream:
                yield norm, "pre"
            else:
                yield norm, "qk" if norm.output in attention else "inner"

    def _placement(self, projections: tuple[ResidualProjection, ...]) -> Placement:
        terms = list(zip(self.stream.terms, self.sublayer, strict=True))
        points: dict[int, set[Node]] = {}
        for term, s in terms:
            points.setdefault(s, set()).add(behind_views(term.reads))
        norms = self.facts.norm_at
        stream = self.stream.spine
        reads_normed = {
            s for t, s in terms for n in t.interior if n in norms and behind_views(norms[n].input) in stream
        }
        ends = [set(self._ends(norm.input)) for output, norm in norms.items() if output in stream]
        normed = set[Node]().union(*ends)
        post = {s for t, s in terms if self._behind_gains(t.reads) in norms or addition(self.stream, t) in normed}
        each = ({s for t, s in terms if addition(self.stream, t) in end} for end in ends)
        behind = {s for own in each if len(own) == 1 for s in own}
        if len(behind) > 1 and behind >= {*self.sublayer}:
            return "post-norm"  # whatever else is normed, these make the stream's size
        found: set[Placement] = set()
        for projection in projections:
            s = projection.sublayer
            if projection.branch_norm is not None:
                found.add("branch-norm")
            elif s in reads_normed:
                shared = any(points[s] & points[other] for other in points if other != s)
                found.add("parallel" if shared else "pre-norm")
            else:
                found.add("post-norm" if s in post else "no-norm")
        return found.pop() if len(found) == 1 else "mixed"

    def _embeddings(self) -> tuple[tuple[Embedding, ...], tuple[str, ...]]:
        """The tables; and of which of them nobody can say what the model does to them."""
        try:
            measured = measure(self.facts.trace, self.stream, self._known())
        except (IndexError, RuntimeError, NotImplementedError) as error:
            if self.stream.leaks:  # what is wrong is known already
                return (), ()
            raise Refused(
                what="the embedding path cannot be run, so the factor that it applies is not known",
                where=type(self.model).__name__,
                why=first_line(error),
                remedy="please report the architecture",
            ) from error
        found: dict[str, Embedding] = {}
        odd: dict[str, None] = {}
        for table in self.stream.tables:
            parameter = self.facts.weight.get(table_of(table))
            if parameter is not None:  # None: a fixed table, such as sinusoidal positions kept in a buffer
                kind, scale, normed, known = measured[table]
                if not known:
                    odd[
                        f"{parameter}: what enters the stream is not in proportion to it, nor as large for any size"
                    ] = None
                module = place(table) if op(table) in ops.LOOKUPS else parameter.rpartition(".")[0]
                width = ops.last(table)
                found.setdefault(parameter, Embedding(module, parameter, kind, scale, normed, width))
        return tuple(found.values()), tuple(odd)

    def _known(self) -> dict[Node, torch.Tensor]:
        """Values of the learned factors on the embedding path; on the meta device, those that they begin with."""
        nodes = vectors(self.facts.trace, self.stream)
        values = {n: self.model.get_parameter(name).detach() for n, name in nodes.items()}
        fresh = own_values(self.model, [nodes[n] for n, value in values.items() if value.is_meta])
        values |= {n: fresh[nodes[n]] for n, value in values.items() if nodes[n] in fresh}
        return {n: value.float().cpu() for n, value in values.items() if not value.is_meta}

    def _entrances(self) -> Iterator[Entrance]:
        facts, order = self.facts, self.facts.order
        names = {id(value): name for name, value in facts.trace.example.items()}
        for node, features in self.stream.entrances.items():
            before = [t for t in self.stream.terms if any(order[add] < order[node] for add in t.node.users)]
            for feature in features:
                inputs = [names[id(facts.trace.inputs[i])] for i in facts.trace.inputs if i in facts.inputs[feature]]
                matmuls = projections(facts, feature)
                weights = {name: matmul for matmul, name in matmuls.items()}
                matmul = next(iter(weights.values())) if len(weights) == 1 else None
                weight = matrix_weight(facts, matmul) if matmul is not None else None
                size = fan(facts, matmul, weight) if matmul is not None and weight is not None else None
                yield Entrance(
                    inputs=tuple(inputs),
                    parameter=next(iter(weights)) if size is not None else None,
                    fan_in=size.fan_in if size is not None else 0,
                    normed=matmul is not None and any(n in facts.norm_at for n in steps(facts, feature, matmul)),
                    after=before[-1].projections[-1][1] if before else None,
                )

    def _head(self, embeddings: tuple[Embedding, ...]) -> Head | None:
        for node in sorted(self.stream.suffix, key=self.facts.order.__getitem__, reverse=True):
            weight = matrix_weight(self.facts, node)
            if weight is not None:
                name = self.facts.weight[weight]
                is_table = any(name == e.parameter for e in embeddings)
                return Head(own_name(self.model, name, place(node)), is_table)
        return None
