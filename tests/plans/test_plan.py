"""Plans: pure data, the paper's numbers, every tensor accounted for, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikepatch.errors import Refused
from spikepatch.plans.plan import (
    Constant,
    Context,
    DetachEmbedding,
    Edit,
    Fill,
    NormEmbedding,
    Plan,
    Recipe,
    Reinit,
    ScaleEmbedding,
    Skip,
    StreamShape,
    Transform,
    Untie,
    cut_std,
)
from spikepatch.plans.work_out import make_plan
from spikepatch.recipes.built_in import RECIPES
from spikepatch.recipes.request import parse_request
from spikepatch.residual.map import ResidualMap, pattern
from tests.residual.maps import SCALED_ALREADY, TYPES, mapped, plan_of


def fresh(residual: ResidualMap, shapes: Mapping[str, tuple[int, ...]], recipe: str = "vanilla") -> Plan:
    return make_plan(residual, shapes, RECIPES[recipe], reinit="all", seed=0)


def stds(plan: Plan) -> dict[str, float]:
    return {fill.parameter: fill.std for fill in plan.select(Fill)}


# What each recipe writes: its formulas for d = 64, d_ffn = 256, S = 6, N = 3, 500 tokens and 64 positions.

SMALL = math.sqrt(2 / (5 * 64))
OLMO2 = 0.02 * cut_std(3.0)

#: std of (tokens, positions, W_qkv, W_1, attention's W_O, W_2), and what is not a fill.
GPT2: dict[str, tuple[tuple[float, ...], list[Edit]]] = {
    "vanilla": ((SMALL, SMALL, SMALL, SMALL, SMALL / math.sqrt(6), SMALL / math.sqrt(6)), []),
    "wang": ((SMALL, SMALL, SMALL, SMALL, 2 / (3 * 8), 2 / (3 * 8)), []),
    "xavier": (tuple(math.sqrt(2 / n) for n in (564, 128, 256, 320, 128, 320)), []),
    "unit-embed": (
        (1.0, SMALL, SMALL, SMALL, SMALL / math.sqrt(6), SMALL / math.sqrt(6)),
        [Untie("lm_head.weight", "transformer.wte.weight")],
    ),
    "olmo2-init": ((OLMO2,) * 6, []),
}
GPT2["scaled-embed"] = GPT2["vanilla"][0], [ScaleEmbedding("transformer.wte", 8.0, per_width=True)]
GPT2["embed-ln"] = GPT2["vanilla"][0], [NormEmbedding("transformer.wte", 1e-5)]
GPT2["embed-detach"] = GPT2["vanilla"][0], [DetachEmbedding("transformer.wte", 0.1)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_gpt2_by_formula(recipe: str) -> None:
    values, others = GPT2[recipe]
    places = ("wte", "wpe", "h.{}.attn.c_attn", "h.{}.mlp.c_fc", "h.{}.attn.c_proj", "h.{}.mlp.c_proj")
    expected = {
        f"transformer.{place.format(layer)}.weight": std
        for place, std in zip(places, values, strict=True)
        for layer in range(3)
    }
    if recipe == "unit-embed":
        expected["lm_head.weight"] = SMALL
    plan = plan_of("gpt2", recipe)
    assert stds(plan) == pytest.approx(expected, rel=1e-15)
    depth = {f.parameter: f.depth for f in plan.select(Fill) if f.depth}
    power = {"xavier": None, "olmo2-init": None, "wang": -1.0}.get(recipe, -0.5)
    assert depth == ({name: power for name in expected if "c_proj" in name} if power else {})
    assert [edit for edit in plan.edits if not isinstance(edit, Fill)] == others
    assert plan.structural is (recipe in {"scaled-embed", "embed-ln", "embed-detach"})
    tables = ("transformer.wte.weight", "transformer.wpe.weight")
    assert plan.no_decay == (tables if recipe in {"unit-embed", "olmo2-init"} else ())


#: Per layer, without the block's prefix: matrices of the small initialisation, and residual projections.
FORMULAS = {
    "llama": (
        [*(f"self_attn.{x}_proj" for x in "qkv"), "mlp.gate_proj", "mlp.up_proj"],
        ["self_attn.o_proj", "mlp.down_proj"],
    ),
    "gpt_neox": (
        ["attention.query_key_value", "mlp.dense_h_to_4h"],
        ["attention.dense", "mlp.dense_4h_to_h"],
    ),
    "mamba": (["mixer.in_proj"], ["mixer.out_proj"]),
    "mixtral": (
        [*(f"self_attn.{x}_proj" for x in "qkv"), "mlp.gate", "mlp.experts.gate_up_proj"],
        ["self_attn.o_proj", "mlp.experts.down_proj"],
    ),
    "falcon": (["self_attention.query_key_value", "mlp.dense_h_to_4h"], ["self_attention.dense", "mlp.dense_4h_to_h"]),
}


@pytest.mark.parametrize("model_type", FORMULAS)
def test_blocks_by_formula(model_type: str) -> None:
    small, residual = FORMULAS[model_type]
    plan = plan_of(model_type, "vanilla")
    sublayers = 3 * len(residual)
    assert len(plan.sublayers) == sublayers
    found = stds(plan)
    outside = {name for name in found if ".0." not in name and ".1." not in name and ".2." not in name}
    assert {found.pop(name) for name in outside} == {SMALL}
    prefix = next(iter(found)).partition(".0.")[0]

    def named(place: str, layer: int) -> str:
        return f"{prefix}.{layer}.{place}" + ("" if ".experts." in place else ".weight")

    expected = {named(place, layer): SMALL for place in small for layer in range(3)}
    expected |= {named(place, layer): SMALL / math.sqrt(sublayers) for place in residual for layer in range(3)}
    assert found == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("multiplier", [0.25, 1.5])
def test_a_multiplier_on_the_branch_is_divided_out(multiplier: float) -> None:
    residual, tensors = mapped("granite", residual_multiplier=multiplier)
    assert {p.multiplier for p in residual.residual_projections} == {multiplier}
    plan = fresh(residual, tensors)
    stds_on_the_stream = [multiplier * fill.std for fill in plan.select(Fill) if fill.depth]
    assert stds_on_the_stream == pytest.approx([SMALL / math.sqrt(6)] * 6, rel=1e-15)


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2"])
def test_behind_a_branch_norm(model_type: str) -> None:
    plan = plan_of(model_type, "vanilla")
    skips = [skip for skip in plan.skips if skip.reason.startswith("scale-invariant")]
    assert len(skips) == len(plan.sublayers) == 6
    assert all(any(skip.target.startswith(name) for skip in skips) for name in plan.sublayers)
    assert {stds(plan)[name] for name in plan.sublayers} == {SMALL}
    assert not any(fill.depth for fill in plan.select(Fill))


@pytest.mark.parametrize("reinit", ["all", "residual", "none"])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_tensor_once(model_type: str, reinit: Reinit) -> None:
    """Filled, or skipped with a reason; never both, never neither."""
    recipe = "vanilla" if model_type in SCALED_ALREADY else "scaled-embed"
    residual, tensors = mapped(model_type)
    if recipe == "vanilla" and reinit == "none":
        pytest.skip("nothing to change")
    plan = plan_of(model_type, recipe, reinit=reinit, std=0.02)
    filled = [fill.parameter for fill in plan.select(Fill)]
    skipped = [skip.target for skip in plan.skips if skip.target in set(tensors)]
    assert sorted(filled + skipped) == sorted(tensors)
    assert all(skip.reason for skip in plan.skips)
    projections = {p.parameter for p in residual.residual_projections}
    assert {"all": projections < set(filled), "residual": projections == set(filled), "none": not filled}[reinit]


def test_factors() -> None:
    def factors(**options: Any) -> list[ScaleEmbedding]:
        found: list[ScaleEmbedding] = plan_of("gpt2", **options).select(ScaleEmbedding)
        return found

    assert factors(factor=3.0) == [ScaleEmbedding("transformer.wte", 3.0)]
    assert factors(reinit="none", std=0.125) == [ScaleEmbedding("transformer.wte", 8.0)]
    assert factors(reinit="none", std=0.125, factor=2.0) == [ScaleEmbedding("transformer.wte", 2.0)]
    positions = factors(positions=True)
    assert [edit.module for edit in positions] == ["transformer.wte", "transformer.wpe"]


# Plans as data.


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("reinit", ["all", "residual"])
def test_planning_is_pure(recipe: str, reinit: str) -> None:
    if recipe == "unit-embed" and reinit == "residual":
        pytest.skip("it draws the embedding")
    residual = mapped("gpt2")[0].to_json()
    options: dict[str, Any] = {"reinit": reinit, "std": 0.1, "untie": True}
    first, second = plan_of("gpt2", recipe, **options), plan_of("gpt2", recipe, **options)
    assert first == second
    assert first.to_json() == second.to_json()
    assert mapped("gpt2")[0].to_json() == residual


names = st.text(min_size=1, max_size=12)
numbers = st.floats(min_value=1e-30, max_value=1e30)
edits = st.one_of(
    st.builds(
        Fill,
        names,
        numbers,
        st.sampled_from(["normal", "truncated", "uniform"]),
        numbers,
        st.integers(0, 2**20),
        st.lists(st.integers(0, 3)).map(tuple),
        st.sampled_from([0.0, -0.5, -1.0]),
        st.integers(0, 2),
    ),
    st.builds(Constant, names, numbers, numbers, st.sampled_from([0.0, -0.5]), st.integers(0, 2)),
    st.builds(ScaleEmbedding, names, numbers, st.booleans()),
    st.builds(NormEmbedding, names, numbers, st.sampled_from(["layernorm", "rmsnorm"]), st.booleans()),
    st.builds(DetachEmbedding, names, numbers),
    st.builds(Untie, names, names),
)
plans = st.builds(
    Plan,
    recipe=names,
    source=names,
    architecture=names,
    model_type=names,
    streams=st.lists(
        st.builds(StreamShape, st.integers(1, 2**20), st.lists(names, min_size=1).map(tuple), st.integers(0, 2)),
        min_size=1,
        max_size=3,
    ).map(tuple),
    reinit=st.sampled_from(["all", "residual", "none"]),
    seed=st.integers(0, 2**70),
    edits=st.lists(edits, max_size=5).map(tuple),
    skips=st.lists(st.builds(Skip, names, names), max_size=5).map(tuple),
    no_decay=st.lists(names).map(tuple),
)


@given(plan=plans)
def test_json_round_trip(plan: Plan) -> None:
    assert Plan.from_dict(json.loads(plan.to_json())) == plan
    assert hash(Plan.from_dict(json.loads(plan.to_json()))) == hash(plan)


def test_json_round_trip_of_a_real_plan() -> None:
    plan = plan_of("gpt2", positions=True, untie=True)
    assert {type(edit) for edit in plan.edits} == {Fill, ScaleEmbedding, Untie}
    assert Plan.from_dict(json.loads(plan.to_json())) == plan


# The record that generated code reads.


def test_record_of_routed_and_shared_experts() -> None:
    """Both are projections of one sub-layer: it is counted once, and both are filled."""
    residual, tensors = mapped("qwen2_moe", num_experts=4)
    assert len(residual.residual_projections) == 9
    init = fresh(residual, tensors).record("1")["init"]
    (stream,) = init["streams"]
    assert (stream["count"], stream["width"]) == (6, 64)
    assert stream["sublayers"] == ["model.layers.*.self_attn.o_proj.weight", "model.layers.*.mlp.experts.down_proj"]
    residuals = {fill["parameter"] for fill in init["fills"] if fill["depth"]}
    assert residuals == {*stream["sublayers"], "model.layers.*.mlp.shared_expert.down_proj.weight"}
    assert "model.layers.*.mlp.shared_expert_gate.weight" in {fill["parameter"] for fill in init["fills"]}


def test_record_of_a_hybrid() -> None:
    """Layers of attention and of Mamba, dense and with experts: one pattern each, and their matches add up to S."""
    residual, tensors = mapped("jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=4)
    assert {p.kind for p in residual.residual_projections} == {"attention", "mixer", "mlp", "moe"}
    init = fresh(residual, tensors).record("1")["init"]
    (stream,) = init["streams"]
    assert stream["count"] == residual.sublayers == sum(pattern(name) in stream["sublayers"] for name in tensors)
    assert len(stream["sublayers"]) == 4
    stds = [fill["std"] for fill in init["fills"] if fill["depth"]]
    assert stds == pytest.approx([SMALL / math.sqrt(6)] * 4, rel=1e-15)


@pytest.mark.parametrize("model_type", TYPES)
def test_record_says_what_the_plan_says(model_type: str) -> None:
    """Expanded over the model's parameters, the patterns give back every fill, and nothing else."""
    plan = plan_of(model_type, "vanilla")
    record = plan.record("1")
    assert json.loads(json.dumps(record)) == record
    fills = {fill["parameter"]: (fill["std"], fill["depth"]) for fill in record["init"]["fills"]}
    expanded = {n: fills.get(n, fills.get(pattern(n))) for n in mapped(model_type)[1]}
    assert {n: f for n, f in expanded.items() if f} == {f.parameter: (f.std, f.depth) for f in plan.select(Fill)}


