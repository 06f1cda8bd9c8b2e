"""Images and sounds among the tokens: where their features enter, and that they are as large as the tokens afterwards.

What is true is measured by hooks on the running models, in the input of the first layer of the language part.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from transformers import PreTrainedModel

import spikepatch
from spikepatch.cli import main
from spikepatch.residual.feature_size import measured
from spikepatch.residual.trace import full_example

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 48, "vocab_size": 100, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
GRID = {
    "depth": 3, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
AUDIO = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "num_mel_bins": 16,
    "max_source_positions": 32,
}  # fmt: skip
TOKENS = {"image_token_id": 99, "vision_start_token_id": 97, "vision_end_token_id": 98, "video_token_id": 96}


def built(name: str, **config: Any) -> PreTrainedModel:
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = kind(getattr(transformers, f"{name}Config")(**config)).eval()
    return model


def llava() -> PreTrainedModel:
    vision = transformers.CLIPVisionConfig(**VISION)
    return built("Llava", text_config=transformers.LlamaConfig(**TEXT), vision_config=vision, image_token_id=99)


def qwen3_vl() -> PreTrainedModel:
    vision = {
        **GRID, "hidden_size": 24, "intermediate_size": 40, "out_hidden_size": 32, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    return built("Qwen3VL", text_config={**TEXT, **ROPE}, vision_config=vision, **TOKENS)


def idefics3() -> PreTrainedModel:
    text = {**transformers.LlamaConfig(**TEXT).to_dict(), "model_type": "llama"}
    return built("Idefics3", text_config=text, vision_config=VISION, image_token_id=99, scale_factor=2)


def voxtral() -> PreTrainedModel:
    text = {**transformers.LlamaConfig(**TEXT).to_dict(), "model_type": "llama"}
    return built("Voxtral", audio_config=AUDIO, text_config=text, audio_token_id=99)


def deepseek_vl() -> PreTrainedModel:
    """The method that makes the features is that of the model without a head."""
    text = {**transformers.LlamaConfig(**TEXT).to_dict(), "model_type": "llama"}
    return built("DeepseekVL", text_config=text, vision_config=VISION, image_token_id=99)


def lfm2_vl() -> PreTrainedModel:
    """Patches in a row, with their shapes and a mask."""
    text = {**transformers.LlamaConfig(**TEXT).to_dict(), "model_type": "llama"}
    vision = {k: v for k, v in VISION.items() if k != "image_size"} | {"model_type": "siglip2_vision_model"}
    return built("Lfm2Vl", text_config=text, vision_config=vision, image_token_id=99, projector_hidden_size=40)


def video_llava() -> PreTrainedModel:
    """Its images have a name of their own."""
    text = {**transformers.LlamaConfig(**TEXT).to_dict(), "model_type": "llama"}
    vision = {**VISION, "model_type": "clip_vision_model"}
    return built("VideoLlava", text_config=text, vision_config=vision, image_token_index=99, video_token_index=98)


ENTRANCES: dict[Callable[[], PreTrainedModel], dict[str, str | None]] = {
    llava: {"model.multi_modal_projector.linear_2.weight": None},
    qwen3_vl: {
        "model.visual.merger.linear_fc2.weight": None,
        "model.visual.deepstack_merger_list.0.linear_fc2.weight": "model.language_model.layers.0.mlp.down_proj.weight",
        "model.visual.deepstack_merger_list.1.linear_fc2.weight": "model.language_model.layers.1.mlp.down_proj.weight",
    },
    idefics3: {"model.connector.modality_projection.proj.weight": None},
    voxtral: {"model.multi_modal_projector.linear_2.weight": None},
    deepseek_vl: {"model.aligner.linear2.weight": None},
    lfm2_vl: {"model.multi_modal_projector.linear_2.weight": None},
    video_llava: {"model.multi_modal_projector.linear_2.weight": None},
}


@pytest.mark.parametrize("kind", ENTRANCES)
def test_where_features_enter(kind: Callable[[], PreTrainedModel]) -> None:
    model = kind()
    found = spikepatch.inspect(model)
    assert (found.proven, found.conditions, found.sublayers, found.placement) == (True, (), 4, "pre-norm")
    assert {e.parameter: e.after for e in found.entrances} == ENTRANCES[kind]
    assert all(not e.normed and e.fan_in > 0 for e in found.entrances)
    assert [e.kind for e in found.embeddings] == ["token"]
    roles = {use.parameter: use.role for use in found.uses}
    assert roles.keys() == {name for name, _ in model.named_parameters()}
    assert all(roles[name] == "entrance" for name in ENTRANCES[kind])


def test_the_sizes_are_those_of_the_model_itself() -> None:
    model = llava()
    (entrance,) = measured(model, spikepatch.inspect(model)).entrances
    assert entrance.size == pytest.approx(sizes(model)[1], rel=0.2)  # other draws of 4 features


def sizes(model: PreTrainedModel) -> tuple[float, float]:
    """Root mean square of the stream's start, at the places of text and at those of features."""
    example, seen = full_example(model), []
    (layer,) = (
        m for name, m in model.named_modules() if name.endswith(("language_model.layers.0", "text_model.layers.0"))
    )
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**example)
    hook.remove()
    features = example["input_ids"] == 99
    assert bool(features.any())
    return (float(seen[0][~features].square().mean().sqrt()), float(seen[0][features].square().mean().sqrt()))


