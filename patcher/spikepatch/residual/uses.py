"""Every use of every parameter, and what the traced pass did not run: parts of the blocks, and features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

from torch import nn
from torch.fx import Node

from spikepatch.residual.map import Entrance, ResidualMap, Use, UseRole
from spikepatch.residual.names import layers
from spikepatch.residual.ops import operands
from spikepatch.residual.stream import Stream
from spikepatch.residual.trace import Trace


def not_read(model: nn.Module, graph: Trace) -> tuple[str, ...]:
    """Parameters that the output does not depend on in this pass."""
    read: set[Node] = set()
    todo = [graph.output]
    while todo:
        node = todo.pop()
        if node not in read:
            read.add(node)
            todo.extend(operands(node))
    names = {graph.parameters[node] for node in read if node in graph.parameters}
    return tuple(name for name, _ in model.named_parameters() if name not in names)


def entrances_not_run(
    model: nn.Module, graph: Trace, found: ResidualMap, unread: tuple[str, ...]
) -> Iterator[Entrance]:
    """Of a transformers model that says that it takes images or sounds, and read none in this pass."""
    takes = getattr(model, "input_modalities", "text")
    others = [each for each in ([takes] if isinstance(takes, str) else takes) if each not in {"text", "video"}]
    read = any(value.is_floating_point() for value in graph.inputs.values())
    lists = _lists_of_blocks(model, found)
    towers = [name for name in unread if not name.startswith(lists) and model.get_parameter(name).ndim > 1]
    if others and not read and towers:
        yield Entrance(tuple(others), None, 0, normed=False, after=None)


def _lists_of_blocks(model: nn.Module, found: ResidualMap) -> tuple[str, ...]:
    """The paths of the lists that hold the streams' blocks, each with a dot behind it."""
    projections = [p.parameter for each in (found, *found.streams) for p in each.residual_projections]
    blocks = layers(model, list(dict.fromkeys(projections)))
    return tuple(dict.fromkeys(f"{block.rpartition('.')[0]}." for block in blocks))


def parts_not_run(model: nn.Module, found: ResidualMap, unread: tuple[str, ...]) -> Iterator[str]:
    """Parts of the model's blocks that this pass did not run: their sub-layers are not in the map."""
    lists = _lists_of_blocks(model, found)
    parts: dict[str, None] = {}
    for name in unread:
        if model.get_parameter(name).ndim > 1 and name.startswith(lists):
            parts[name.rpartition(".")[0]] = None
    if parts:
        names = [*parts]
        more = f" and {len(names) - 3} more" if names[3:] else ""
        yield (f"{', '.join(names[:3])}{more}: never read in this pass, so what they do to the stream is not known")


def uses_of(model: nn.Module, streams: Iterable[Stream], unread: Iterable[str]) -> Iterator[Use]:
    """Every use of every parameter, stream by stream, in the model's own order; ``unread`` ones last."""
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    for i, stream in enumerate(streams):
        facts = stream.facts
        inside = {n for term in stream.terms for n in term.interior}
        constants = [a for n in stream.spine for a in operands(n) if a not in facts.varies]
        norms = [facts.norm_at[n] for n in stream.spine if n in facts.norm_at]
        constants += [norm.factor for norm in norms if norm.factor is not None]
        features = {node for nodes in stream.entrances.values() for node in nodes}
        picking = facts.picking(facts.trace.output)
        early = facts.behind([stream.start, *stream.later], stop=features) - picking
        projections = {name for term in stream.terms for _, name in term.projections}
        nodes: tuple[tuple[UseRole, Set[Node]], ...] = (
            ("embedding", early),
            ("entrance", facts.behind(features) | picking),
            ("stream", facts.behind(constants) - early),
            ("sublayer", inside),
            ("head", stream.suffix),
        )
        of = facts.trace.parameters
        roles: dict[UseRole, set[str]] = {role: {of[n] for n in found if n in of} for role, found in nodes}
        roles = {**roles, "projection": projections, "sublayer": roles["sublayer"] - projections}
        for role, names in roles.items():
            yield from (Use(name, i, role) for name in sorted(names, key=order.__getitem__))
    yield from (Use(name, 0, "unread") for name in unread)
