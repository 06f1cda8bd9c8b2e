"""Small models of the shapes that other people's code has: each a way to write a decoder, an initialiser, an argument.

``MODELS`` maps a name to a constructor, what its forward takes, and what is true of it: the number of sub-layers, or
what the refusal says. Every model has two blocks of width 32 and a vocabulary of 48.
"""

# mypy: disable-error-code="no-any-return, assignment, override, no-untyped-call"

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention as uncompiled

D, V, T, HEADS = 32, 48, 12, 4
flex_attention = torch.compile(uncompiled, backend="eager")


# Norms


class GainLast(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.type_as(x)


class GainBefore(GainLast):
    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x) / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


class AboutOne(nn.Module):
    """The gain is 1 + w, and w starts at 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) * (1.0 + self.w)


class Written(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gamma + self.beta


class NoGain(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class ToLength(nn.Module):
    """x / |x| sqrt(d) g with one g."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale, self.g = dim**0.5, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.scale * self.g


# Attention


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, D // HEADS).transpose(1, 2)  # (batch, heads, tokens, width of a head)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attend(self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x)))
        result: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return result


class ByHand(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(T, T))[None, None], persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.shape[-1])
        scores = scores.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))  # type: ignore[index]
        return F.softmax(scores, dim=-1) @ v


class Grouped(Attention):
    """Two heads of keys and values for four of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = (nn.Linear(D, D // 2, bias=False) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, *(t.repeat_interleave(2, dim=1) for t in (k, v)))


class Rotary(Attention):
    """Angles in float32, whatever autocast is on around it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(device_type=q.device.type, enabled=False):
            half = q.shape[-1] // 2
            rate = 1e-4 ** (torch.arange(half, device=q.device).float() / half)
            angle = torch.outer(torch.arange(q.shape[-2], device=q.device).float(), rate)
            cos, sin = angle.cos(), angle.sin()

            def turned(x: Tensor) -> Tensor:
                a, b = x.float().chunk(2, dim=-1)
                return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)

            return super().attend(turned(q), turned(k), v)


