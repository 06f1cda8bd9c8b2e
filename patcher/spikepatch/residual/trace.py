"""An ``nn.Module`` becomes one flat fx graph, on the meta device: full width, no memory for weights."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from spikepatch.errors import Refused, first_line
from spikepatch.quiet import quiet
from spikepatch.residual.dataflow import follow_data
from spikepatch.residual.example import Given, example_of, given, offered
from spikepatch.residual.record import record
from spikepatch.source.meta import skeleton
from spikepatch.source.private import own_buffers, replaced_here, tree_leaves


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
        whole: no branch and no shape was chosen by what the input holds, and every buffer has a value.
        branches: the lines of the model's code where what the input holds chose the way.
        other: the pass with all of these gone the other way; None where there are none, or it does not run.
    """

    graph: Graph
    parameters: Mapping[Node, str]
    buffers: Mapping[Node, torch.Tensor]
    inputs: Mapping[Node, torch.Tensor]
    output: Node
    whole: bool
    branches: tuple[str, ...] = ()
    other: Trace | None = None


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Export without stack traces of the nodes, without walks of the garbage collector, and without Python code for
    graphs that nobody calls.
    """
    config: Any = torch.fx.config
    traces = getattr(config, "do_not_emit_stack_traces", False)
    config.do_not_emit_stack_traces = True
    try:
        with without_collector(), _code_on_demand():
            yield
    finally:
        config.do_not_emit_stack_traces = traces


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


@contextlib.contextmanager
def _code_on_demand() -> Iterator[None]:
    """A ``GraphModule`` that is made or changed meanwhile writes its graph as code and compiles that once it is called.

    By itself it does so after every change, six times for each export: a tenth of the time. For a function of thousands
    of lines, the compiler takes more memory than all of the graph, and torch keeps the text of each for ever.
    """

    def postpone(compile_now: Any, module: GraphModule) -> None:
        def forward(self: GraphModule, *args: Any, **kwargs: Any) -> Any:
            compile_now(self)
            return self(*args, **kwargs)

        type(module).forward = forward  # every GraphModule has a class of its own

    with replaced_here(GraphModule, "recompile", postpone):
        yield


def trace(model: nn.Module, example_inputs: Given = None, *, fused: bool = False) -> Trace:
    """Trace one forward pass of ``model``, whose weights may be anywhere: they are not read, and not changed.

    A recorded run takes a third of the time of ``torch.export``, which is asked where the input chose the way of that
    run; and where neither trace is whole, the recorded one is taken.

    Args:
        model: any module; a transformers model needs no example.
        example_inputs: keyword arguments of ``forward``, as ``given`` takes them. Shapes and dtypes matter, values
            hardly.
        fused: ask ``torch.export`` first: it keeps norms and attention as single operations, in a graph that is to be
            run.

    Raises:
        Refused: neither can follow the forward pass.
    """
    if example_inputs is not None:
        return _traced(model, given(example_inputs, model), fused=fused)
    example = example_of(model)
    found = _traced(model, example, fused=fused)
    if _read(found) == len(found.parameters) or not offered(model, example):
        return found
    more = full_example(model)
    return _traced(model, more, fused=fused) if more.keys() != example.keys() else found


def _traced(model: nn.Module, example: Mapping[str, torch.Tensor], *, fused: bool) -> Trace:
    found: dict[str, Trace] = {}
    failed: dict[str, Exception] = {}
    for tracer in (exported, recorded) if fused else (recorded, exported):
        name = tracer.__name__
        try:
            found[name] = tracer(model, example)
        except Exception as error:  # whatever a forward pass raises
            failed[name] = error
        else:
            if found[name].whole:
                return found[name]
    if not found:
        raise _untraceable(type(model).__name__, example, **failed) from failed["recorded"]
    if "recorded" not in found:
        return found["exported"]
    one_way = found["recorded"]
    with contextlib.suppress(Exception):  # whatever a forward pass raises
        return dataclasses.replace(one_way, other=recorded(model, example, other=True) if one_way.branches else None)
    return one_way


def _untraceable(name: str, example: Mapping[str, torch.Tensor], exported: Exception, recorded: Exception) -> Refused:
    what = "the forward pass cannot be traced, so its residual stream cannot be found"
    exporting, recording = first_line(exported), first_line(recorded)
    if exporting == recording:  # the model's own words
        return Refused(
            what=what,
            where=name,
            why=f'it does not run on {" and ".join(example)} alone: "{exporting}"',
            remedy="in Python, pass example_inputs={'name of the argument': tensor} with all that its forward needs",
        )
    return Refused(
        what=what,
        where=name,
        why=f'torch.export stopped: "{exporting}"; and a recorded run: "{recording}"',
        remedy="check that the model runs on integer token ids without branches on the data",
    )


def full_example(model: nn.Module) -> dict[str, torch.Tensor]:
    """``example_of``, with those further inputs of the forward's signature by which it reads more of the parameters:
    states of an encoder or of an image that some layers wait for, and types of tokens.
    """
    example = example_of(model)
    count, best = sum(1 for _ in model.parameters()), -1
    for name, value in {"": None, **offered(model, example)}.items():
        with contextlib.suppress(Exception):  # whatever a forward pass raises
            tried = {**example, name: value} if value is not None else example
            if best < count and (read := _read(recorded(model, tried))) > best:
                best, example = read, tried
    return example


def _read(traced: Trace) -> int:
    """How many parameters the output depends on."""
    seen: set[Node] = set()
    todo = [traced.output]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return len(seen & traced.parameters.keys())


def _prefer_traceable_kernels(model: nn.Module, experts: str) -> None:
    """On the meta twin only: no cache, fused attention, and experts as ``experts`` says."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        parts: tuple[Any, ...] = (config, getattr(config, "text_config", None))
        for part in parts:
            if getattr(part, "use_cache", False):
                part.use_cache = False
    choices: tuple[str, ...]
    for method, choices in (
        ("set_attn_implementation", ("sdpa", "eager")),
        ("set_experts_implementation", (experts,)),
    ):
        setter = getattr(model, method, None)
        if setter is None:
            continue
        for choice in choices:
            with contextlib.suppress(ValueError), quiet():
                setter(choice)
                break


