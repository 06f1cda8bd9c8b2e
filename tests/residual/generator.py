# mypy: disable-error-code="no-any-return"
"""Architectures drawn at random, each with what is true of it. Nothing of spikepatch is imported here.

A model is built from a ``Spec``. Whenever it adds a sub-layer's output to its stream it calls ``Model.add``, which
counts; ``truth`` runs the model for real, in float64, and reads the counts. What a spec puts on the stream besides
decides whether the stream is a sum at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

D, VOCABULARY, TOKENS = 32, 50, 11

# Norms, in the notations that people use. w: gain, b: bias (of LayerNorms only).


def _ms(x: torch.Tensor) -> torch.Tensor:
    return x.pow(2).mean(-1, keepdim=True)


Notation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
RMS: dict[str, Notation] = {
    "gain last": lambda x, w, b: x * torch.rsqrt(_ms(x) + 1e-6) * w,
    "gain in front": lambda x, w, b: w * (x * torch.rsqrt(_ms(x) + 1e-6)),
    "gain first": lambda x, w, b: w * x * torch.rsqrt(_ms(x) + 1e-6),
    "gain first, divided": lambda x, w, b: w * x / torch.sqrt(_ms(x) + 1e-6),
    "gain on the statistic": lambda x, w, b: (w * torch.rsqrt(_ms(x) + 1e-6)) * x,
    "one plus gain": lambda x, w, b: (1 + w) * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6),
    "in float": lambda x, w, b: (x.float() * torch.rsqrt(_ms(x.float()) + 1e-6)).type_as(x) * w,
    "sum over d": lambda x, w, b: w * (x * ((x * x).sum(-1, keepdim=True) / D + 1e-6) ** -0.5),
    "by length": lambda x, w, b: F.normalize(x, dim=-1) * D**0.5 * w,
    "eps outside": lambda x, w, b: x / (x.norm(2, dim=-1, keepdim=True) * D**-0.5 + 1e-6) * w,
    "fused": lambda x, w, b: F.rms_norm(x, (D,), w, 1e-6),
    "reciprocal": lambda x, w, b: x * (_ms(x) + 1e-6).sqrt().reciprocal() * w,
    "clamped": lambda x, w, b: x / _ms(x).clamp(min=1e-6).sqrt() * w,
    "without eps": lambda x, w, b: x / x.norm(dim=-1, keepdim=True) * D**0.5 * w,
    "gain on the length": lambda x, w, b: F.normalize(x, dim=-1) * (w * D**0.5),
    "vector norm": lambda x, w, b: x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) / D**0.5 + 1e-6) * w,
    "by einsum": lambda x, w, b: x * torch.rsqrt(torch.einsum("btd,btd->bt", x, x)[..., None] / D + 1e-6) * w,
    "by a product": lambda x, w, b: x * torch.rsqrt((x[..., None, :] @ x[..., :, None])[..., 0] / D + 1e-6) * w,
    "by a row of ones": lambda x, w, b: x * torch.rsqrt((x * x) @ x.new_full((D, 1), 1 / D) + 1e-6) * w,
    "by logarithms": lambda x, w, b: x * torch.exp(-0.5 * torch.log(_ms(x) + 1e-6)) * w,
    "of sizes": lambda x, w, b: w * x / torch.sqrt(x.abs().pow(2).mean(-1, keepdim=True) + 1e-6),
    "flat": lambda x, w, b: (x.reshape(-1, D) * torch.rsqrt(_ms(x.reshape(-1, D)) + 1e-6) * w).view_as(x),
    "by the largest first": lambda x, w, b: _scaled(x / x.abs().amax(-1, keepdim=True)) * w,
    "multiplied and added": lambda x, w, b: torch.addcmul(torch.zeros_like(x), _scaled(x), w),
    "gain by einsum": lambda x, w, b: torch.einsum("btd,d->btd", _scaled(x), w),
}
LAYER: dict[str, Notation] = {
    "fused": lambda x, w, b: F.layer_norm(x, (D,), w, b),
    "variance": lambda x, w, b: (
        (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * w + b
    ),
    "annotated": lambda x, w, b: w * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + b,
    "deviation": lambda x, w, b: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) * w + b,
    "both moments": lambda x, w, b: _both(x) * w + b,
    "centred first": lambda x, w, b: _centred(x - x.mean(-1, keepdim=True)) * w + b,
    "native": lambda x, w, b: torch.native_layer_norm(x, (D,), w, b, 1e-5)[0],
    "fused, gain behind": lambda x, w, b: F.layer_norm(x, (D,)) * w + b,
    "one group": lambda x, w, b: F.group_norm(x.reshape(-1, D), 1, w, b).view_as(x),
    "centred, fused": lambda x, w, b: F.rms_norm(x - x.mean(-1, keepdim=True), (D,), w, 1e-5) + b,
    "by sums": lambda x, w, b: (x - x.sum(-1, keepdim=True) / D) / (x.var(-1, keepdim=True) + 1e-5).sqrt() * w + b,
    "by moments": lambda x, w, b: (
        (x - x.mean(-1, keepdim=True)) * torch.rsqrt(_ms(x) - x.mean(-1, keepdim=True) ** 2 + 1e-5) * w + b
    ),
    "by a centring matrix": lambda x, w, b: _centred(x @ (torch.eye(D, dtype=x.dtype) - 1 / D)) * w + b,
    "channels first": lambda x, w, b: _columns(x.mT, w[:, None], b[:, None]).mT,
    "multiplied and added": lambda x, w, b: torch.addcmul(b, _centred(x - x.mean(-1, keepdim=True)), w),
}


def _scaled(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(_ms(x) + 1e-6)


def _columns(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    deviation = torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5)
    return (x - x.mean(1, keepdim=True)) / deviation * w + b


def _both(x: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True, unbiased=False)
    return (x - mean) * torch.rsqrt(variance + 1e-5)


def _centred(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(_ms(x) + 1e-5)


NOTATIONS = (*(("rms", name) for name in RMS), *(("layer", name) for name in LAYER))


class Norm(nn.Module):
    def __init__(self, notation: tuple[str, str]) -> None:
        super().__init__()
        kind, name = notation
        self.weight = nn.Parameter(torch.ones(D))
        if kind == "layer":
            self.bias = nn.Parameter(torch.zeros(D))
        self.rule = RMS[name] if kind == "rms" else LAYER[name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rule(x, self.weight, getattr(self, "bias", self.weight))


# Sub-layers. ``out``: names of the weights whose products they return.


class Attention(nn.Module):
    out = ("o.weight",)

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, D, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Written(Attention):
    """Attention without the fused operation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = (q @ k.transpose(-1, -2)) * D**-0.5
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.o(scores.masked_fill(~mask, -1e9).softmax(-1) @ v)


