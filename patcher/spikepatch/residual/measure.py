"""What the embedding path really does, measured: the part of the traced graph from the lookups to the first point of
the stream is run on real numbers, at full width, so a factor is found whatever config key, buffer or code applies it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from spikepatch.residual.ops import op, operands, shape
from spikepatch.residual.stream import Stream
from spikepatch.residual.trace import Trace

#: Rows of each stand-in table: the example's ids are below 64, and learned positions start at small offsets.
ROWS = 4096


@dataclass(frozen=True)
class Measured:
    """``kind`` from how the row numbers move; ``scale`` and ``normed`` as in ``residual.map.Embedding``."""

    kind: str
    scale: float
    normed: bool


def measure(trace: Trace, stream: Stream) -> dict[Node, Measured]:
    """Run the embedding path of ``stream`` once per table and case; float32, on the CPU.

    Linear in the table: f(2 E) = 2 f(E) once the constant part f(0) is subtracted. A norm on the way breaks that.
    """
    ids = [dict.fromkeys(trace.inputs, seed) for seed in (0, 1)]
    result: dict[Node, Measured] = {}
    for lookup in stream.lookups:
        first, second = (_rows(trace, lookup, seeds) for seeds in ids)
        moves = bool((first != first.flatten()[0]).any())
        kind = "token" if not torch.equal(first, second) else "position" if moves else "type"
        silent = _start(trace, stream, lookup, 0.0)
        once = _start(trace, stream, lookup, 1.0) - silent
        twice = _start(trace, stream, lookup, 2.0) - silent
        linear = torch.allclose(twice, 2 * once, rtol=1e-3, atol=1e-3 * float(once.abs().max()))
        table = _table(trace, lookup, 1.0)
        looked_up = table[first.flatten()]
        scale = float(once.std() / looked_up.std()) if linear else 1.0
        result[lookup] = Measured(kind, float(f"{scale:.6g}"), not linear)
    return result


def _rows(trace: Trace, lookup: Node, seeds: Mapping[Node, int]) -> torch.Tensor:
    ids: torch.Tensor = run(trace, [operands(lookup)[1]], {}, seeds)[operands(lookup)[1]]
    return ids


def _table(trace: Trace, lookup: Node, factor: float) -> torch.Tensor:
    rows, width = shape(operands(lookup)[0])
    generator = torch.Generator().manual_seed(0)
    return factor * torch.randn(max(64, min(rows, ROWS)), width, generator=generator)


def _start(trace: Trace, stream: Stream, lookup: Node, factor: float) -> torch.Tensor:
    """The first point of the stream, with this lookup's table random and every other table zero."""
    values = {operands(other)[0]: _table(trace, other, factor if other is lookup else 0.0) for other in stream.lookups}
    result = run(trace, [stream.start], values, dict.fromkeys(trace.inputs, 0))[stream.start]
    assert isinstance(result, torch.Tensor)
    return result.float()


def run(
    trace: Trace, wanted: list[Node], values: Mapping[Node, torch.Tensor], seeds: Mapping[Node, int]
) -> dict[Node, Any]:
    """Execute the graph up to ``wanted``, on the CPU; parameters not in ``values`` are ones (gains, biases: zero)."""
    needed: set[Node] = set()
    todo = list(wanted)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo.extend(operands(node) if node not in values else ())
    results: dict[Node, Any] = {}
    for node in trace.graph.nodes:
        if node not in needed:
            continue
        if node in values:
            results[node] = values[node]
        elif node in trace.buffers:
            buffer = trace.buffers[node].cpu()
            results[node] = buffer.float() if buffer.is_floating_point() else buffer
        elif node in trace.inputs:
            results[node] = _input(trace.inputs[node], seeds[node])
        elif node in trace.parameters:
            results[node] = torch.ones(shape(node))
        elif op(node):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: results[n])
            if op(node) != "assert_tensor_metadata":
                results[node] = _call(node, [_exact(a) for a in args], {k: _exact(v) for k, v in kwargs.items()})
    return {node: results[node] for node in wanted}


def _exact(argument: Any) -> Any:
    """On the CPU and in float32, whatever the model's device and precision: a factor is not to be rounded."""
    if isinstance(argument, torch.device):
        return torch.device("cpu")
    reduced = isinstance(argument, torch.dtype) and argument in {torch.bfloat16, torch.float16}
    return torch.float32 if reduced else argument


def _call(node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if node.target is operator.getitem:
        return args[0][args[1]]
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _input(example: torch.Tensor, seed: int) -> torch.Tensor:
    if example.is_floating_point():
        return example
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 64, example.shape, generator=generator, dtype=example.dtype)