@pytest.mark.parametrize("kind", ENTRANCES)
def test_fresh_features_are_as_large_as_the_tokens(kind: Callable[[], PreTrainedModel]) -> None:
    model = kind()
    text, features = sizes(model)
    assert features < 0.3
    text, features = sizes(spikepatch.patch(model, "scaled-embed", reinit="all", seed=3))
    assert text == pytest.approx(0.632, rel=0.2)
    # Some dozen features of a width of 32, of a tower of a width of 24: single draws are off by a quarter.
    assert 0.6 < features < 1.6


def test_what_would_leave_features_small_is_refused() -> None:
    model = llava()
    with pytest.raises(spikepatch.Refused, match=r"normalises(.|\n)*--part language"):
        spikepatch.plan(model, "embed-ln", reinit="all")
    with pytest.raises(spikepatch.Refused, match=r"kept(.|\n)*--part language"):
        spikepatch.plan(model, "scaled-embed", reinit="none")
    for recipe, reinit in (("embed-ln", "all"), ("scaled-embed", "none")):
        plan = spikepatch.plan(model, recipe, reinit=reinit, part="language")  # type: ignore[arg-type]
        reasons = {skip.target: skip.reason for skip in plan.skips}
        assert reasons["model.multi_modal_projector.linear_2.weight"].startswith("as small as it is, since ")
    assert spikepatch.plan(model, "vanilla", reinit="all").edits


def test_features_that_were_not_traced() -> None:
    """Text alone tells nothing of where an image enters."""
    text = {"input_ids": torch.arange(5, 16)[None]}
    found = spikepatch.inspect(llava(), example_inputs=text)
    assert [(e.inputs, e.parameter) for e in found.entrances] == [(("image",), None)]
    with pytest.raises(spikepatch.Refused, match="they were not traced"):
        spikepatch.plan(llava(), "scaled-embed", reinit="all", example_inputs=text)


@pytest.mark.slow
def test_the_commands(tmp_path: Path) -> None:
    for kind in (llava, qwen3_vl):
        model = kind()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path / kind.__name__)
        shown = CliRunner().invoke(main, ["inspect", str(tmp_path / kind.__name__)])
        assert "features of pixel_values" in shown.output
        run = CliRunner().invoke(main, ["check", str(tmp_path / kind.__name__), "--recipe", "scaled-embed"])
        assert run.exit_code == 0, run.output
        refused = CliRunner().invoke(
            main, ["convert", str(tmp_path / kind.__name__), str(tmp_path / "out"), "--recipe", "embed-ln"]
        )
        assert refused.exit_code == 2
        assert "--part language" in refused.output
