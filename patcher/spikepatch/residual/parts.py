"""The parts of a model of several modalities: towers, which compute features of images and sounds, and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.fx import Node

from spikepatch.residual import ops
from spikepatch.residual.facts import Facts
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.ops import op, operands
from spikepatch.residual.stream import Stream


def towers(model: nn.Module, streams: Iterable[Stream], found: ResidualMap) -> tuple[str, ...]:
    """The parameters and persistent buffers that compute features of images and sounds, and nothing else.

    Those are what features are computed from up to a tower's last sub-layer; a further stream that no token enters, as
    a speech model's encoder; and of a model that takes images or sounds, what the traced pass does not read. What comes
    behind a tower's last sub-layer, from the first matrix on, is the projector, which is no part of it.

    Args:
        found: its map, with ``uses`` and ``unread``.
    """
    main = next(iter(streams))
    without_tokens = {i for i, each in enumerate(found.streams, 1) if each.token_embedding is None}
    takes = getattr(model, "input_modalities", "text")
    several = {"text"} < {takes} if isinstance(takes, str) else {"text"} < {*takes}
    if not (found.entrances or without_tokens or several):
        return ()
    features = [node for nodes in main.entrances.values() for node in nodes]
    projector = {name for feature in features for name in _projector(main.facts, feature)}
    other: set[str] = set()
    for use in found.uses:
        own = use.role == "unread" or use.stream in without_tokens
        if not own and (use.role != "entrance" or use.parameter in projector):
            other.add(use.parameter)
    parameters = [name for name, _ in model.named_parameters() if name not in other]
    return (*parameters, *_buffers(model, set(parameters)))


def _projector(facts: Facts, feature: Node) -> Iterator[str]:
    """The parameters behind the last sub-layer of what computes ``feature``, from the first matrix on; without a
    sub-layer, all of them.
    """
    cone = facts.behind([feature])
    inside = cone
    if additions := [node for node in cone if _adds_a_sublayer(facts, node)]:
        tower = facts.behind(additions)
        inside = set()
        for node in sorted(cone - tower, key=facts.order.__getitem__):
            begins = facts.product(node) and any(a in facts.weight for a in operands(node))
            if node in facts.varies and (begins or any(a in inside for a in operands(node))):
                inside.add(node)
    of = facts.trace.parameters
    for node in inside:
        yield from (of[n] for n in facts.behind(a for a in operands(node) if a not in facts.varies) if n in of)


def _adds_a_sublayer(facts: Facts, node: Node) -> bool:
    """One of its summands is computed from the other through a weight."""
    if op(node) not in ops.ADDS or node not in facts.varies or len(facts.data(node)) < 2:
        return False
    skip, *branches = sorted(facts.data(node), key=facts.order.__getitem__)
    for branch in branches:
        between = facts.behind([branch], stop=[skip])
        if any(skip in operands(n) for n in between) and any(map(facts.product, between)):
            return True
    return False


def _buffers(model: nn.Module, parameters: set[str]) -> Iterator[str]:
    """Persistent buffers in modules whose parameters are all among these."""
    state = model.state_dict()
    for name, _ in model.named_buffers():
        path = name
        owned: list[str] = []
        while path and not owned:
            path = path.rpartition(".")[0]
            owned = [f"{path}.{own}" if path else own for own, _ in model.get_submodule(path).named_parameters()]
        if name in state and owned and parameters.issuperset(owned):
            yield name