def test_record_of_layers_that_differ() -> None:
    def uneven(residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        for projection in residual.residual_projections:
            yield Fill(projection.parameter, 0.1 / (1 + (projection.layer or 0)))

    residual, tensors = mapped("gpt2")
    record = make_plan(residual, tensors, Recipe("uneven", (uneven,)), reinit="all", seed=0).record("1")
    assert len(record["init"]["fills"]) == 6
    assert not any("*" in fill["parameter"] for fill in record["init"]["fills"])


@pytest.mark.parametrize("reinit", ["residual", "none"])
def test_kept_weights_are_not_drawn_by_generated_code(reinit: Reinit) -> None:
    assert plan_of("gpt2", reinit=reinit, std=1.0).record("1")["init"] is None


# What is refused.


def test_a_recipe_that_changes_nothing() -> None:
    with pytest.raises(Refused, match=r"vanilla changes nothing with reinit=none(.|\n)*scaled-embed"):
        plan_of("gpt2", "vanilla", reinit="none")
    assert plan_of("gpt2", "vanilla", reinit="none", untie=True).edits


def test_an_unproven_map() -> None:
    residual, tensors = mapped("gpt2")
    unproven = dataclasses.replace(residual, proven=False, leaks=tuple(f"leak{i}" for i in range(7)))
    with pytest.raises(Refused, match=r"not proven(.|\n)*leak0; .*leak4; and 2 more(.|\n)*inspect"):
        fresh(unproven, tensors)


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (Fill("transformer.wte.weight", 1.0), r"transformer\.wte\.weight"),
        (ScaleEmbedding("transformer.wte", 2.0), r"transformer\.wte"),
        (NormEmbedding("transformer.wte", 1e-5), r"transformer\.wte"),
        (Untie("lm_head.weight", "transformer.wte.weight"), r"lm_head\.weight"),
    ],
)
def test_duplicates(edit: Edit, name: str) -> None:
    def again(residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        yield edit

    residual, tensors = mapped("gpt2")
    transforms: tuple[Transform, ...] = (
        *parse_request("scaled-embed", reinit="all", untie=True).recipe.transforms,
        again,
    )
    with pytest.raises(Refused, match=f"two transforms(.|\n)*{name} "):
        make_plan(residual, tensors, Recipe("twice", transforms), reinit="all", seed=0)


@pytest.mark.parametrize("recipe", ["vanilla", "embed-ln"])
@pytest.mark.parametrize("options", [{"factor": 2.0}, {"positions": True}, {"replace": True}])
def test_options_of_scaled_embed_only(recipe: str, options: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="--factor, --positions and --replace are for recipes that scale"):
        plan_of("gpt2", recipe, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reinit": "some"}, "no reinit mode 'some'"),
        ({"seed": -1}, "negative seed"),
        ({"factor": 0.0}, "positive number"),
        ({"factor": -1.0}, "positive number"),
        ({"factor": math.inf}, "positive number"),
        ({"factor": math.nan}, "positive number"),
    ],
)
def test_options_without_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        plan_of("gpt2", **options)
