"""What each ATen op does to the residual stream: the tables that the analysis in ``stream.py`` is driven by.

An op missing from every table is opaque: it ends the residual sum, is never zero, and depends on all its arguments.
That is the safe direction: the proof can only fail for it, never succeed wrongly.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from spikepatch.source.private import schema

# Same values, rearranged or re-typed (or a subset of them): the first argument seen through.
VIEWS = frozenset(
    "view reshape _unsafe_view view_as transpose permute t movedim contiguous clone to _to_copy type_as alias detach"
    " lift_fresh_copy expand expand_as unsqueeze squeeze flatten unflatten select slice narrow getitem split"
    " split_with_sizes chunk unbind index index_select gather repeat repeat_interleave dropout native_dropout"
    " constant_pad_nd pad roll flip numpy_T mT".split()
)
# Of these, the ones whose result has memory of its own.
COPIES = frozenset(
    "clone _to_copy lift_fresh_copy index index_select gather repeat repeat_interleave native_dropout"
    " constant_pad_nd pad roll flip".split()
)
# Of these, the ones that give the same values another shape or place: how many there are hangs on the number of rows.
RESHAPES = frozenset("view reshape _unsafe_view expand clone".split())
# Averages over windows of neighbouring values.
POOLS = frozenset("avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d".split())
# Homogeneous linear in the first argument alone.
LINEAR_FIRST = VIEWS | POOLS | frozenset("neg sum mean cumsum tril triu".split())
ADDS = frozenset("add sub rsub".split())
# Linear in all tensor arguments taken together: zero when all are.
JOINS = ADDS | frozenset(
    "cat stack index_add index_put index_copy scatter scatter_add scatter_reduce select_scatter slice_scatter"
    " copy lerp where overwritten".split()
)
PRODUCTS = frozenset(["mul", "div"])
# f(0) = 0, not linear.
ZERO_AT_ZERO = frozenset(
    "relu relu6 leaky_relu gelu silu mish tanh sin tan sinh asinh atan erf abs square sqrt expm1 log1p softsign sign"
    " hardswish elu selu celu hardtanh masked_fill topk sort".split()
)
MATMULS = frozenset(
    "linear addmm mm matmul bmm baddbmm mv dot einsum _grouped_mm grouped_mm grouped_mm_fallback".split()
)
CONVOLUTIONS = frozenset("conv1d conv2d conv3d convolution conv_transpose1d".split())
# Polynomials of all tensor arguments taken together.
POLYNOMIAL = (LINEAR_FIRST | JOINS | MATMULS | CONVOLUTIONS | {"mul", "square"}) - {"scatter_reduce"}
# They read their second tensor's shape or dtype only.
LIKE_SECOND = frozenset("type_as view_as expand_as".split())
# Rows of the first tensor are replaced by other values.
REPLACED_ROWS = frozenset("index_put index_copy masked_scatter".split())
# What is left of a write in place into a view.
PARTLY_WRITTEN = frozenset("copy select_scatter slice_scatter overwritten".split())
# Some rows of one tensor, and others of another one.
PUT_TOGETHER = REPLACED_ROWS | frozenset("where cat scatter select_scatter slice_scatter".split())
NORMS = frozenset("layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm native_group_norm".split())
FUSED_ATTENTION = frozenset(
    "scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention"
    " flex_attention".split()
)
SOFTMAX = frozenset(["softmax", "_softmax", "_safe_softmax"])
# Recurrences along the tokens.
SCANS = frozenset(["associative_scan", "scan", "cumprod"])
LOOKUPS = frozenset(["embedding", "embedding_bag"])
ZERO_FACTORIES = frozenset("zeros zeros_like new_zeros".split())
# They take a tensor for its shape and dtype alone.
FACTORIES = ZERO_FACTORIES | frozenset("ones_like empty_like full_like new_ones new_empty new_full".split())


_ALIASES = {
    "concat": "cat",
    "concatenate": "cat",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
}


def op(node: object) -> str:
    """The op's bare name: ``aten.add_.Tensor`` -> ``add``; empty for anything that is not a call."""
    if not isinstance(node, Node) or node.op != "call_function":
        return ""
    found = _NAMES.get(id(node.target))
    return found[1] if found is not None else op_name(node.target)


def op_name(target: object) -> str:
    """The bare name of what a node calls."""
    found = _NAMES.get(id(target))
    if found is None:
        found = _NAMES[id(target)] = (target, "getitem" if target is operator.getitem else _name(target))
    return found[1]


#: id of a target -> it, so that the id stays its own, and its name. (An ATen operation's own hash is Python code.)
_NAMES: dict[int, tuple[object, str]] = {}


def _name(target: object) -> str:
    packet = getattr(target, "overloadpacket", target)
    name = str(getattr(packet, "__name__", packet))
    name = name.rstrip("_") if not name.startswith("__") else name.strip("_")
    return _ALIASES.get(name, name)


def shape(node: object) -> tuple[int, ...]:
    """Shape of the node's value; ``()`` for numbers, tuples and anything else without one."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def last(node: object) -> int:
    """Length of the last axis; 0 for a scalar."""
    s = shape(node)
    return s[-1] if s else 0


def place(node: Node) -> str:
    """Path of the innermost module whose forward made the node; empty at the top."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def squares(node: Node) -> bool:
    """A product of a value with itself, which is one operand."""
    return op(node) == "mul" and len(operands(node)) == 1 and len([a for a in node.args if isinstance(a, Node)]) == 2


def writes(node: Node) -> bool:
    """It changes its first argument in place."""
    of_op = schema(node.target)
    return of_op is not None and bool(of_op.is_mutable)


def operands(node: Node) -> list[Node]:
    """The graph nodes among the arguments, in order, lists included."""
    return node.all_input_nodes


def argument(node: Node, name: str) -> object:
    """The value of the op's argument that its schema calls ``name``; None if it has none, or it was not given."""
    if name in node.kwargs:
        return node.kwargs[name]
    of_op = schema(node.target)
    names = [a.name for a in of_op.arguments] if of_op is not None else []
    position = names.index(name) if name in names else len(node.args)
    return node.args[position] if position < len(node.args) else None


def table_of(node: Node) -> Node:
    """The table that a lookup reads; rows that enter without a lookup are their own."""
    return operands(node)[0] if op(node) in LOOKUPS else node


def behind_views(node: Node) -> Node:
    """The node that ``node`` is a view of, or itself."""
    while op(node) in VIEWS:
        node = operands(node)[0]
    return node
