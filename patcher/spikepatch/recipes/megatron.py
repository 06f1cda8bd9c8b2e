"""A recipe in the options of Megatron-LM, and what they cannot say of it.

What Megatron-LM does to a classic decoder (N layers of width d, each with attention and a plain MLP of width 4 d):

    W_Q W_K W_V, W_1     N(0, a^2)          a: --init-method-std
    W_O, W_2             N(0, a^2 / (2 N))  for every a; no option changes it
    tables               N(0, e^2)          tokens, and learned positions; e: --embedding-init-method-std, by default a
    an untied head       N(0, a^2)          with --use-mup N(0, e^2)
    embedding's output   times m            m: --mup-embedding-mult, with --use-mup; learned positions included

--use-mup alone changes nothing else: its base width is the width itself, so that stds, logits and learning rates are
multiplied by 1, and with --mup-attn-scale-power 0.5 attention divides by the root of its head's width, as without it.
--init-method-xavier-uniform is not used: it is uniform, and TransformerConfig does not take what it sets.

The options are those of commit d98e8a64 (August 2026), which ``tests/megatron_options.txt`` lists. The values are read
from the plan of the recipe, as for any model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from spikepatch.errors import Refused
from spikepatch.plans.plan import DetachEmbedding, Fill, NormEmbedding, Plan, Recipe, ScaleEmbedding, Untie
from spikepatch.plans.work_out import make_plan
from spikepatch.residual.map import Embedding, Head, Matrix, ResidualMap, ResidualProjection, SublayerKind

#: Two ways to the same number, each of a few operations in float64.
_ROUNDING = 1e-14

_TOKENS, _POSITIONS, _HEAD = "tokens", "positions", "head"
_READERS, _WRITERS = ("attention.qkv", "mlp.input"), ("attention.output", "mlp.output")


@dataclass(frozen=True)
class Expressed:
    """A recipe, as far as options of Megatron-LM go.

    Attributes:
        options: name and value; None for a flag.
        missing: what the recipe asks for and no option says, one sentence each.
        notes: what else to know before using the options.
    """

    options: tuple[tuple[str, str | None], ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``--json`` prints it; a flag is true."""
        options = {name: True if value is None else value for name, value in self.options}
        return {"options": options, "missing": list(self.missing), "notes": list(self.notes)}


def express(recipe: Recipe, *, width: int, layers: int, vocab: int | None = None) -> Expressed:
    """Plan ``recipe`` on a classic decoder with fresh weights, and say the plan in Megatron-LM's options.

    Args:
        recipe: with its options, as ``Request.recipe`` has it.
        width: d, of the stream.
        layers: N.
        vocab: rows of the token table, as padded; only for recipes whose tables' stds go with it.

    Raises:
        Refused: the recipe does not fit a classic decoder, or needs ``vocab``.
    """
    plan = make_plan(*_classic(width, layers, vocab or 1), recipe, reinit="all", seed=0)
    fills = {fill.parameter: fill for fill in plan.select(Fill)}
    if vocab is None and any(0 in fills[name].axes for name in (_TOKENS, _HEAD) if name in fills):
        raise Refused(
            what=f"the std of the embedding goes with the size of the vocabulary in {recipe.name}",
            where="--vocab",
            why="it is not given",
            remedy="give --vocab, the number of rows of the table",
        )
    inner = [fills[name] for name in _names(layers, _READERS) if name in fills]
    a = inner[0].std if _one_std(inner) else None
    e = fills[_TOKENS].std if _TOKENS in fills else a
    scale = next((edit for edit in plan.select(ScaleEmbedding) if edit.module == _TOKENS), None)
    options: list[tuple[str, str | None]] = [("--num-layers", str(layers)), ("--hidden-size", str(width))]
    if a is not None:
        options.append(("--init-method-std", _number(a)))
    if e is not None and e != a:
        options.append(("--embedding-init-method-std", _number(e)))
    if scale is not None:
        options += [
            ("--use-mup", None),
            ("--mup-embedding-mult", _number(scale.factor)),
            ("--mup-attn-scale-power", "0.5"),
        ]
    if plan.select(Untie):
        options.append(("--untie-embeddings-and-output-weights", None))
    missing = [
        *_missing_stds(inner, [fills[name] for name in _names(layers, _WRITERS) if name in fills], a, layers),
        *_missing_head(fills.get(_HEAD), e if scale is not None else a),
        *_missing_structure(plan, recipe),
    ]
    return Expressed(tuple(options), tuple(missing), tuple(_notes(plan, fills, e, scale)))