def exported(model: nn.Module, example: Mapping[str, torch.Tensor]) -> Trace:
    """Trace ``model`` by ``torch.export``; it raises what that raises where it cannot follow the forward pass."""
    from torch.export import export  # 0.15 s, for a tracer that is seldom asked

    twin = skeleton(model)
    _prefer_traceable_kernels(twin, "grouped_mm")
    # On failure torch prints the graph so far, thousands of lines.
    with quiet(), contextlib.redirect_stderr(io.StringIO()), quick():
        program = export(twin, (), {k: v.to("meta") for k, v in example.items()}, strict=False)
    return _flat(program, model, twin, example)


def _flat(
    program: torch.export.ExportedProgram, model: nn.Module, twin: nn.Module, example: Mapping[str, torch.Tensor]
) -> Trace:
    from torch.export.graph_signature import InputKind, OutputKind

    graph = Graph()
    copies: dict[Node, Node] = {}
    result = _inline(program.graph_module, graph, copies)
    follow_data(graph)
    names = {id(parameter): name for name, parameter in twin.named_parameters()}
    values = dict(model.named_buffers(remove_duplicate=False))
    placeholder = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    parameters: dict[Node, str] = {}
    buffers: dict[Node, torch.Tensor] = {}
    inputs: dict[Node, torch.Tensor] = {}
    tensors = iter(example.values())
    for spec in program.graph_signature.input_specs:
        node = placeholder[spec.arg.name]
        if spec.kind == InputKind.PARAMETER:
            parameters[node] = names[id(twin.get_parameter(str(spec.target)))]
        elif spec.kind == InputKind.BUFFER:
            buffers[node] = values[str(spec.target)].detach()
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            buffers[node] = _attribute(model, str(spec.target), program.constants[str(spec.target)])
        elif spec.kind == InputKind.USER_INPUT and isinstance(node.meta.get("val"), torch.Tensor):
            inputs[node] = next(tensors)
    position = next(i for i, s in enumerate(program.graph_signature.output_specs) if s.kind == OutputKind.USER_OUTPUT)
    output = result[position]
    graph.output(output)
    # A number that the forward pass makes a tensor of has no value in a graph that was exported on meta.
    whole = not any(buffer.is_meta for buffer in buffers.values()) or any(b.is_meta for b in model.buffers())
    return Trace(graph, parameters, buffers, inputs, output, whole)


