"""Architectures drawn at random: what is called proven is right, by the model's own count; what is refused is no sum.

python -m tests.residual.test_generated 20000 0      so many, from this seed, with a count for every feature
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaForCausalLM

import spikepatch
from spikepatch.errors import Refused
from tests.residual.generator import (
    BRANCHES,
    FEED_FORWARD,
    NO_STARTS,
    NO_SUMS,
    NOTATIONS,
    PLACEMENTS,
    STARTS,
    SUBLAYERS,
    SUMS,
    TOKENS,
    Model,
    Spec,
    Truth,
    example,
    truth,
)

#: Of true sums, at most so many may be refused.
REFUSED = 0.1


def draw(rng: random.Random) -> Spec:
    """One spec; a third of them have something on the stream that makes it no sum."""
    blocks = rng.choice([1, 2, 2, 3])
    kinds = [tuple(rng.choices(list(SUBLAYERS), k=rng.choice([1, 2, 2, 3]))) for _ in range(blocks)]
    placement = rng.choice(PLACEMENTS)
    if placement == "parallel":
        kinds = [("attention", rng.choice(FEED_FORWARD)) for _ in kinds]
    spoilt = rng.random() < 0.35
    on_stream = [rng.choice(SUMS) if rng.random() < 0.4 else "nothing" for _ in range(sum(map(len, kinds)))]
    on_stream = [rng.choice(NO_SUMS) if spoilt and rng.random() < 0.5 else name for name in on_stream]
    return Spec(
        kinds=tuple(kinds),
        placement=placement,
        notation=rng.choice(NOTATIONS),
        on_stream=tuple(on_stream),
        start=rng.choice(NO_STARTS if spoilt and rng.random() < 0.25 else STARTS),
        scale=rng.choice(["none", "none", "layer scale", "constant", "bias"]),
        branch=rng.choice(["none"] * 10 + [*BRANCHES]),
        shared=rng.random() < 0.15,
        tied=rng.random() < 0.4,
        in_place=rng.random() < 0.15,
        bias=rng.random() < 0.4,
        spare=rng.random() < 0.1,
        heads=rng.choice([1, 1, 1, 2]),
        closures=rng.random() < 0.15,
    )


@dataclass
class Tally:
    """``wrong``: called proven, and not true. ``refused``: sums of which no map is proven. ``features``: of all."""

    proven: int = 0
    rightly: int = 0
    wrong: list[tuple[Spec, Truth, str]] = field(default_factory=list)
    refused: list[tuple[Spec, str]] = field(default_factory=list)
    features: Counter[str] = field(default_factory=Counter)

    def add(self, spec: Spec) -> None:
        true, model = truth(spec), Model(spec)
        names = {name for name, _ in model.named_parameters()}
        found, why = verdict(spec, model)
        is_sum = true.is_sum and true.always and not true.spare
        self.features.update(features(spec))
        if found is None:
            self.rightly += not is_sum
            self.refused += [(spec, why)] if is_sum else []
            return
        projections = {p.parameter for p in found.residual_projections}
        right = is_sum and found.sublayers == true.sublayers and projections == true.projections
        self.proven += right
        self.wrong += [] if right else [(spec, true, f"S = {found.sublayers}, {sorted(projections)}")]
        covered(names, found)


def verdict(spec: Spec, model: Model | None = None) -> tuple[spikepatch.ResidualMap | None, str]:
    """The map of ``Model(spec)``, if it is proven for every input; else why not."""
    try:
        found = spikepatch.inspect(model or Model(spec), example_inputs=example())
    except Refused as error:
        return None, error.why
    reasons = (*found.leaks, *found.conditions)
    return (None, reasons[0]) if reasons else (found, "")


def covered(names: set[str], found: spikepatch.ResidualMap) -> None:
    """Every parameter has a use, and only projections are said to be some."""
    assert {use.parameter for use in found.uses} == names
    projections = {use.parameter for use in found.uses if use.role == "projection"}
    assert projections == {p.parameter for p in found.residual_projections}


def features(spec: Spec) -> set[str]:
    used = {kind for block in spec.kinds for kind in block} | {f"{name} on the stream" for name in spec.on_stream}
    several = {f"{spec.heads} heads"}
    flags = several | {
        name for name in ("shared", "tied", "in_place", "bias", "spare", "closures") if getattr(spec, name)
    }
    named = {f"{spec.notation[1]} ({spec.notation[0]})", f"{spec.placement} placement", f"{spec.start} start"}
    return used | flags | named | {f"{spec.branch} branch", f"{spec.scale} scale"}


def tally(count: int, seed: int) -> Tally:
    rng, found = random.Random(seed), Tally()
    for _ in range(count):
        found.add(draw(rng))
    return found


@pytest.mark.parametrize(
    ("count", "seed"),
    [(200, 0), pytest.param(2800, 1, marks=pytest.mark.slow)],
)
def test_no_wrong_map_is_called_proven(count: int, seed: int) -> None:
    found = tally(count, seed)
    assert found.wrong == []
    assert found.proven > count / 4
    assert found.rightly > count / 4
    assert len(found.refused) <= REFUSED * (found.proven + len(found.refused)), found.refused[:5]
    if count > 500:
        assert min(found.features.values()) > count / 100, found.features
        every = {*SUBLAYERS, *(f"{name} on the stream" for name in (*SUMS, *NO_SUMS))}
        assert every <= found.features.keys()


TWO = (("attention", "mlp"), ("attention", "mlp"))


@pytest.mark.parametrize("notation", NOTATIONS, ids=" ".join)
@pytest.mark.parametrize(
    ("placement", "says"),
    [
        ("post", "post-norm"),
        ("branch", "branch-norm"),
        pytest.param("pre", "pre-norm", marks=pytest.mark.slow),
        pytest.param("parallel", "parallel", marks=pytest.mark.slow),
    ],
)
def test_every_notation_of_a_norm(notation: tuple[str, str], placement: str, says: str) -> None:
    found, why = verdict(Spec(TWO, placement, notation))
    assert found is not None, why
    assert (found.placement, found.sublayers) == (says, 4)
    assert {norm.kind for norm in found.norms} == {"rmsnorm" if notation[0] == "rms" else "layernorm"}
    assert {norm.gain for norm in found.norms} == {"1+w" if notation[1] == "one plus gain" else "w"}
    without = notation[1] in {"without eps", "by the largest first"}
    assert {norm.eps for norm in found.norms} <= ({0.0} if without else {1e-5, 1e-6, 1e-12})
    assert all(norm.parameter is not None for norm in found.norms)
    assert all((norm.bias is not None) == (notation[0] == "layer") for norm in found.norms)
    recipe = spikepatch.plan(Model(Spec(TWO, placement, notation)), "vanilla", reinit="all", example_inputs=example())
    behind = [skip for skip in recipe.skips if skip.reason.startswith("scale-invariant")]
    assert len(behind) == (4 if placement == "branch" else 0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tanh", "tanh"), ("gelu", "gelu"), ("clamp", "clamp"), ("soft cap", "tanh"), ("matrix", "a matrix"),
        ("sigmoid", "sigmoid"), ("square", ""), ("highway", ""), ("mixture", ""),
    ],
)  # fmt: skip
def test_what_stands_on_the_stream_is_named(name: str, words: str) -> None:
    found, why = verdict(Spec(TWO, on_stream=("nothing", name)))
    assert found is None
    if words:
        assert f"the stream goes through {words}" in why
        assert "after blocks.0.1.b" in why


OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softplus": torch.nn.functional.softplus,
    "pow": lambda x: x**3,
    "abs": torch.abs,
    "sin": torch.sin,
    "softmax": lambda x: x.softmax(-1),
    "minimum": lambda x: torch.minimum(x, torch.tensor(5.0)),
    "cumsum": lambda x: x.cumsum(1),
    "sort": lambda x: x.sort(-1)[0],
    "a mean of tokens": lambda x: x + x.mean(1, keepdim=True),
    "rounding": lambda x: x + (x.round() - x).detach(),
    "a gate of itself": lambda x: x * torch.sigmoid(x),
    "a mixture with itself": lambda x: torch.lerp(x, x.tanh(), x.sigmoid()),
}


class Spoilt(Model):
    """One of OTHERS stands on the stream behind every addition."""

    def on_stream(self, name: str, x: torch.Tensor, n: int, before: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        return OTHERS[name](x)


@pytest.mark.parametrize("name", OTHERS)
def test_operations_that_no_table_knows(name: str) -> None:
    found = spikepatch.inspect(Spoilt(Spec(TWO, on_stream=(name,) * 4)), example_inputs=example())
    assert not found.proven
    if " " not in name and name != "rounding":
        assert f"the stream goes through {name}, after blocks.0.0.o" in found.leaks[0]


def test_a_gate_on_the_whole_stream_is_named() -> None:
    found, why = verdict(Spec(TWO, on_stream=("highway",) * 4))
    assert found is None
    assert why == "the stream is multiplied by a gate that extra.0 computes, so it is not a sum"


def test_a_layer_that_text_alone_skips() -> None:
    """It is run with the states that its forward asks for; so the sub-layers of these layers are counted too."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    found = spikepatch.inspect(GPT2LMHeadModel(GPT2Config(add_cross_attention=True, **sizes)))
    assert (found.proven, found.sublayers, found.conditions, found.unread) == (True, 6, (), ())
    config = MllamaTextConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48,
        vocab_size=50, cross_attention_layers=[1], max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        found = spikepatch.inspect(MllamaForCausalLM(config).to(dtype))
        assert (found.proven, found.sublayers, found.conditions, found.unread) == (True, 6, (), ())


