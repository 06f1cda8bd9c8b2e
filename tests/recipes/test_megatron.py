"""Recipes in Megatron-LM's options: names as published, values as planned for a real model, gaps said plainly.

The oracle is Megatron-LM's own rule of initialisation, written down here from its TransformerConfig (see
``megatron_options.txt`` for the commit), and the plan of the same recipe on transformers' GPT-2, which is the classic
decoder that the options describe.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from spikepatch.cli import main
from spikepatch.errors import Refused
from spikepatch.plans.plan import Fill, Plan, Recipe, ScaleEmbedding, Untie
from spikepatch.recipes.built_in import RECIPES
from spikepatch.recipes.megatron import Expressed, express
from spikepatch.recipes.request import parse_request
from spikepatch_transforms.embed_init import EmbedInit
from spikepatch_transforms.embed_scale import EmbedScale
from spikepatch_transforms.residual_init import ResidualInit
from spikepatch_transforms.small_init import SmallInit
from tests.residual.maps import plan_of

WIDTH, LAYERS, VOCAB = 96, 3, 640
TYPES = {"int": int, "float": float, "str": str}

#: Nine significant digits are printed.
ROUNDED = 0.5e-8


def published() -> argparse.ArgumentParser:
    """A parser of the options in ``megatron_options.txt``."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    for line in Path(__file__).with_name("megatron_options.txt").read_text().splitlines():
        if line.startswith("--"):
            name, kind, default = line.split()
            if kind == "flag":
                parser.add_argument(name, action="store_true")
            else:
                parser.add_argument(name, type=TYPES[kind], default=None if default == "None" else TYPES[kind](default))
    return parser


def parsed(expressed: Expressed) -> argparse.Namespace:
    words = [word for name, value in expressed.options for word in (name, value) if word is not None]
    return published().parse_args(words)


def megatron_stds(options: argparse.Namespace) -> dict[str, float]:
    """What Megatron-LM draws with, by role: TransformerConfig.__post_init__, GPTModel and LanguageModelEmbedding."""
    inner = options.init_method_std
    table = inner if options.embedding_init_method_std is None else options.embedding_init_method_std
    return {
        "inner": inner,
        "outer": inner / math.sqrt(2 * options.num_layers),
        "tokens": table,
        "positions": table,
        "head": table if options.use_mup else inner,
    }


def planned(recipe: Recipe) -> Plan:
    changes = {"hidden_size": WIDTH, "n_embd": WIDTH, "vocab_size": VOCAB}
    return plan_of("gpt2", recipe, changes=changes)


ROLES = {
    "attn.c_attn": "inner",
    "mlp.c_fc": "inner",
    "attn.c_proj": "outer",
    "mlp.c_proj": "outer",
    "wte": "tokens",
    "wpe": "positions",
    "lm_head": "head",
}


def planned_stds(plan: Plan) -> dict[str, set[float]]:
    stds: dict[str, set[float]] = {}
    for fill in plan.select(Fill):
        role = next(role for part, role in ROLES.items() if fill.parameter.endswith(f"{part}.weight"))
        stds.setdefault(role, set()).add(fill.std)
    return stds


CASES = {
    **RECIPES,
    "untied": dataclasses.replace(parse_request("scaled-embed", reinit="all", untie=True).recipe, name="untied"),
    "times-8": dataclasses.replace(
        parse_request("scaled-embed", reinit="all", factor=8.0, positions=True).recipe, name="times-8"
    ),
    "mitchell": Recipe("mitchell", (SmallInit(base="fan_in"), ResidualInit(scale="mitchell"))),
    "two-means": Recipe("two-means", (SmallInit(token_embedding=False), ResidualInit(), EmbedInit(0.1), EmbedScale())),
}


