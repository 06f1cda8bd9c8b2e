"""Two appliers, one result: the live model and the checkpoint folder end with the same bits, for the same plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import spikepatch
from spikepatch.plans.plan import Fill, Recipe, ScaleEmbedding
from spikepatch.recipes.built_in import RECIPES
from spikepatch_transforms.embed_norm import EmbedNorm
from spikepatch_transforms.residual_init import ResidualInit
from spikepatch_transforms.small_init import SmallInit
from tests.apply.same_bits import SETTINGS, answers
from tests.architectures import encoder_decoder, ids, tiny_config, tiny_model
from tests.residual.maps import SCALED_ALREADY, TYPES


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert a
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def logits(model: PreTrainedModel) -> torch.Tensor:
    """By the same kernels, on equally aligned weights: a file that is mapped at an odd address is summed in another
    order, and some versions of transformers choose another implementation of experts for a class that they load.
    """
    model.set_experts_implementation("eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        result: torch.Tensor = model.eval()(ids(model)).logits
    return result


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", TYPES)
def test_fresh_weights(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    recipe = "vanilla" if model_type in SCALED_ALREADY else "scaled-embed"
    config = tiny_config(model_type, dtype=dtype)
    config.save_pretrained(tmp_path / "source")
    spikepatch.convert(str(tmp_path / "source"), tmp_path / "disk", recipe=recipe, seed=3)

    model = tiny_model(model_type, dtype=dtype)
    assert model.dtype == dtype
    model.save_pretrained(tmp_path / "plain")
    identity = {name: id(p) for name, p in model.named_parameters()}
    spikepatch.patch(model, recipe, reinit="all", seed=3)
    assert {name: id(p) for name, p in model.named_parameters()} == identity
    spikepatch.save(model, tmp_path / "live")

    same_bits(tensors(tmp_path / "disk"), tensors(tmp_path / "live"))
    plain = {name: (t.shape, t.dtype) for name, t in tensors(tmp_path / "plain").items()}
    assert {name: (t.shape, t.dtype) for name, t in tensors(tmp_path / "disk").items()} == plain

    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "disk", trust_remote_code=True, output_loading_info=True, dtype=dtype
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
    if dtype == torch.bfloat16:
        # transformers makes some non-persistent buffers in another precision when it loads than when it builds.
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "live", trust_remote_code=True, dtype=dtype).eval()
    assert torch.equal(logits(loaded), logits(model))


#: What the built-in recipes do not have: experts by fan, std by layer, a gain of each convention, norms without gain.
OWN = {
    recipe.name: recipe
    for recipe in (
        Recipe("mitchell", (SmallInit("fan_in", cut=3.0), ResidualInit("fan_in", cut=3.0, scale="mitchell"))),
        Recipe("gains", (SmallInit(uniform=True), ResidualInit(uniform=True, branch_gain=True))),
        Recipe("bare-norm", (SmallInit(), ResidualInit(), EmbedNorm(norm="rmsnorm", affine=False))),
    )
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        *(("gpt2", name) for name in RECIPES if name != "scaled-embed"),
        ("mixtral", "xavier"),
        ("mixtral", "mitchell"),
        ("olmo2", "gains"),
        ("gemma2", "gains"),
        ("llama", "bare-norm"),
    ],
)
def test_every_recipe(model_type: str, name: str, tmp_path: Path) -> None:
    """Live and disk, for every kind of edit; and both load again, by the generated class where there is one."""
    recipe = OWN.get(name) or RECIPES[name]
    tiny_config(model_type).save_pretrained(tmp_path / "source")
    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "disk", recipe=recipe, seed=3)
    model = tiny_model(model_type)
    spikepatch.patch(model, recipe, reinit="all", seed=3)
    spikepatch.save(model, tmp_path / "live")
    same_bits(tensors(tmp_path / "disk"), tensors(tmp_path / "live"))
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("disk", "live")]
    assert configs[0]["spikepatch"] == configs[1]["spikepatch"]
    # What a generated class replaces in the config is no part of the plan.
    assert result.plan.record(spikepatch.__version__).items() <= configs[0]["spikepatch"].items()
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "disk", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values())
    same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "recipe", "reinit"),
    [
        ("t5", "scaled-embed", "all"),
        ("t5", "embed-ln", "all"),
        ("t5", "embed-detach", "none"),
        ("t5", "scaled-embed", "residual"),
        ("bart", "vanilla", "all"),
    ],
)
def test_encoder_decoders(model_type: str, recipe: str, reinit: Any, tmp_path: Path) -> None:
    model: Any = encoder_decoder(model_type)
    model.save_pretrained(tmp_path / "source")
    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "disk", recipe=recipe, reinit=reinit, seed=3)
    spikepatch.patch(model, recipe, reinit=reinit, seed=3)
    spikepatch.save(model, tmp_path / "live")
    assert len(result.plan.streams) == 2
    same_bits(tensors(tmp_path / "disk"), tensors(tmp_path / "live"))
    tokens = {"input_ids": ids(model), "decoder_input_ids": ids(model, 5)}
    with torch.no_grad():
        expected = model.eval()(**tokens).logits
    for side in ("disk", "live"):
        loaded, info = AutoModelForSeq2SeqLM.from_pretrained(
            tmp_path / side, trust_remote_code=True, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
        for parameter in loaded.parameters():
            parameter.data = parameter.data.clone()
        with torch.no_grad():
            assert torch.equal(loaded.eval()(**tokens).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("reinit", ["residual", "none"])
@pytest.mark.parametrize("recipe", ["scaled-embed", "embed-ln"])
@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "gpt_neox"])
def test_kept_weights(model_type: str, recipe: str, reinit: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "source")
    before = tensors(tmp_path / "source")
    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "disk", recipe=recipe, reinit=reinit)  # type: ignore[arg-type]
    plan = spikepatch.plan(model, recipe, reinit=reinit)  # type: ignore[arg-type]
    assert plan.edits == result.plan.edits
    spikepatch.patch(model, plan)
    spikepatch.save(model, tmp_path / "live")
    written = tensors(tmp_path / "disk")
    same_bits(written, tensors(tmp_path / "live"))

    drawn = {fill.parameter for fill in result.plan.select(Fill)}
    kept = [name for name in before if torch.equal(before[name], written[name])]
    assert len(kept) < len(before) if reinit == "residual" else len(kept) == len(before)
    assert bool(drawn) == (reinit == "residual")
    same_bits(before, tensors(tmp_path / "source"))


@pytest.mark.parametrize("reinit", ["all", "none"])
def test_untie(reinit: str, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "source")
    spikepatch.convert(str(tmp_path / "source"), tmp_path / "disk", untie=True, reinit=reinit)  # type: ignore[arg-type]
    spikepatch.patch(model, "scaled-embed", untie=True, reinit=reinit)  # type: ignore[arg-type]
    spikepatch.save(model, tmp_path / "live")
    written = tensors(tmp_path / "disk")
    same_bits(written, tensors(tmp_path / "live"))
    assert {"lm_head.weight", "transformer.wte.weight"} <= written.keys()
    assert torch.equal(written["lm_head.weight"], written["transformer.wte.weight"]) is (reinit == "none")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "disk", trust_remote_code=True)
    assert loaded.lm_head.weight is not loaded.transformer.wte.weight
    assert torch.equal(loaded.lm_head.weight, written["lm_head.weight"])


def test_positions() -> None:
    for model_type, path in (("gpt2", "transformer"), ("opt", "model.decoder")):
        model = tiny_model(model_type)
        plan = spikepatch.plan(model, "scaled-embed", reinit="all", positions=True)
        scaled = [e.module for e in plan.edits if isinstance(e, ScaleEmbedding)]
        assert len(scaled) == 2
        assert all(name.startswith(path) for name in scaled)
        spikepatch.patch(model, plan)
        table = model.get_submodule(scaled[1])
        assert table.embed_scale == 8.0


def test_a_plain_module() -> None:
    from tests.residual.test_stream import EXAMPLE, Model

    torch.manual_seed(0)
    model = Model()
    spikepatch.patch(model, "scaled-embed", reinit="residual", example_inputs=EXAMPLE)
    assert model.tokens.embed_scale == pytest.approx(1 / float(model.tokens.weight.detach().double().std()))
    std = float(model.get_parameter("blocks.0.down.weight").detach().std())
    assert std == pytest.approx((2 / (5 * 16) / 2) ** 0.5, rel=0.15)


@pytest.mark.slow
def test_the_bits_do_not_depend_on_the_machine() -> None:
    """``python -m tests.apply.same_bits`` has ten types."""
    first, *others = answers(["gpt2", "mixtral", "mamba"])
    assert all(len(hashes) > 20 for hashes in first.values())
    assert others == [first] * (len(SETTINGS) - 1)