def test_a_block_that_is_never_run() -> None:
    """The map holds for such inputs, says of what it knows nothing, and no weights are drawn by it."""
    model = Model(Spec(TWO, spare=True))
    found = spikepatch.inspect(model, example_inputs=example())
    assert found.proven
    assert "blocks.2.0.qkv" in found.conditions[0]
    assert {name for name in found.unread if name.startswith("blocks.2.")} == {
        name for name, _ in model.named_parameters() if name.startswith("blocks.2.")
    }
    assert {use.role for use in found.uses if use.parameter in found.unread} == {"unread"}
    with pytest.raises(Refused, match=r"for inputs like the traced ones only(.|\n)*blocks\.2\.0(.|\n)*example_inputs"):
        spikepatch.plan(model, "vanilla", reinit="all", example_inputs=example())
    assert spikepatch.plan(model, "scaled-embed", reinit="none", example_inputs=example()).edits


@pytest.mark.parametrize("branch", ["value", "id"])
def test_a_branch_that_values_decide(branch: str) -> None:
    model = Model(Spec(TWO, branch=branch))
    found = spikepatch.inspect(model, example_inputs=example())
    assert not found.proven
    assert "generator.py, line " in found.leaks[0]
    assert "chooses the way here" in found.leaks[0]
    with pytest.raises(Refused, match=r"generator\.py, line"):
        spikepatch.plan(model, "vanilla", reinit="all", example_inputs=example())