@pytest.mark.parametrize("name", CASES)
def test_the_options_give_what_the_plan_gives_or_say_what_they_do_not(name: str) -> None:
    """Every role whose std Megatron-LM would draw differently is named as not expressed, and no other."""
    expressed = express(CASES[name], width=WIDTH, layers=LAYERS, vocab=VOCAB)
    options, plan = parsed(expressed), planned(CASES[name])
    drawn, wanted = megatron_stds(options), planned_stds(plan)
    assert (options.num_layers, options.hidden_size) == (LAYERS, WIDTH)
    assert {"inner", "outer", "tokens", "positions"} <= wanted.keys()
    wrong = {r for r, stds in wanted.items() if any(not math.isclose(s, drawn[r], rel_tol=ROUNDED) for s in stds)}
    said = " ".join(expressed.missing)
    assert ("sub-layer matrices" in said) == ("inner" in wrong)
    assert ("output layers" in said) == ("outer" in wrong)
    assert ("a head" in said) == ("head" in wrong)
    assert ("learned positions" in " ".join(expressed.notes)) == (
        "positions" in wrong or len(plan.select(ScaleEmbedding)) == 1
    )
    assert "tokens" not in wrong
    factors = {edit.factor for edit in plan.select(ScaleEmbedding)}
    assert options.use_mup == bool(factors)
    assert all(math.isclose(options.mup_embedding_mult, factor, rel_tol=ROUNDED) for factor in factors)
    assert (options.mup_attn_scale_power == 0.5) == options.use_mup
    assert options.untie_embeddings_and_output_weights == bool(plan.select(Untie))


def test_which_recipes_are_expressed_whole() -> None:
    whole = {name for name in RECIPES if not express(RECIPES[name], width=WIDTH, layers=LAYERS, vocab=VOCAB).missing}
    assert whole == {"scaled-embed", "vanilla"}


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("embed-ln", "a norm behind the embedding"),
        ("embed-detach", "0.1 of the embedding's gradient"),
        ("olmo2-init", "a truncated distribution at 3 stds"),
        ("olmo2-init", "TransformerConfig.output_layer_init_method"),
        ("unit-embed", "no weight decay on embeddings"),
    ],
)
def test_what_is_missing_is_said(name: str, missing: str) -> None:
    assert any(missing in text for text in express(RECIPES[name], width=2048, layers=24).missing)


def test_the_values_are_the_papers() -> None:
    """Those of its model of 1.7 billion parameters, N = 24, d = 2304."""
    options = parsed(express(RECIPES["scaled-embed"], width=2304, layers=24))
    assert options.init_method_std == pytest.approx(0.01318, abs=5e-6)
    assert megatron_stds(options)["outer"] == pytest.approx(0.001902, abs=5e-7)
    assert options.mup_embedding_mult == 48


def test_the_vocabulary_is_asked_for_where_it_matters() -> None:
    with pytest.raises(Refused, match="give --vocab"):
        express(RECIPES["xavier"], width=WIDTH, layers=LAYERS)
    assert express(RECIPES["vanilla"], width=WIDTH, layers=LAYERS) == express(
        RECIPES["vanilla"], width=WIDTH, layers=LAYERS, vocab=VOCAB
    )


def test_the_command() -> None:
    words = ["recipes", "scaled-embed", "--for", "megatron", "--width", "2304", "--layers", "24"]
    shown = CliRunner().invoke(main, words).output
    quiet = CliRunner().invoke(main, [*words, "-q"]).output
    data = json.loads(CliRunner().invoke(main, [*words, "--json"]).output)
    assert shown.startswith(quiet)
    assert "This is the whole recipe." in shown
    assert published().parse_args(quiet.split()).mup_embedding_mult == 48
    assert data["options"]["--use-mup"] is True
    assert [line.split()[0] for line in quiet.splitlines()] == list(data["options"])
    assert "Not expressed:\n  a norm" in CliRunner().invoke(main, ["recipes", "embed-ln", *words[2:]]).output


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["vanilla", "--for", "megatron"], "--for needs --width and --layers."),
        (["--for", "megatron"], "--for needs NAME, --width and --layers."),
        (["--for", "megatron", "--width", "8", "--layers", "2"], "--for needs NAME."),
        (["vanilla", "--width", "8"], "go with --for"),
        (["embed-ln", "--for", "megatron", "--width", "8", "--layers", "2", "--factor", "2"], "scale the embedding"),
        (["scaled-embed", "--for", "megatron", "--width", "8", "--layers", "2", "--factor", "0"], "positive number"),
    ],
)
def test_what_does_not_fit_together(words: list[str], problem: str) -> None:
    done = CliRunner().invoke(main, ["recipes", *words])
    assert done.exit_code == 2
    assert problem in done.stderr