def _classic(width: int, layers: int, vocab: int) -> tuple[ResidualMap, dict[str, tuple[int, ...]]]:
    """The map of a classic decoder with learned positions and a tied head, as data, and its tensors' shapes."""
    shapes: dict[str, tuple[int, ...]] = {_TOKENS: (vocab, width), _POSITIONS: (width, width)}
    projections, matrices = [], []
    kinds: tuple[SublayerKind, ...] = ("attention", "mlp")
    for layer in range(layers):
        for index, kind in enumerate(kinds):
            outer, inner = ((3, 1), (4, 4))[index]  # widths between the two matrices, in d: written and read
            sublayer = 2 * layer + index
            for part, fan_in, fan_out in ((_READERS, 1, outer), (_WRITERS, inner, 1)):
                name = f"layers.{layer}.{part[index]}"
                shapes[name] = (fan_out * width, fan_in * width)  # (out, in)
                reads = part is _READERS
                matrices.append(Matrix(name, sublayer, kind, reads, fan_in * width, fan_out * width, 1, 0))
            projections.append(ResidualProjection(f"layers.{layer}.{_WRITERS[index]}", layer, sublayer, kind))
    residual = ResidualMap(
        source="Megatron-LM",
        model_type="",
        architecture="classic decoder",
        width=width,
        layers=layers,
        sublayers=2 * layers,
        placement="pre-norm",
        proven=True,
        leaks=(),
        reaches=(_TOKENS, _POSITIONS),
        embeddings=(
            Embedding(_TOKENS, _TOKENS, "token", 1.0, False, width),
            Embedding(_POSITIONS, _POSITIONS, "position", 1.0, False, width),
        ),
        residual_projections=tuple(projections),
        norms=(),
        head=Head(_HEAD, tied=True),
        matrices=tuple(matrices),
        tied=((_TOKENS, _HEAD),),
    )
    return residual, shapes


def _missing_stds(inner: list[Fill], outer: list[Fill], a: float | None, layers: int) -> Iterator[str]:
    if inner and a is None:
        yield f"sub-layer matrices of several stds ({_range(inner)}): --init-method-std is one for all"
    if outer and a is None:
        yield f"output layers (W_O, W_2) with std {_range(outer)}: Megatron-LM divides --init-method-std by sqrt(2 N)"
    elif outer and a is not None:
        drawn = a / math.sqrt(2 * layers)
        if not all(math.isclose(fill.std, drawn, rel_tol=_ROUNDING) for fill in outer):
            remedy = "; in Python, TransformerConfig.output_layer_init_method takes any function" * _one_std(outer)
            yield (
                f"output layers (W_O, W_2) with std {_range(outer)}: Megatron-LM draws them with {_number(drawn)},"
                f" --init-method-std / sqrt(2 N), whatever its options{remedy}"
            )
    if shapes := {fill.distribution: fill for fill in (*inner, *outer) if fill.distribution != "normal"}:
        cut = next((f" at {fill.cut:g} stds" for fill in shapes.values() if fill.cut), "")
        yield f"a {' or '.join(shapes)} distribution{cut}: Megatron-LM draws from whole normal ones, of the same std"


def _missing_head(head: Fill | None, drawn: float | None) -> Iterator[str]:
    if head is not None and (drawn is None or not math.isclose(head.std, drawn, rel_tol=_ROUNDING)):
        instead = "" if drawn is None else f", Megatron-LM draws it with {_number(drawn)}"
        yield f"a head with std {_number(head.std)}{instead}"


def _missing_structure(plan: Plan, recipe: Recipe) -> Iterator[str]:
    for edit in plan.edits:
        match edit:
            case NormEmbedding():
                yield "a norm behind the embedding: no option adds one; scaled-embed makes the same large shortcut"
            case DetachEmbedding():
                yield f"{edit.gradient:g} of the embedding's gradient: no option damps it"
    if recipe.no_decay_embeddings:
        yield (
            "no weight decay on embeddings: the help of --embedding-init-method-std promises it, the optimiser decays"
            " them all the same"
        )


def _notes(plan: Plan, fills: dict[str, Fill], e: float | None, scale: ScaleEmbedding | None) -> Iterator[str]:
    positions = fills.get(_POSITIONS)
    factors = {edit.module: edit.factor for edit in plan.select(ScaleEmbedding)}
    others = []
    if positions is not None and 0 in positions.axes:
        others.append("are drawn with the tokens' std, not with one that goes with their number")
    elif positions is not None and e is not None and positions.std != e:
        others.append(f"are drawn with std {_number(e)}, not {_number(positions.std)}")
    if factors.get(_TOKENS, 1.0) != factors.get(_POSITIONS, 1.0):
        others.append("are multiplied too")
    if others:
        yield (
            f"learned positions, Megatron-LM's default, {' and '.join(others)}: choose --position-embedding-type rope"
            " or none for the recipe itself"
        )
    if scale is not None and e is not None:
        yield (
            "--use-mup is in Megatron-LM since February 2026. Before, --embedding-init-method-std"
            f" {_number(e * scale.factor)} with an untied head starts the stream alike, but Adam's step, relative to a"
            f" row, is {scale.factor:.3g} times smaller"
        )
    if scale is not None and not plan.select(Untie):
        yield "a tied head makes the initial loss far larger than log V: --untie gives it a matrix of its own"
    yield "the stds are the recipe's; the values that are drawn are Megatron-LM's own"


def _names(layers: int, parts: Iterable[str]) -> list[str]:
    return [f"layers.{layer}.{part}" for layer in range(layers) for part in parts]


def _one_std(fills: list[Fill]) -> bool:
    return len({fill.std for fill in fills}) == 1


def _range(fills: list[Fill]) -> str:
    stds = [fill.std for fill in fills]
    return _number(min(stds)) if _one_std(fills) else f"{_number(min(stds))} to {_number(max(stds))}"


def _number(value: float) -> str:
    """Nine digits: enough for every float32."""
    return f"{value:.9g}"