def test_a_branch_that_adds_nothing() -> None:
    found, why = verdict(Spec(TWO, branch="value, in vain"))
    assert found is not None, why


class WithATower(nn.Module):
    """Parameters outside the blocks, which the pass does not read: they are listed, and the map is proven."""

    def __init__(self) -> None:
        super().__init__()
        self.text = Model(Spec(TWO))
        self.tower = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.text(ids, states)
        return logits


def test_a_tower_that_is_not_read() -> None:
    found = spikepatch.inspect(WithATower(), example_inputs=example())
    assert (found.proven, found.conditions) == (True, ())
    assert {"tower.weight", "tower.bias"} < set(found.unread)


def main(count: int, seed: int) -> None:
    assert TOKENS == 11
    found = tally(count, seed)
    out = sys.stdout.write
    out(f"{count} from seed {seed}: {found.proven} proven and right, {found.rightly} rightly refused,")
    out(f" {len(found.wrong)} WRONG, {len(found.refused)} sums refused\n")
    for wrong in found.wrong[:20]:
        out(f"wrong: {wrong}\n")
    for spec, why in found.refused[:20]:
        out(f"refused: {why}: {spec}\n")
    for name, times in sorted(found.features.items(), key=lambda item: item[1]):
        out(f"{times:7} {name}\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
