"""Two appliers, one result: the live model and the checkpoint folder end with the same bits, for the same plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import spikepatch
from spikepatch.plans import Fill, ScaleEmbedding
from tests.architectures import SCALED_ALREADY, TYPES, ids, tiny_config, tiny_model


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


@pytest.mark.parametrize("reinit", ["residual", "none"])
@pytest.mark.parametrize("recipe", ["scaled-embed", "embed-ln"])
@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "gpt_neox"])
def test_kept_weights(model_type: str, recipe: str, reinit: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "source")
    before = tensors(tmp_path / "source")
    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "disk", recipe=recipe, reinit=reinit)  # type: ignore[arg-type]
    spikepatch.patch(model, recipe, reinit=reinit)  # type: ignore[arg-type]
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


def test_positions(tmp_path: Path) -> None:
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