class Complex(Attention):
    def __init__(self) -> None:
        super().__init__()
        rate = 1.0 / 1e4 ** (torch.arange(0, D // HEADS, 2)[: D // HEADS // 2].float() / (D // HEADS))
        angles = torch.outer(torch.arange(T).float(), rate)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def turned(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * self.turns[: x.shape[-2]]).flatten(3).type_as(x)  # type: ignore[index]

        return super().attend(turned(q), turned(k), v)


class NormedHeads(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = GainLast(D // HEADS), GainLast(D // HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.q_norm(q), self.k_norm(k), v)


class Slopes(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[-2], device=q.device)
        slopes = 2.0 ** -torch.arange(1, HEADS + 1, device=q.device)
        bias = slopes[:, None, None] * (place[None, :] - place[:, None])
        bias = bias.masked_fill(place[None, :] > place[:, None], float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


class Flexible(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[-2]
        mask = create_block_mask(lambda b, h, i, j: i >= j, B=None, H=None, Q_LEN=n, KV_LEN=n, device=q.device)
        result: Tensor = flex_attention(q, k, v, block_mask=mask, score_mod=lambda s, b, h, i, j: s - 0.1 * (i - j))
        return result


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi = nn.Parameter(torch.randn(3, D, HEADS, D // HEADS) * D**-0.5)
        self.wo = nn.Parameter(torch.randn(HEADS, D // HEADS, D) * D**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("btd,ndhk->nbthk", x, self.wi)
        weights = torch.einsum("bihk,bjhk->bhij", q, k).softmax(-1)
        return torch.einsum("bthk,hkd->btd", torch.einsum("bhij,bjhk->bihk", weights, v), self.wo)


class Torchs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(D, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        hidden = torch.triu(torch.ones(n, n, dtype=torch.bool, device=x.device), 1)
        result: Tensor = self.mha(x, x, x, attn_mask=hidden, need_weights=False)[0]
        return result


class Transposed(nn.Module):
    """Weights as (in, out)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(n_in, n_out)), nn.Parameter(torch.zeros(n_out))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class LowRank(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm, self.up = nn.Linear(D, 8, bias=False), GainLast(8), nn.Linear(8, D, bias=False)
        self.k = self.v = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        both = self.up(self.norm(self.down(x)))
        mixed = self.attend(self.split(self.q(x)), self.split(both), self.split(both))
        result: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return result


class Linearised(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = torch.cumsum(k.unsqueeze(-1) * v.unsqueeze(-2), dim=2)
        return torch.einsum("bhtk,bhtkv->bhtv", q, state)


class Scan(nn.Module):
    """A state-space mixer as a loop, whose step has a bias that is worked out."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.step, self.out = nn.Linear(D, 2 * D, bias=False), nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.log_decay = nn.Parameter(torch.log(torch.arange(1, D + 1).float()))
        self.skip = nn.Parameter(torch.ones(D))
        first = torch.exp(torch.rand(D) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
        with torch.no_grad():
            self.step.bias.copy_(first + torch.log(-torch.expm1(-first)))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.inp(x).chunk(2, dim=-1)
        decay = torch.exp(-torch.exp(self.log_decay) * F.softplus(self.step(u)))
        state, states = torch.zeros(x.shape[0], D, device=x.device), []
        for i in range(x.shape[1]):
            state = decay[:, i] * state + u[:, i]
            states.append(state)
        mixed = torch.stack(states, dim=1) + self.skip * u
        result: Tensor = self.out(mixed * F.silu(gate))
        return result


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depth, self.point = nn.Conv1d(D, D, 3, groups=D), nn.Conv1d(D, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.point(F.silu(self.depth(F.pad(x.transpose(1, 2), (2, 0))))).transpose(1, 2)
        return result


# Feed-forward


class MLP(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D, bias=bias), nn.Linear(2 * D, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.relu(self.up(x)).square())
        return result


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(D, 4 * D, bias=False), nn.Linear(2 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        result: Tensor = self.w3(F.silu(gate) * value)
        return result


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Transposed(D, 2 * D), Transposed(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return result


class Closure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = parts = nn.ModuleDict({"fc": nn.Linear(D, 2 * D), "proj": nn.Linear(2 * D, D)})
        self.run = lambda x: parts["proj"](F.gelu(parts["fc"](x)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.run(x)
        return result


class ByToken(nn.Module):
    """Experts add to the rows of their tokens, at indices."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(D, 4, bias=False), nn.ModuleList(MLP() for _ in range(4))

    def add(self, out: Tensor, token: Tensor, value: Tensor) -> Tensor:
        out[token] += value
        return out

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        share, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out = self.add(out, token, expert(flat[token]) * share[token, place].unsqueeze(-1))
        return out.view_as(x)


class ByIndexAdd(ByToken):
    def add(self, out: Tensor, token: Tensor, value: Tensor) -> Tensor:
        return out.index_add_(0, token, value)


class ByZeros(ByToken):
    """Made where the data is, with its size and dtype."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, D)
        share, chosen = self.gate(flat).softmax(-1).topk(1, dim=-1)
        out = torch.zeros(flat.shape, device=x.device, dtype=x.dtype)
        for number, expert in enumerate(self.experts):
            mask = chosen[:, 0] == number
            if mask.any():
                out[mask] += share[mask] * expert(flat[mask])
        return out.view(x.shape)


class Gathered(nn.Module):
    """The chosen experts' weights are gathered for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 4, bias=False)
        self.up, self.down = nn.Parameter(torch.empty(4, 2 * D, D)), nn.Parameter(torch.empty(4, D, 2 * D))
        nn.init.normal_(self.up, std=0.02)
        nn.init.normal_(self.down, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = torch.topk(self.router(x), 2)
        hidden = F.silu(torch.einsum("btaid,btd->btai", self.up[chosen], x))
        each = torch.einsum("btadi,btai->btad", self.down[chosen], hidden)
        return torch.einsum("btad,bta->btd", each, share.softmax(-1))


class Dense(nn.Module):
    """All experts, weighted by the router."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, 3), nn.ModuleList(MLP() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        return torch.stack([e(x) * share[..., i : i + 1] for i, e in enumerate(self.experts)]).sum(0)


class WithShared(ByIndexAdd):
    def __init__(self) -> None:
        super().__init__()
        self.shared = MLP()

    def forward(self, x: Tensor) -> Tensor:
        shared: Tensor = self.shared(x)
        return super().forward(x) + shared


@torch.library.custom_op("spikepatch_foreign::gated", mutates_args=())
def gated(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate) * value


@gated.register_fake
def _(gate: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(value)


class BehindAnOp(Fused):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        result: Tensor = self.w3(gated(gate.contiguous(), value.contiguous()))
        return result


# Whole models


class Decoder(nn.Module):
    """Pre-norm; subclasses change one thing each."""

    def __init__(
        self,
        attention: Callable[[], nn.Module] = Attention,
        mlp: Callable[[], nn.Module] = MLP,
        norm: Callable[[int], nn.Module] = GainLast,
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(V, D)
        self.mixers = nn.ModuleList(attention() for _ in range(2))
        self.ffs = nn.ModuleList(mlp() for _ in range(2))
        self.norms = nn.ModuleList(norm(D) for _ in range(5))
        self.head = nn.Linear(D, V, bias=False)

    def start(self, ids: Tensor) -> Tensor:
        x: Tensor = self.wte(ids)
        return x

    def sublayers(self) -> Iterator[tuple[int, nn.Module]]:
        yield from enumerate(f for pair in zip(self.mixers, self.ffs, strict=True) for f in pair)

    def add(self, x: Tensor, i: int, f: nn.Module) -> Tensor:
        return x + f(self.norms[i](x))

    def stack(self, x: Tensor) -> Tensor:
        for i, f in self.sublayers():
            x = self.add(x, i, f)
        return x

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.norms[4](self.stack(self.start(ids))))


class PostNorm(Decoder):
    def add(self, x: Tensor, i: int, f: nn.Module) -> Tensor:
        result: Tensor = self.norms[i](x + f(x))
        return result


class BranchNorm(Decoder):
    def add(self, x: Tensor, i: int, f: nn.Module) -> Tensor:
        return x + self.norms[i](f(x))


class Parallel(Decoder):
    def stack(self, x: Tensor) -> Tensor:
        for i, (mixer, ff) in enumerate(zip(self.mixers, self.ffs, strict=True)):
            n = self.norms[i](x)
            x = x + mixer(n) + ff(n)
        return x


class LayerScale(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.gammas = nn.ParameterList(nn.Parameter(1e-4 * torch.ones(D)) for _ in range(4))

    def add(self, x: Tensor, i: int, f: nn.Module) -> Tensor:
        return x + self.gammas[i] * f(self.norms[i](x))


class Downscaled(Decoder):
    def add(self, x: Tensor, i: int, f: nn.Module) -> Tensor:
        return x + f(self.norms[i](x)) / math.sqrt(4)


class FromTheStart(Decoder):
    """Each block mixes the embedding in again, by learned numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.lambdas = nn.Parameter(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))

    def stack(self, x: Tensor) -> Tensor:
        first = x
        for i, (mixer, ff) in enumerate(zip(self.mixers, self.ffs, strict=True)):
            x = self.lambdas[i, 0] * x + self.lambdas[i, 1] * first
            x = x + mixer(self.norms[2 * i](x))
            x = x + ff(self.norms[2 * i + 1](x))
        return x


class Clamped(Decoder):
    def add(self, x: Tensor, i: int, f: nn.Module) -> Tensor:
        return super().add(x, i, f).clamp(-100, 100)


class Gated(Decoder):
    """The stream itself is multiplied by what is computed from it: no sum."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def add(self, x: Tensor, i: int, f: nn.Module) -> Tensor:
        share = torch.sigmoid(self.gates[i](x))
        return share * x + (1 - share) * f(self.norms[i](x))


class Shared(Decoder):
    """One block, run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers[1], self.ffs[1] = self.mixers[0], self.ffs[0]


class Dropped(Decoder):
    """Stochastic depth, in training only."""

    def add(self, x: Tensor, i: int, f: nn.Module) -> Tensor:
        if self.training and torch.rand(1).item() < 0.1:
            return x
        return super().add(x, i, f)


# Embeddings


class Tied(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.wte.weight


class Learned(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.wpe = nn.Embedding(T, D)

    def start(self, ids: Tensor) -> Tensor:
        return super().start(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))


class Sinusoidal(Decoder):
    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(T)[:, None] * torch.exp(torch.arange(0, D, 2) * (-math.log(1e4) / D))
        self.register_buffer("pe", torch.stack((angles.sin(), angles.cos()), -1).flatten(1))

    def start(self, ids: Tensor) -> Tensor:
        return super().start(ids) + self.pe[: ids.shape[1]]  # type: ignore[index]


class TimesRoot(Decoder):
    def start(self, ids: Tensor) -> Tensor:
        return super().start(ids) * math.sqrt(D)


class LearnedFactor(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale, self.mix = nn.Parameter(torch.zeros(())), nn.Parameter(torch.tensor([1.0, 0.0]))
        self.second = nn.Embedding(V, D)

    def start(self, ids: Tensor) -> Tensor:
        return self.log_scale.exp() * (self.mix[0] * super().start(ids) + self.mix[1] * self.second(ids))


class LearnedShare(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(D))

    def start(self, ids: Tensor) -> Tensor:
        return torch.sigmoid(self.share) * super().start(ids)


class NormedStart(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LayerNorm(D)

    def start(self, ids: Tensor) -> Tensor:
        result: Tensor = self.first(super().start(ids))
        return result


class UnitRows(Decoder):
    def start(self, ids: Tensor) -> Tensor:
        return F.normalize(super().start(ids), dim=-1)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, D))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class OwnTable(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.wte = Table()


class OneHot(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Linear(V, D, bias=False)

    def start(self, ids: Tensor) -> Tensor:
        x: Tensor = self.wte(F.one_hot(ids, V).to(self.head.weight.dtype))
        return x


# Arguments and results


class Trained(Decoder):
    """Logits and loss; targets may be left out."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        logits = super().forward(ids)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class AsDict(Decoder):
    def forward(self, ids: Tensor) -> Any:
        return {"logits": super().forward(ids)}


class Moded(Decoder):
    def forward(self, ids: Tensor, mode: str, scale: float = 1.0) -> Any:
        if mode not in {"train", "generate"}:
            raise ValueError(mode)
        return super().forward(ids) * scale


@dataclass
class Settings:
    width: int = D
    vocab_size: int = V
    std: float = 0.02
    names: list[str] = field(default_factory=list)


class Configured(Decoder):
    """``.config`` is its own, and the constructor's argument has another name."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.config = settings
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith(("o.weight", "down.weight")):
                nn.init.normal_(parameter, std=self.config.std / math.sqrt(4))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]


@dataclass
class Outcome:
    states: list[Tensor]
    logits: Tensor


class AsObject(Decoder):
    def forward(self, ids: Tensor) -> Any:
        x = self.start(ids)
        return Outcome([x], super().forward(ids))


class TwoTracks(Decoder):
    """Reversible: each of two tracks reads the other; the head reads their mean."""

    def stack(self, x: Tensor) -> Tensor:
        one = two = x
        for i, (mixer, ff) in enumerate(zip(self.mixers, self.ffs, strict=True)):
            one = one + mixer(self.norms[2 * i](two))
            two = two + ff(self.norms[2 * i + 1](one))
        return torch.stack((one, two)).mean(dim=0)


class OfItsType(Decoder):
    def start(self, ids: Tensor) -> Tensor:
        x = super().start(ids)
        return x + torch.linspace(0, 1, D).type(x.type())


# Initialisers


class AppliesIt(Decoder):
    """Its constructor keeps no argument, and applies a method of its own to all of its parts."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(mlp=lambda: MLP(bias=True))
        self.depth = settings.std
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.depth)
            if module.bias is not None:
                nn.init.constant_(module.bias, 0.125)


class BiasesByTheModel(Decoder):
    def __init__(self) -> None:
        super().__init__(mlp=lambda: MLP(bias=True))
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.data.zero_()


class Resetting(nn.Module):
    """Its ``reset_parameters`` is what its parts do not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.shift = nn.Parameter(torch.empty(D))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.up, self.down):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.constant_(layer.bias, 0.25)
        nn.init.ones_(self.shift)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.gelu(self.up(x * self.shift)))
        return result


class ByAnyName(Decoder):
    """What its method writes depends on the depth."""

    def __init__(self) -> None:
        super().__init__(mlp=lambda: MLP(bias=True))
        self.fill_with_depth()

    @torch.no_grad()
    def fill_with_depth(self) -> None:
        for depth, ff in enumerate(self.ffs):
            ff.up.bias.fill_(-float(depth + 1))  # type: ignore[union-attr, operator]


class Renaming(Decoder):
    """A hook stores it under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(self._rename)

    @staticmethod
    def _rename(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for name in list(state):
            state[name.replace("wte.", "tok_embeddings.")] = state.pop(name)


class TokenShift(Decoder):
    """Each sub-layer reads a learned mix of this token and the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.ParameterList(nn.Parameter(torch.rand(D)) for _ in range(4))

    def add(self, x: Tensor, i: int, f: nn.Module) -> Tensor:
        n = self.norms[i](x)
        return x + f(n * self.mix[i] + F.pad(n, (0, 0, 1, -1)) * (1 - self.mix[i]))


class Skips(Decoder):
    """What the stream was in the first half is added in the second, by learned shares."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.ones(2))

    def stack(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for i, f in self.sublayers():
            x = self.add(x if i < 2 else x + self.share[i - 2] * kept.pop(), i, f)
            kept += [x] if i < 2 else []
        return x


class WeightedMeans(Decoder):
    """The stream is a learned mean of all that it was."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.ParameterList(nn.Parameter(torch.eye(i + 2)[i + 1]) for i in range(4))

    def stack(self, x: Tensor) -> Tensor:
        before = [x]
        for i, f in self.sublayers():
            before.append(self.add(x, i, f))
            parts = [s * y for s, y in zip(self.share[i], before, strict=True)]
            x = functools.reduce(torch.add, parts)
        return x


class ByBlocks(Attention):
    """What it adds is made up in a buffer, block by block and in place, as online softmax does."""

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.zeros_like(x)
        for part, rows in zip(whole.split(4, 1), super().forward(x).split(4, 1), strict=True):
            part.mul_(0.5).add_(rows)
        return whole.div_(1.0)


class AddedThroughAView(Decoder):
    def stack(self, x: Tensor) -> Tensor:
        x = x.clone()
        rows = x.view(-1, D)
        for i, f in self.sublayers():
            rows.add_(f(self.norms[i](x)).view(-1, D))
        return x


class WrittenInPart(Decoder):
    def stack(self, x: Tensor) -> Tensor:
        x = x.clone()
        for i, f in self.sublayers():
            x[:, :6] += f(self.norms[i](x))[:, :6]
        return x


class LastAlone(Decoder):
    """The logits of the last token, as where text is generated."""

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = super().forward(ids)
        return logits[:, -1:]


class LossAlone(Decoder):
    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Unchosen(nn.Module):
    """The last expert is for values that do not occur, so that its product has no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(MLP() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        result, chosen = torch.zeros_like(flat), (flat[:, 0] > 1e9).long()
        for e, expert in enumerate(self.experts):
            rows = torch.where(chosen == e)[0]
            result.index_add_(0, rows, expert(flat[rows]))
        return result.view_as(x)


def compiled() -> nn.Module:
    return torch.compile(Decoder(), backend="eager")  # type: ignore[return-value]


def compiled_blocks() -> nn.Module:
    model = Decoder()
    for mixer in model.mixers:
        mixer.compile(backend="eager")
    return model


@dataclass(frozen=True)
class Foreign:
    """``sublayers``: of the proven map; or ``leak``: what stands in the way. ``unscaled``: why the embedding is not
    multiplied, and what is said to do instead.
    """

    make: Callable[[], nn.Module]
    sublayers: int = 4
    leak: str = ""
    unscaled: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def example(self) -> dict[str, Any]:
        return {"ids": torch.arange(T)[None] * 3 % V, **self.settings}


def _with(**parts: Any) -> Callable[[], nn.Module]:
    return functools.partial(Decoder, **parts)


MODELS: dict[str, Foreign] = {
    "gain last": Foreign(Decoder),
    "gain first": Foreign(_with(norm=GainBefore)),
    "one plus w": Foreign(_with(norm=AboutOne)),
    "written-out LayerNorm": Foreign(_with(norm=Written)),
    "norm without gain": Foreign(_with(norm=NoGain)),
    "norm to a length": Foreign(_with(norm=ToLength)),
    "attention by hand": Foreign(_with(attention=ByHand)),
    "grouped queries": Foreign(_with(attention=Grouped)),
    "rotary under autocast": Foreign(_with(attention=Rotary)),
    "complex rotary": Foreign(_with(attention=Complex)),
    "normed heads": Foreign(_with(attention=NormedHeads)),
    "slopes": Foreign(_with(attention=Slopes)),
    "FlexAttention": Foreign(_with(attention=Flexible)),
    "einsum attention": Foreign(_with(attention=Einsum)),
    "torch's attention": Foreign(_with(attention=Torchs)),
    "low-rank keys": Foreign(_with(attention=LowRank)),
    "linear attention": Foreign(_with(attention=Linearised)),
    "state-space loop": Foreign(_with(attention=Scan)),
    "convolution": Foreign(_with(attention=Convolved)),
    "fused gate": Foreign(_with(mlp=Fused)),
    "transposed weights": Foreign(_with(mlp=Conv1D)),
    "closure": Foreign(_with(mlp=Closure)),
    "experts by index": Foreign(_with(mlp=ByToken)),
    "experts by index_add": Foreign(_with(mlp=ByIndexAdd)),
    "experts by mask": Foreign(_with(mlp=ByZeros)),
    "gathered experts": Foreign(_with(mlp=Gathered)),
    "dense experts": Foreign(_with(mlp=Dense)),
    "shared expert": Foreign(_with(mlp=WithShared)),
    "custom op": Foreign(_with(mlp=BehindAnOp)),
    "post-norm": Foreign(PostNorm, unscaled="does not apply to a post-norm model"),
    "branch norm": Foreign(BranchNorm),
    "parallel": Foreign(Parallel),
    "layer scale": Foreign(LayerScale),
    "downscaled branches": Foreign(Downscaled),
    "mixed with the start": Foreign(FromTheStart),
    "clamped stream": Foreign(Clamped, leak="goes through clamp"),
    "gated stream": Foreign(Gated, leak="multiplied by a gate that gates.0 computes"),
    "shared block": Foreign(Shared),
    "stochastic depth": Foreign(Dropped),
    "tied head": Foreign(Tied),
    "learned positions": Foreign(Learned),
    "sinusoidal positions": Foreign(Sinusoidal),
    "embedding times sqrt(d)": Foreign(TimesRoot, unscaled=r"already multiplied by 5\.65685"),
    "learned factors": Foreign(LearnedFactor),
    "a learned share": Foreign(LearnedShare, unscaled=r"by 0\.5(.|\n)*no large shortcut(.|\n)*--replace"),
    "normed embedding": Foreign(NormedStart, unscaled="already normalised"),
    "unit rows": Foreign(UnitRows, unscaled=r"small shortcut(.|\n)*multiply by 5\.657"),
    "own table": Foreign(OwnTable, unscaled=r"none that can be patched(.|\n)*unit-embed"),
    "one-hot": Foreign(OneHot, unscaled=r"none that can be patched(.|\n)*unit-embed"),
    "loss beside logits": Foreign(Trained),
    "dict of results": Foreign(AsDict),
    "a mode": Foreign(Moded, settings={"mode": "train", "scale": 0.5}),
    "own config": Foreign(lambda: Configured(Settings())),
    "biases by the model": Foreign(BiasesByTheModel),
    "reset by a parent": Foreign(_with(mlp=Resetting)),
    "a method of any name": Foreign(ByAnyName),
    "renamed in state_dict": Foreign(Renaming),
    "init by apply": Foreign(lambda: AppliesIt(Settings())),
    "an object of results": Foreign(AsObject),
    "two tracks": Foreign(TwoTracks, leak="past the stream, as a second track"),
    "a tensor's type by name": Foreign(OfItsType),
    "token shift": Foreign(TokenShift),
    "skips": Foreign(Skips),
    "weighted means": Foreign(WeightedMeans),
    "attention by blocks": Foreign(_with(attention=ByBlocks)),
    "added through a view": Foreign(AddedThroughAView),
    "written in part": Foreign(WrittenInPart, leak="a write into a part of it"),
    "loss alone": Foreign(LossAlone),
    "last logits alone": Foreign(LastAlone),
    "an expert nobody chose": Foreign(_with(mlp=Unchosen)),
    "compiled": Foreign(compiled),
    "compiled blocks": Foreign(compiled_blocks),
}