class MLP(nn.Module):
    out = ("b.weight",)

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 2 * D, bias=bias), nn.Linear(2 * D, D, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.gelu(self.a(x)))


class Gated(MLP):
    def __init__(self, bias: bool) -> None:
        super().__init__(bias)
        self.g = nn.Linear(D, 2 * D, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.silu(self.g(x)) * self.a(x))


class Nested(MLP):
    """A residual connection of its own inside, behind a matrix."""

    def __init__(self, bias: bool) -> None:
        super().__init__(bias)
        self.c, self.d = nn.Linear(2 * D, D, bias=bias), nn.Linear(D, 2 * D, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(x))
        return self.b(h + self.d(torch.relu(self.c(h))))


class Dense(nn.Module):
    """A mixture of experts that runs them all."""

    out = ("down",)

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 4, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(4, D, 2 * D)), nn.Parameter(torch.randn(4, 2 * D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = self.gate(x).softmax(-1)
        inner = torch.relu(torch.einsum("btd,edh->bteh", x, self.up))
        return torch.einsum("bteh,ehd,bte->btd", inner, self.down, share)


class Loop(nn.Module):
    """The same, an expert after the other, each weighted."""

    out = tuple(f"e.{i}.b.weight" for i in range(3))

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate, self.e = nn.Linear(D, 3, bias=False), nn.ModuleList(MLP(bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = self.gate(x).softmax(-1)
        return sum((share[..., i, None] * expert(x) for i, expert in enumerate(self.e)), torch.zeros_like(x))


class Gathered(Dense):
    """A mixture in which each token's weights are gathered by the numbers of its two experts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        inner = F.silu(torch.einsum("btd,btkdh->btkh", x, self.up[chosen]))
        return torch.einsum("btkh,btkhd,btk->btd", inner, self.down[chosen], share)


class Scattered(Loop):
    """A mixture in which an expert sees the tokens that chose it, if there are any, and adds to their rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        share, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        mixed = torch.zeros_like(flat)
        for i, expert in enumerate(self.e):
            rows, which = torch.where(chosen == i)
            if rows.numel() == 0:
                continue
            mixed.index_add_(0, rows, share[rows, which, None] * expert(flat[rows]))
        return mixed.view_as(x)


class Cross(nn.Module):
    """Attention to states that are an input of their own."""

    out = ("o.weight",)

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(D, D, bias=bias), nn.Linear(D, 2 * D, bias=bias), nn.Linear(D, D, bias=bias)

    def forward(self, x: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        k, v = self.kv(states).chunk(2, dim=-1)
        return self.o(F.scaled_dot_product_attention(self.q(x), k, v))


class Mixer(nn.Module):
    """A convolution along the tokens, and a gate."""

    out = ("o.weight",)

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(D, 2 * D, bias=bias), nn.Linear(D, D, bias=bias)
        self.c = nn.Conv1d(D, D, 3, groups=D, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, gate = self.i(x).chunk(2, dim=-1)
        h = self.c(h.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.o(F.silu(h) * torch.sigmoid(gate))


SUBLAYERS: dict[str, type[Any]] = {
    "attention": Attention, "written attention": Written, "mlp": MLP, "gated": Gated, "nested": Nested,
    "dense experts": Dense, "looped experts": Loop, "gathered experts": Gathered, "scattered experts": Scattered,
    "mixer": Mixer, "cross-attention": Cross,
}  # fmt: skip
FEED_FORWARD = (
    "mlp", "gated", "nested", "dense experts", "looped experts", "gathered experts", "scattered experts",
)  # fmt: skip

#: What may stand on the stream behind an addition and keeps it a sum; and what does not.
SUMS = ("nothing", "constant", "gain", "cast", "view", "dropout", "skip", "noise")
NO_SUMS = ("tanh", "gelu", "clamp", "soft cap", "matrix", "highway", "mixture", "sigmoid", "square")
PLACEMENTS = ("pre", "post", "branch", "sandwich", "none", "parallel")
BRANCHES = (
    "none", "value", "number", "id", "number of ids", "length", "factor of the length", "factor by length",
    "factor of the rows", "value, in vain", "length, in vain",
)  # fmt: skip
STARTS = ("plain", "positions", "sqrt d", "normed", "factorised", "convolution", "feed-forward")
#: The table's size says nothing of the stream's.
NO_STARTS = ("tanh", "clamp")


def _held(module: nn.Module) -> Callable[..., Any]:
    """A function of one's own that holds the module."""

    def call(*x: torch.Tensor) -> torch.Tensor:
        return module(*x)

    return call


@dataclass(frozen=True)
class Spec:
    """``kinds``: of the sub-layers, block by block. ``on_stream``: behind addition i, one of SUMS or NO_SUMS."""

    kinds: tuple[tuple[str, ...], ...]
    placement: str = "pre"
    notation: tuple[str, str] = NOTATIONS[0]
    on_stream: tuple[str, ...] = ()
    start: str = "plain"
    scale: str = "none"  # "none", "layer scale", "constant", "bias"
    branch: str = "none"
    shared: bool = False
    tied: bool = False
    in_place: bool = False
    bias: bool = False
    spare: bool = False  # a block that is never run
    heads: int = 1
    closures: bool = False  # sub-layers are called through functions that hold them, as minGPT's feed-forward is


@dataclass(frozen=True)
class Truth:
    """``sublayers``: additions to the stream in a real forward; ``projections``: what they add the products of.

    ``is_sum``: nothing but sums stand on the stream; behind its last addition begins the head. ``always``: every input
    runs the same additions, and multiplies what is added with the same numbers. ``spare``: a block is never run.
    """

    sublayers: int
    projections: frozenset[str]
    is_sum: bool
    always: bool
    spare: bool


class Model(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        torch.manual_seed(0)
        rows = D // 2 if spec.start == "factorised" else D
        self.tokens = nn.Embedding(VOCABULARY, rows)
        if spec.start == "factorised":
            self.widen: Any = nn.Linear(rows, D, bias=False)
        if spec.start == "convolution":
            self.mixes: Any = nn.Conv1d(D, D, 3, padding=1)
        if spec.start == "feed-forward":
            self.first_up: Any = nn.Linear(D, 2 * D)
            self.first_down: Any = nn.Linear(2 * D, D)
        if spec.start == "positions":
            self.positions = nn.Embedding(TOKENS, D)
        if spec.start == "normed":
            self.first: Any = Norm(spec.notation)
        blocks = spec.kinds[:1] if spec.shared else spec.kinds
        blocks = (*blocks, *spec.kinds[:1]) if spec.spare else blocks
        self.blocks: Any = nn.ModuleList(nn.ModuleList(SUBLAYERS[kind](spec.bias) for kind in b) for b in blocks)
        self.norms: Any = nn.ModuleList(nn.ModuleList(Norm(spec.notation) for _ in b) for b in blocks)
        self.after: Any = nn.ModuleList(nn.ModuleList(Norm(spec.notation) for _ in b) for b in blocks)
        if spec.scale in ("layer scale", "bias"):
            self.scales: Any = nn.ParameterList(nn.Parameter(torch.ones(D)) for _ in range(len(self.additions)))
        if set(spec.on_stream) & {"gain", "matrix", "highway", "mixture"}:
            self.extra: Any = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in spec.on_stream)
            self.gains: Any = nn.ParameterList(nn.Parameter(torch.ones(D)) for _ in spec.on_stream)
        modules: list[Any] = list(self.blocks)
        self.calls = [[_held(m) if spec.closures else m for m in block] for block in modules]
        self.last: Any = Norm(spec.notation)
        self.head: Any = nn.Linear(D, VOCABULARY, bias=False)
        if spec.tied and rows == D:
            self.head.weight = self.tokens.weight
        self.others: Any = nn.ModuleList(nn.Linear(D, VOCABULARY, bias=False) for _ in range(spec.heads - 1))
        self.count = 0
        self.added: set[str] = set()

    @property
    def additions(self) -> list[tuple[int, int]]:
        """(block, sub-layer) of each addition, in order; a shared block is run again."""
        place = (lambda i: 0) if self.spec.shared else (lambda i: i)
        kinds = [self.spec.kinds[0]] * len(self.spec.kinds) if self.spec.shared else self.spec.kinds
        return [(place(i), j) for i, b in enumerate(kinds) for j in range(len(b))]

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.tokens(ids)
        match self.spec.start:
            case "positions":
                return x + self.positions(torch.arange(ids.shape[1]))
            case "sqrt d":
                return x * D**0.5
            case "normed":
                return self.first(x)
            case "factorised":
                return self.widen(x)
            case "convolution":
                return self.mixes(x.transpose(1, 2)).transpose(1, 2)
            case "feed-forward":
                return self.first_down(torch.relu(self.first_up(x)))
            case "tanh":
                return torch.tanh(x)
            case "clamp":
                return x.clamp(-3, 3)
        return x

    def add(self, x: torch.Tensor, y: torch.Tensor, block: int, sublayer: int) -> torch.Tensor:
        self.count += 1
        self.added |= {f"blocks.{block}.{sublayer}.{name}" for name in self.blocks[block][sublayer].out}
        return x.add_(y) if self.spec.in_place and self.count > 1 else x + y

    def computed(self, x: torch.Tensor, states: torch.Tensor, n: int, block: int, sublayer: int) -> torch.Tensor:
        """What sub-layer ``n`` adds, read from ``x``."""
        spec = self.spec
        pre = spec.placement in ("pre", "sandwich", "parallel")
        reads = self.norms[block][sublayer](x) if pre else x
        crosses = isinstance(self.blocks[block][sublayer], Cross)
        y = self.calls[block][sublayer](reads, states) if crosses else self.calls[block][sublayer](reads)
        if spec.scale == "layer scale":
            y = y * self.scales[n]
        elif spec.scale == "bias":
            y = y + self.scales[n]
        elif spec.scale == "constant":
            y = 0.5 * y
        y = self.by_size(y)
        return self.after[block][sublayer](y) if spec.placement in ("branch", "sandwich") else y

    def on_stream(self, name: str, x: torch.Tensor, n: int, before: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        match name:
            case "constant":
                return 0.9 * x
            case "gain":
                return x * self.gains[n]
            case "cast":
                return x.float().to(x.dtype)
            case "view":
                return x.view(x.shape[0], x.shape[1], 2, D // 2).flatten(2)
            case "dropout":
                return F.dropout(x, 0.1, self.training)
            case "skip":
                return x + 0.25 * first
            case "noise":
                return x + torch.randn_like(x) if self.training else x
            case "tanh":
                return torch.tanh(0.5 * x)
            case "gelu":
                return F.gelu(x)
            case "sigmoid":
                return torch.sigmoid(x) - 0.5
            case "square":
                return x * x
            case "clamp":
                return x.clamp(-50, 50)
            case "soft cap":
                return 30 * torch.tanh(x / 30)
            case "matrix":
                return self.extra[n](x)
            case "highway":
                gate = torch.sigmoid(self.extra[n](before))
                return gate * x + (1 - gate) * before
            case "mixture":
                share = self.extra[n](x)[..., :2].softmax(-1)
                return share[..., :1] * x + share[..., 1:] * first
        return x

    def by_size(self, y: torch.Tensor) -> torch.Tensor:
        """A factor that is another one for longer inputs, or for more of them at once."""
        match self.spec.branch:
            case "factor of the length":
                return y / math.sqrt(y.shape[1])
            case "factor by length":
                return y * (0.5 if y.shape[1] > 5 * TOKENS else 1.0)
            case "factor of the rows":
                return y / y.shape[0]
        return y

    def skips(self, ids: torch.Tensor, x: torch.Tensor) -> bool:
        """Whether every other sub-layer is left out; on the example none is but by "value" and "id"."""
        match self.spec.branch:
            case "value":
                return not bool(x.abs().amax() > 1e6)
            case "number":
                return x.abs().amax().item() > 1e6
            case "id":
                return not bool(ids.max() > 10 * VOCABULARY)
            case "number of ids":
                return 2 * ids.max().item() > VOCABULARY
            case "length":
                return ids.shape[1] > 5 * TOKENS
        return False

    def forward(self, ids: torch.Tensor, states: torch.Tensor) -> Any:
        spec = self.spec
        first = x = at_block = self.embedded(ids)
        for n, (i, j) in enumerate(self.additions):
            if n % 2 and self.skips(ids, x):
                continue
            if (spec.branch == "value, in vain" and bool(x.abs().amax() > 1e6)) or (
                spec.branch == "length, in vain" and x.shape[1] > 3 * TOKENS
            ):
                x = 1.0 * x
            before = x.clone() if spec.in_place else x
            reads = at_block if spec.placement == "parallel" and j else x
            if not j:
                at_block = before
            x = self.add(x, self.computed(reads, states, n, i, j), i, j)
            x = self.on_stream(spec.on_stream[n] if n < len(spec.on_stream) else "nothing", x, n, before, first)
            if spec.placement == "post":
                x = self.after[i][j](x)
        x = x if spec.placement == "post" else self.last(x)
        return (self.head(x), *(head(x) for head in self.others)) if spec.heads > 1 else self.head(x)


def example() -> dict[str, torch.Tensor]:
    return {"ids": torch.arange(TOKENS)[None], "states": torch.zeros(1, TOKENS - 4, D)}


def truth(spec: Spec) -> Truth:
    """What is true of ``Model(spec)``, from a real forward pass in float64, and from the spec where that decides."""
    model = Model(spec).double().eval()
    with torch.no_grad():
        states = torch.randn(1, TOKENS - 4, D, generator=torch.Generator().manual_seed(0)).double()
        logits = model(example()["ids"], states)
        assert bool((logits if spec.heads == 1 else logits[0]).isfinite().all())
    used = spec.on_stream[: len(model.additions)]
    by_size = spec.branch.startswith("factor")
    branching = spec.branch not in ("none", "value, in vain", "length, in vain") and len(model.additions) > 1
    return Truth(
        sublayers=model.count,
        projections=frozenset(model.added),
        is_sum=not set(used[: len(model.additions) - 1]) & set(NO_SUMS)
        and not set(used) & {"highway", "mixture"}
        and spec.start not in NO_STARTS,
        always=not branching and not by_size,
        spare=spec.spare,
    )
