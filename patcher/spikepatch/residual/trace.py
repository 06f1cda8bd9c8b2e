"""An ``nn.Module`` becomes one flat fx graph, on the meta device: full width, no memory for weights."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from spikepatch.errors import first_line
from spikepatch.residual.dataflow import follow_data
from spikepatch.residual.example import Given, completed, example_of, given, offered
from spikepatch.residual.features import with_features
from spikepatch.residual.forms import check_forward, forms, not_traced
from spikepatch.residual.record import Recorder, record
from spikepatch.residual.recordable import on_cpu, prepared
from spikepatch.residual.told import Asked, Mode
from spikepatch.source.private import tree_leaves


@dataclass(frozen=True)
class Trace:
    """The dataflow of one forward pass.

    Attributes:
        graph: ATen calls in execution order. Regions that only switch gradients or autocast are inlined and in-place
            writes of whole tensors are redirected to their readers, so a node's value is what its readers see.
        parameters: placeholder -> name as ``named_parameters()`` gives it; tied parameters share one name.
        buffers: placeholder -> the buffer's real value, on the CPU.
        inputs: placeholder of each tensor argument of ``forward`` -> the example, on the CPU.
        output: the first tensor of the model's output: the logits, or the last hidden state.
        example: what it was run on, settings included.
        asked: what Python asked of values on the way, which the graph does not show.
    """

    graph: Graph
    parameters: Mapping[Node, str]
    buffers: Mapping[Node, torch.Tensor]
    inputs: Mapping[Node, torch.Tensor]
    output: Node
    example: Mapping[str, Any]
    asked: Asked


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """The garbage collector walks over a graph that is growing again and again, and finds nothing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def trace(model: nn.Module, example_inputs: Given = None) -> Trace:
    """Trace one forward pass of ``model``, whose weights may be anywhere: they are not read, and not changed.

    Args:
        model: any module; a transformers model needs no example.
        example_inputs: keyword arguments of ``forward``, as ``given`` takes them. Shapes and dtypes matter, values
            hardly.

    Raises:
        Refused: its forward pass does not run on them.
    """
    if example_inputs is not None:
        example = given(example_inputs, model)
        try:
            return recorded(model, example)
        except Exception as error:  # whatever a forward pass raises
            raise not_traced(model, f'on {" and ".join(example)} alone: "{first_line(error)}"') from error
    found = _first_that_runs(model)
    if _read(found) == len(found.parameters):
        return found
    more = full_example(model, found.example)
    return recorded(model, more) if more.keys() != found.example.keys() else found


def _first_that_runs(model: nn.Module) -> Trace:
    """The pass on a model's main input; where it does not run on that alone, on the first others that it runs on.

    Raises:
        Refused: there are none; with the words of the pass that came furthest.
    """
    first = example_of(model)
    check_forward(model)
    try:
        return recorded(model, first)
    except Exception as error:  # whatever a forward pass raises
        raised, words, furthest = error, [first_line(error)], 0
    twin, tried = prepared(model), {_shapes(first)}
    with _modules_run(twin) as run:
        for example in _others(model, first):
            if _shapes(example) in tried:
                continue
            run.clear()
            tried.add(_shapes(example))
            try:
                record(twin, example)
                return recorded(model, example)
            except Exception as error:
                if len(run) > furthest:
                    furthest, words[1:] = len(run), [f"{' and '.join(example)}: {first_line(error)}"]
    count = f"{len(tried) - 1} other form{'s' * (len(tried) > 2)} of inputs"
    others = (
        f', nor on {count}; the furthest ends so: "{words[1]}"' if words[1:] else f", nor on {count}" * (len(tried) > 1)
    )
    raise not_traced(model, f'on {" and ".join(first)} as made up from its config: "{words[0]}"{others}') from raised


def _others(model: nn.Module, first: Mapping[str, torch.Tensor]) -> Iterator[Mapping[str, torch.Tensor]]:
    more = completed(model, first)
    if more.keys() != first.keys():
        yield more
    if "input_ids" in more and "input_ids" not in first:  # features take places in a text
        yield from with_features(model, {"input_ids": more["input_ids"]})
    yield from forms(model)


