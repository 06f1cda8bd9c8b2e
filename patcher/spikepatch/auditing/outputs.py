"""What stands at both ends of the stream: tables, positions, the head, ties; and buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch.fx import Node

from spikepatch.auditing.contents import Contents
from spikepatch.auditing.fault import Fault, FaultLevel
from spikepatch.auditing.groups import Evidence
from spikepatch.auditing.laws import Scheme, close
from spikepatch.residual import ops
from spikepatch.residual.facts import Facts
from spikepatch.residual.map import Embedding, ResidualMap
from spikepatch.residual.multipliers import number_in
from spikepatch.residual.ops import op
from spikepatch.residual.stream import Stream
from spikepatch.residual.weights import gain, matrix_weight

#: Positions that are larger than tokens by this much leave the first sub-layers little of the tokens.
_DROWNED = 5.0
#: std of the stream that tokens enter with, where the model multiplies them: the recipes have 0.6 to 1.
_STREAM = 3.0


def head(
    evidence: Evidence, stream: Stream | None, vocabulary: int | None, measured: Callable[[], float | None]
) -> Iterator[Fault]:
    """A head whose first logits are so large that the loss is many times log V.

    Logits have a std of s = std(W) sqrt(d) rms(gain) m, the multiplier m included. Random guesses cost
    log V + s^2 / 2 as long as s is below sqrt(2 log V), and about s sqrt(2 log V) above.

    Args:
        measured: that std from a forward pass, or None. It is asked where the closed form does not hold, and before
            anything is said.
    """
    residual = evidence.residual
    if residual is None or residual.head is None or stream is None or vocabulary is None or vocabulary < 8:
        return
    name = next((group[0] for group in residual.tied if residual.head.parameter in group), residual.head.parameter)
    contents = evidence.contents.get(name)
    size = _logit_size(evidence, stream, contents) if contents is not None else None
    uniform = math.log(vocabulary)
    if contents is None or (size is not None and size <= math.sqrt(uniform / 2)):
        return
    run = measured()
    if run is not None:  # a tied head echoes each token, which the closed form leaves out
        size = run if size is None else min(size, run)
    if size is None or not math.isfinite(size) or size <= math.sqrt(uniform / 2):
        return
    many = size > math.sqrt(2 * uniform)
    loss = size * math.sqrt(2 * uniform) if many else uniform + size**2 / 2
    tied = "; the embedding is tied to it" if residual.head.tied else ""
    yield Fault(
        "head",
        "at-risk" if many else "note",
        (name,),
        f"the head makes logits with a std of {size:.3g}{tied}: the first loss is about {loss:.3g}, where log V is"
        f" {uniform:.3g}",
        "logits with a std of about 1 or less",
        f"a std of {contents.std:.3g}, logits of {size:.3g}",
        f"draw it with a std of at most 1/sqrt(d) = {residual.width**-0.5:.3g}",
    )


def _logit_size(evidence: Evidence, stream: Stream, contents: Contents) -> float | None:
    """std of the logits in closed form; None where something else stands between the final norm and the head."""
    facts = stream.facts
    matmuls = sorted(stream.suffix, key=facts.order.__getitem__, reverse=True)
    matmul = next((n for n in matmuls if matrix_weight(facts, n) is not None), None)
    if matmul is None:
        return None
    data = facts.data(matmul)
    if len(data) != 1:
        return None
    node, factor = data[0], 1.0
    while node not in facts.norm_at:
        moving = facts.data(node)
        if len(moving) != 1 or not (op(node) in ops.VIEWS or op(node) in ops.PRODUCTS or op(node) in ops.ADDS):
            return None
        number = next((a for a in node.args if isinstance(a, (int, float)) and op(node) in ops.PRODUCTS), None)
        if number is not None:
            factor = factor * number if op(node) == "mul" else factor / number
        node = moving[0]
    found = gain(facts, facts.norm_at[node])
    rms = 1.0
    if found.parameter is not None and found.parameter in evidence.contents:
        w = evidence.contents[found.parameter]
        rms = math.hypot(w.std, w.mean + (1.0 if found.convention == "1+w" else 0.0))
    width = ops.last(data[0])
    after = _factor_behind(facts, matmul)
    return contents.std * math.sqrt(width) * rms * abs(factor * after) if after is not None else None


def _factor_behind(facts: Facts, matmul: Node) -> float | None:
    """The number that logits are multiplied with; None where that is no number. A cap is wider than fresh logits."""
    node, factor = facts.trace.output, 1.0
    while node is not matmul:
        moving = facts.data(node)
        if len(moving) != 1 or node in facts.norm_at:
            return None
        if op(node) in ops.PRODUCTS:
            number = number_in(facts, node)
            if number is None:
                return None
            factor = factor * number if op(node) == "mul" else factor / number
        node = moving[0]
    return factor


def _sized(evidence: Evidence, stream: ResidualMap) -> dict[str, tuple[Embedding, float]]:
    """Tables with the std of what they bring: to the stream, or to the one norm that all of them pass together."""
    known = [e for e in stream.embeddings if e.parameter in evidence.contents]
    shared = all(e.normed for e in known) and sum(n.role == "embedding" for n in stream.norms) == 1
    return {
        e.parameter: (e, evidence.contents[e.parameter].std * (1.0 if shared else e.scale))
        for e in known
        if shared or not e.normed
    }


def tables(evidence: Evidence, scheme: Scheme | None) -> Iterator[Fault]:
    """Tokens that enter with a factor twice, and positions beside which tokens are nothing."""
    for stream in evidence.streams:
        sized = _sized(evidence, stream)
        tokens = [(e, size) for e, size in sized.values() if e.kind == "token" and size > 0]
        for e, size in tokens:
            table = evidence.contents[e.parameter]
            scheme = scheme if scheme is not None and scheme.name == "std c" else None
            baked = scheme is not None and close(table.std / e.scale, scheme.c, table.error)
            if e.scale > 1.5 and not e.normed and (size > _STREAM or (size > 1 and baked)):
                yield Fault(
                    "embedding",
                    "at-risk",
                    (e.parameter,),
                    f"the embedding is multiplied by {e.scale:.4g} in the forward pass, and its table is drawn large"
                    f" already: the stream starts with a std of {size:.3g}, sqrt(d) counts twice",
                    f"a table with a std of about 1/{e.scale:.4g} or less",
                    f"a std of {evidence.contents[e.parameter].std:.3g}",
                    "give the table the std that the model was made for, such as 0.02",
                )
        eps = max((n.eps for n in stream.norms if n.role == "pre"), default=0.0)
        if lost := [(e, size) for e, size in tokens if size**2 < eps and not e.normed]:
            e, size = lost[0]
            yield Fault(
                "embedding",
                "at-risk",
                (e.parameter,),
                f"the embedding is too small: the stream starts with a std of {size:.3g}, and the first norm divides by"
                f" the root of its eps, {eps:g}, instead",
                f"a stream with a std far above sqrt(eps) = {math.sqrt(eps):.3g}",
                f"a std of {evidence.contents[e.parameter].std:.3g}",
                "give the table the std that the model was made for, such as 0.02",
            )
        if not tokens:
            continue
        largest = max(size for _, size in tokens)
        for e, size in sized.values():
            computed = evidence.contents[e.parameter].row_spread < 0.1  # sinusoids
            if e.kind != "token" and not computed and size > _DROWNED * largest:
                yield Fault(
                    "positions",
                    "at-risk",
                    (e.parameter,),
                    f"{e.kind} embeddings drown the tokens: they add {size / largest:.3g} times as much to the stream",
                    f"a std of at most that of the tokens, {largest * evidence.contents[e.parameter].std / size:.3g}",
                    f"a std of {evidence.contents[e.parameter].std:.3g}",
                    "draw it as the token embedding is",
                )


def ties(evidence: Evidence, promised: Mapping[str, str]) -> Iterator[Fault]:
    """The config and the class say that two names are one tensor, and they are two."""
    for name, target in promised.items():
        first, second = evidence.contents.get(name), evidence.contents.get(target)
        if first is None or second is None or name == target or first.shape != second.shape:
            continue
        yield Fault(
            "tie",
            "at-risk",
            (name, target),
            "the config says that the two are tied, such as a head and its embedding, and each is a tensor of its own",
            "one tensor",
            f"two, with stds of {first.std:.3g} and {second.std:.3g}",
            "call tie_weights() after the model was moved or sharded, or set tie_word_embeddings to false",
        )


def buffers(live: Mapping[str, torch.Tensor], built: Mapping[str, torch.Tensor], *, learned: bool) -> Iterator[Fault]:
    """Buffers that are not what the model's constructor makes of its config, so far as that is known.

    Args:
        learned: statistics may have changed since; then a buffer is erased only where it is zero.
    """
    bad, erased, garbage, other = [], [], [], []
    for name, value in live.items():
        made = built.get(name)
        if value.is_meta or not value.numel():
            continue
        plain = value.detach().cpu().double()
        known = made is not None and not made.is_meta and made.shape == value.shape
        reference = made.detach().cpu().double() if made is not None and known else None
        if bool(plain.isnan().any()) and (reference is None or not bool(reference.isnan().any())):
            bad.append(name)
        elif reference is not None and _is_erased(plain, reference, learned):
            erased.append(name)
        elif value.is_floating_point() and _is_garbage(plain) and (reference is None or not _is_garbage(reference)):
            garbage.append(name)
        elif reference is not None and not learned and value.is_floating_point() and _differs(plain, reference, 0.05):
            other.append(name)
    kinds: tuple[tuple[list[str], FaultLevel, str, str], ...] = (
        (bad, "unstable", "the buffer holds NaN", "NaN"),
        (
            erased,
            "at-risk",
            "the buffer is erased: it is zero, or has other values than the constructor makes",
            "other",
        ),
        (garbage, "at-risk", "the buffer holds values that nobody wrote: garbage", "denormal or huge values"),
        (other, "note", "the buffer has other values than the constructor makes of this config", "other"),
    )
    for names, severity, what, measured in kinds:
        if names:
            yield Fault(
                "buffer",
                severity,
                tuple(names),
                what,
                "what the constructor computes from the config",
                measured if measured != "other" or bool(live[names[0]].any()) else "all zeros",
                "fill it after to_empty(): build the model off the meta device, or copy the buffers of one that was",
            )


def _is_erased(value: torch.Tensor, made: torch.Tensor, learned: bool) -> bool:
    if not bool(made.any()) or not bool(made.isfinite().all()):
        return False
    if learned or not bool(value.any()):
        return not bool(value.any())
    return _differs(value, made, 0.5)


def _differs(value: torch.Tensor, made: torch.Tensor, share: float) -> bool:
    """By more than this share of the largest value; what is not drawn afresh by every constructor."""
    if not bool(made.isfinite().all()) or not bool(made.any()):
        return False
    return float((value - made).abs().max()) > share * float(made.abs().max())


def _is_garbage(value: torch.Tensor) -> bool:
    sizes = value[value.isfinite() & (value != 0)].abs()
    return bool(len(sizes)) and (float(sizes.max()) < 1e-30 or 1e30 < float(sizes.max()) < 3e38)