def _attribute(model: nn.Module, path: str, constant: torch.Tensor) -> torch.Tensor:
    """The value of a tensor that a module holds as a plain attribute; the traced ``constant`` if it is none."""
    owner, _, name = path.rpartition(".")
    value = vars(model.get_submodule(owner)).get(name)
    return value.detach() if isinstance(value, torch.Tensor) else constant


def _inline(module: torch.fx.GraphModule, graph: Graph, copies: dict[Node, Node]) -> list[Any]:
    """Copy ``module``'s graph to the end of ``graph``, entering the sub-graphs of higher-order ops that only wrap."""
    regions: dict[Node, list[Any]] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            returned = node.args[0]
            return [copies.get(n, n) for n in (returned if isinstance(returned, (tuple, list)) else (returned,))]
        body = next((a for a in node.args if isinstance(a, Node) and a.op == "get_attr" and _is_graph(module, a)), None)
        if node.op == "call_function" and body is not None:
            inner = getattr(module, str(body.target))
            arguments = node.args[node.args.index(body) + 1 :]
            holes = [n for n in inner.graph.nodes if n.op == "placeholder"]
            inside: dict[Node, Node] = {
                hole: copies[a] for hole, a in zip(holes, arguments, strict=False) if a in copies
            }
            regions[node] = _inline(inner, graph, inside)
        elif (node.op == "placeholder" and node in copies) or (node.op == "get_attr" and _is_graph(module, node)):
            continue
        elif node.op == "call_function" and node.args and node.args[0] in regions:  # getitem of a region's results
            copies[node] = regions[node.args[0]][node.args[1]]
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    raise AssertionError("an fx graph has an output")


def _is_graph(module: nn.Module, node: Node) -> bool:
    return isinstance(getattr(module, str(node.target), None), torch.fx.GraphModule)


@without_collector()
def recorded(model: nn.Module, example: Mapping[str, torch.Tensor] | None = None, *, other: bool = False) -> Trace:
    """Trace ``model`` by running it once on the meta device, see ``record.py``; it raises what its forward raises.

    ``other``: with all branches that values decide gone the other way.
    """
    twin = skeleton(model)
    example = {name: _on_cpu(t) for name, t in (example_of(twin) if example is None else example).items()}
    _prefer_traceable_kernels(twin, "batched_mm")  # no loop over the experts that data chose
    real: dict[int, torch.Tensor] = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        owner, _, own = name.rpartition(".")
        own_buffers(twin.get_submodule(owner))[own] = real.setdefault(id(buffer), _on_cpu(buffer))
    buffers = list(twin.buffers())  # the run may replace them
    with quiet(), torch.random.fork_rng(devices=[]):  # the run is real where it does not depend on weights
        recorder, result = record(twin, example, other=other)
    output = next(t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point())
    recorder.graph.output(recorder.node(output))
    follow_data(recorder.graph)
    return Trace(
        graph=recorder.graph,
        parameters={recorder.node(p): name for name, p in twin.named_parameters()},
        buffers={recorder.node(b): b for b in buffers} | recorder.constants,
        inputs={recorder.node(t): t for t in example.values()},
        output=recorder.node(output),
        whole=recorder.whole,
        branches=tuple(recorder.branches),
    )


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.is_meta else tensor.detach().cpu()