def _shapes(example: Mapping[str, torch.Tensor]) -> frozenset[tuple[str, torch.Size]]:
    return frozenset((name, tensor.shape) for name, tensor in example.items())


@contextlib.contextmanager
def _modules_run(model: nn.Module) -> Iterator[list[str]]:
    """The modules of ``model`` whose forward has begun since the list was last emptied."""
    begun: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: begun.append(name))
        for name, module in model.named_modules()
    ]
    try:
        yield begun
    finally:
        for hook in hooks:
            hook.remove()


def full_example(model: nn.Module, runs: Mapping[str, torch.Tensor] | None = None) -> Mapping[str, torch.Tensor]:
    """``example_of``, with those further inputs by which the model reads more of its parameters: images and sounds,
    states of an encoder or of an image that some layers wait for, and types of tokens.

    Args:
        runs: inputs that the model runs on; found, if they are not known.
    """
    example = first = example_of(model)
    count, best = sum(1 for _ in model.parameters()), -1
    for tried in [first, *with_features(model, first)]:
        with contextlib.suppress(Exception):  # whatever a forward pass raises
            if best < count and (read := _read(recorded(model, tried))) > best:
                best, example = read, tried
    if best < 0:  # it does not run on these
        example = dict(_first_that_runs(model).example if runs is None else runs)
    for name, value in offered(model, example).items():
        with contextlib.suppress(Exception):
            tried = {**example, name: value}
            if best < count and (read := _read(recorded(model, tried))) > best:
                best, example = read, tried
    return example


def _read(traced: Trace) -> int:
    """How many parameters the output depends on."""
    return len(_behind(traced.output) & traced.parameters.keys())


def _output(recorder: Recorder, result: Any) -> torch.Tensor:
    """The first tensor of floats in what a model returns, a single number such as a loss only where there is no other.
    In an object whose fields have no order that says anything, the first of those that depend on the most before them.
    """
    floats = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    floats = [t for t in floats if t.numel() > 1 or t.ndim > 1] or floats  # one image against one text is (1, 1)
    if not floats:
        fields = [value for leaf in tree_leaves(result) for value in getattr(leaf, "__dict__", {}).values()]
        floats = [t for t in tree_leaves(fields) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        floats = sorted(floats, key=lambda t: -len(_behind(recorder.node(t))))
    if not floats:
        raise TypeError(f"it returns no tensor of floats, but a {type(result).__name__}")
    return floats[0]


def _behind(output: Node) -> set[Node]:
    seen: set[Node] = set()
    todo = [output]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return seen


@without_collector()
def recorded(model: nn.Module, example: Mapping[str, Any], mode: Mode = "example", most: float = math.inf) -> Trace:
    """Trace ``model`` by running it once on the meta device, see ``record.py``; it raises what its forward raises.

    Args:
        mode: how questions about values are answered.
        most: calls; a pass that makes more ends in a RuntimeError.
    """
    twin = prepared(model)
    example = {name: on_cpu(t) if isinstance(t, torch.Tensor) else t for name, t in example.items()}
    parameters = dict(twin.named_parameters())  # the run may replace them, and write into the others
    buffers = {name: (buffer, model.get_buffer(name).detach()) for name, buffer in twin.named_buffers()}
    recorder, result = record(twin, example, mode, most)
    output = _output(recorder, result)
    recorder.graph.output(recorder.node(output))
    # A table of fixed positions that a longer input needs anew, made of no weight, is that parameter still.
    anew = {n: p for n, p in twin.named_parameters() if p is not parameters.get(n) and not p.is_meta}
    inputs = {recorder.inputs[name]: t for name, t in example.items() if isinstance(t, torch.Tensor)}
    follow_data(recorder.graph, inputs)
    return Trace(
        graph=recorder.graph,
        parameters={recorder.given(p): name for name, p in (*parameters.items(), *anew.items())},
        buffers={recorder.given(b): v if v.is_meta else v.cpu() for b, v in buffers.values()} | recorder.constants,
        inputs=inputs,
        output=recorder.node(output),
        example=example,
        asked=recorder.asked,
    )
