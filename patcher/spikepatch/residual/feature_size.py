"""How large is what the last matrix before an entrance of features reads: measured on a run, with fresh weights where
none are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from spikepatch.quiet import quiet
from spikepatch.residual.example import Given
from spikepatch.residual.execute import run
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.stream import Stream, find, projections
from spikepatch.residual.trace import Trace, trace
from spikepatch.residual.weights import matrix_weight
from spikepatch.source.formats import fits_in_memory
from spikepatch.source.meta import skeleton
from spikepatch.source.private import unmark_initialised

Learned = Callable[[str], torch.Tensor | None]


def feature_sizes(model: nn.Module, example_inputs: Given, learned: Learned) -> dict[str, float]:
    """Root mean square of what each such matrix reads, by its name; those that cannot be run are left out.

    What computes the features is run on the CPU in float32, with real weights from the architecture's own initialiser
    and drawn images or sounds. Of all other weights nothing is made. The seed is fixed: the size is a property of the
    architecture, and other draws give another one by the sampling error of a wide layer.

    Args:
        learned: a function from a parameter's name to the value that is kept, in float32; None where it is drawn.
    """
    graph = trace(model, example_inputs)
    streams = find(graph)
    found: dict[str, float] = {}
    for stream in () if isinstance(streams, str) else streams:
        for feature in (node for nodes in stream.entrances.values() for node in nodes):
            for matmul, name in projections(stream.facts, feature).items():
                size = _size(model, graph, stream, matmul, learned)
                if size is not None:
                    found[name] = size
    return found


def measured(model: nn.Module, residual: ResidualMap, example_inputs: Given = None) -> ResidualMap:
    """The map with the ``size`` of each entrance: of features that fresh weights compute. It is the stream's size at
    their positions, or, behind the start, of what is added there.
    """
    graph = trace(model, example_inputs)
    streams = find(graph)
    if isinstance(streams, str) or not streams[0].entrances:  # none, or those of a pass that was not traced
        return residual
    features = (node for nodes in streams[0].entrances.values() for node in nodes)
    sizes = [_run(model, graph, streams[0], feature, lambda _: None) for feature in features]
    entrances = [dataclasses.replace(e, size=size) for e, size in zip(residual.entrances, sizes, strict=True)]
    return dataclasses.replace(residual, entrances=tuple(entrances))


def _size(model: nn.Module, graph: Trace, stream: Stream, matmul: torch.fx.Node, learned: Learned) -> float | None:
    weight = matrix_weight(stream.facts, matmul)
    reads = next((a for a in stream.facts.data(matmul) if a is not weight), None)
    return _run(model, graph, stream, reads, learned) if reads is not None else None


def _run(model: nn.Module, graph: Trace, stream: Stream, wanted: torch.fx.Node, learned: Learned) -> float | None:
    """Root mean square of a node that features are computed by; None where it cannot be run, or not in memory."""
    cone = stream.facts.behind([wanted])
    names = {graph.parameters[node] for node in cone if node in graph.parameters}
    if not fits_in_memory(4 * sum(model.get_parameter(name).numel() for name in names)):
        return None
    kept = {name: value for name in names if (value := learned(name)) is not None}
    own = own_values(model, names - kept.keys()) | kept
    values = {node: own[name] for node, name in graph.parameters.items() if name in own}
    values |= {node: value for node, value in graph.inputs.items() if not value.is_floating_point()}
    try:
        result = run(graph, [wanted], values, dict.fromkeys(graph.inputs, 0))[wanted]
    except (IndexError, RuntimeError, NotImplementedError):  # an operation that the CPU lacks
        return None
    size = float(result.float().square().mean().sqrt())
    return size if size > 0 else None


def own_values(model: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """What the architecture's own initialiser makes of these parameters, as far as it writes them; in float32.

    A gain may stand beside a table of gigabytes: only what is asked for gets memory, unless others of its module are
    needed for it.
    """
    if not names:
        return {}
    try:
        return _made(model, names, names)
    except RuntimeError:  # it is made of what has no values
        modules = {name.rpartition(".")[0] for name in names}
        return _made(model, names, [n for n, _ in model.named_parameters() if n.rpartition(".")[0] in modules])


def _made(model: nn.Module, names: Collection[str], held: Collection[str]) -> dict[str, torch.Tensor]:
    """The same; ``held`` have memory while it runs."""
    twin: Any = skeleton(model).float()
    for module in twin.modules():
        unmark_initialised(module)
    for name in held:
        path, _, leaf = name.rpartition(".")
        empty = torch.full_like(twin.get_parameter(name), float("nan"), device="cpu")
        twin.get_submodule(path).register_parameter(leaf, nn.Parameter(empty))
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if hasattr(twin, "initialize_weights"):
            twin.initialize_weights()
        else:
            for module in twin.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
    made = {name: twin.get_parameter(name).detach() for name in names}
    return {name: value for name, value in made.items() if not value.isnan().any()}
