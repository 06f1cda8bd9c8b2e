"""An ``nn.Module`` becomes one flat fx graph, on the meta device: full width, no memory for weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, Node

from spikepatch.errors import Refused
from spikepatch.quiet import quiet

#: Token positions in the traced example: more than one, and unlike the usual head counts and widths.
TOKENS = 11


@dataclass(frozen=True)
class Trace:
    """The dataflow of one forward pass.

    Attributes:
        graph: ATen calls in execution order. Regions that only switch gradients or autocast are inlined and in-place
            writes of whole tensors are redirected to their readers, so a node's value is what its readers see.
        parameters: placeholder -> name as ``named_parameters()`` gives it; tied parameters share one name.
        buffers: placeholder -> the buffer's real value, on the CPU.
        inputs: placeholder of each tensor argument of ``forward`` -> the integer example, on the CPU.
        output: the first tensor of the model's output: the logits, or the last hidden state.
    """

    graph: Graph
    parameters: Mapping[Node, str]
    buffers: Mapping[Node, torch.Tensor]
    inputs: Mapping[Node, torch.Tensor]
    output: Node


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with every tensor on the meta device, in eval mode; ``model`` itself is not touched."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    twin: nn.Module = copy.deepcopy(model, memo)
    return twin.eval()


def trace(model: nn.Module, example_inputs: Mapping[str, torch.Tensor] | None = None) -> Trace:
    """Trace one forward pass of ``model``, whose weights may be anywhere: they are not read, and not changed.

    Args:
        model: any module; a transformers model needs no example.
        example_inputs: keyword arguments of ``forward``. Shapes and dtypes matter, values hardly.

    Raises:
        Refused: ``torch.export`` cannot follow the forward pass.
    """
    twin = skeleton(model)
    example = dict(example_inputs) if example_inputs is not None else _language_model_inputs(twin)
    _prefer_traceable_kernels(twin)
    with quiet():
        try:
            program = torch.export.export(twin, (), {k: v.to("meta") for k, v in example.items()}, strict=False)
        except Exception as error:
            raise Refused(
                what="the forward pass cannot be traced, so its residual stream cannot be found",
                where=type(model).__name__,
                why=f"torch.export stopped: {str(error).strip().splitlines()[0] if str(error) else type(error)}",
                remedy="check that the model runs on integer token ids without data-dependent Python branches",
            ) from error
    return _flat(program, model, twin, example)


def _language_model_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(5, 5 + TOKENS).unsqueeze(0)  # (batch, tokens)
    config = getattr(model, "config", None)
    if config is None:
        raise Refused(
            what="no example inputs for a plain module",
            where=type(model).__name__,
            why="only a transformers model tells by its config what its forward takes",
            remedy="pass example_inputs={'name of the argument': tensor}",
        )
    example = {getattr(model, "main_input_name", "input_ids"): ids}
    if getattr(config, "is_encoder_decoder", False):
        example["decoder_input_ids"] = ids.clone()
    return example


def _prefer_traceable_kernels(model: nn.Module) -> None:
    """On the meta twin only: no cache, fused attention, and experts as grouped matmuls (no loop over data)."""
    config = getattr(model, "config", None)
    if config is None:
        return
    if hasattr(config, "use_cache"):
        config.use_cache = False
    choices: tuple[str, ...]
    for method, choices in (
        ("set_attn_implementation", ("sdpa", "eager")),
        ("set_experts_implementation", ("grouped_mm",)),
    ):
        setter = getattr(model, method, None)
        if setter is None:
            continue
        for choice in choices:
            with contextlib.suppress(ValueError), quiet():
                setter(choice)
                break


def _flat(
    program: torch.export.ExportedProgram, model: nn.Module, twin: nn.Module, example: dict[str, torch.Tensor]
) -> Trace:
    graph = Graph()
    copies: dict[Node, Node] = {}
    result = _inline(program.graph_module, graph, copies)
    _redirect_writes(graph)

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
            buffers[node] = program.constants[str(spec.target)]
        elif spec.kind == InputKind.USER_INPUT and isinstance(node.meta.get("val"), torch.Tensor):
            inputs[node] = next(tensors)
    position = next(i for i, s in enumerate(program.graph_signature.output_specs) if s.kind == OutputKind.USER_OUTPUT)
    output = result[position]
    graph.output(output)
    return Trace(graph, parameters, buffers, inputs, output)


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


def _redirect_writes(graph: Graph) -> None:
    """After an in-place op, readers of the written tensor read the op's result."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or not node.args or not isinstance(node.args[0], Node):
            continue
        written, position = node.args[0], order[node]
        for user in [user for user in written.users if order[user] > position]:
            user.replace_input_with(written, node)
