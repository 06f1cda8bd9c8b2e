"""Models of several modalities: towers keep their learned weights, the rest is drawn, and that is said before."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import PreTrainedModel

import spikepatch
from spikepatch.cli import main
from spikepatch.plans.plan import Plan
from tests.residual.test_features import ROPE, TEXT, TOKENS, VISION, built, llava, qwen3_vl, sizes, voxtral

Kind = Callable[[], PreTrainedModel]


def qwen2_vl() -> PreTrainedModel:
    vision = {
        "depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "in_channels": 3, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2,
    }  # fmt: skip
    return built("Qwen2VL", text_config={**TEXT, **ROPE}, vision_config=vision, **TOKENS)


def whisper() -> PreTrainedModel:
    return built(
        "Whisper", vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=32,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip


def mllama() -> PreTrainedModel:
    text = {**TEXT, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {
        **VISION, "num_global_layers": 1, "attention_heads": 2, "max_num_tiles": 2, "vision_output_dim": 48,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }  # fmt: skip
    text.pop("head_dim")
    return built("Mllama", text_config=text, vision_config=vision, image_token_id=99)


def blip() -> PreTrainedModel:
    """It runs on an image and text together alone."""
    text = {**TEXT, "encoder_hidden_size": 24, "is_decoder": True, "sep_token_id": 2}
    return built("Blip", text_config=text, vision_config=VISION, projection_dim=16)


#: Modules of the towers, and of what brings their features to the stream.
PARTS: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    llava: (("model.vision_tower",), ("model.multi_modal_projector",)),
    qwen2_vl: (
        ("model.visual.patch_embed", "model.visual.blocks", "model.visual.merger.ln_q"), ("model.visual.merger.mlp",),
    ),
    voxtral: (("model.audio_tower",), ("model.multi_modal_projector",)),
    whisper: (("model.encoder",), ()),
    blip: (("vision_model",), ()),
}  # fmt: skip


def learned(kind: Kind) -> PreTrainedModel:
    """As after training: nothing is what a constructor makes."""
    model = kind()
    with torch.no_grad():
        for i, (name, tensor) in enumerate(model.named_parameters()):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
            tensor.add_(noise, alpha=0.05 if "tower" in name or "visual" in name else 0.01)
    return model


@pytest.mark.parametrize("kind", PARTS)
def test_towers_stay(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    """By default, bit by bit; all else is another; what is said is what is so."""
    model, (towers, projector) = learned(kind), PARTS[kind]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = "vanilla" if kind is blip else "scaled-embed"  # a post-norm decoder
    plan = spikepatch.plan(model, recipe, reinit="all", seed=1)
    assert Plan.from_dict(json.loads(plan.to_json())) == plan
    assert {p.part: p.modules for p in plan.parts if p.part != "language"} == {
        part: modules for part, modules in (("projector", projector), ("towers", towers)) if modules
    }
    assert sum(p.elements for p in plan.parts) == sum(p.numel() for p in model.parameters())
    with caplog.at_level(logging.WARNING, logger="spikepatch"):
        spikepatch.patch(model, plan)
    said = [line for line in caplog.messages if line.startswith(("language: ", "projector: ", "towers: "))]
    assert said[-1].startswith("towers: kept as they are: ")
    assert len(said) == len(plan.parts)
    kept = 0
    for name, tensor in model.state_dict().items():
        same = torch.equal(tensor, before[name])
        assert same == name.startswith(tuple(f"{module}." for module in towers)), name
        kept += same
    assert kept == len(plan.kept) == plan.parts[-1].tensors


def test_features_of_learned_towers_are_as_large_as_the_tokens() -> None:
    """What the projector reads is measured with the tower's own weights."""
    model = learned(llava)
    with torch.no_grad():
        for p in model.model.vision_tower.parameters():
            p.mul_(3)
    text, features = sizes(spikepatch.patch(copy.deepcopy(model), "scaled-embed", reinit="all", seed=3))
    assert text == pytest.approx(0.632, rel=0.2)
    assert 0.6 < features < 1.6


def test_all_is_all() -> None:
    model = learned(llava)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = spikepatch.plan(model, "scaled-embed", reinit="all", part="all")
    assert (plan.kept, [p.weights for p in plan.parts]) == ((), ["drawn afresh"] * 3)
    spikepatch.patch(model, plan)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("reinit", ["residual", "none"])
def test_other_modes_leave_an_encoder_of_sounds(reinit: str) -> None:
    recipe = "vanilla" if reinit == "residual" else "scaled-embed"
    plan = spikepatch.plan(whisper(), recipe, reinit=reinit)  # type: ignore[arg-type]
    assert not plan.kept
    assert not any("encoder." in name for name in plan.written)
    whole = spikepatch.plan(whisper(), recipe, reinit=reinit, part="all")  # type: ignore[arg-type]
    assert any("encoder." in name for name in whole.written) == (reinit == "residual")


def test_there_is_nothing_to_keep_on_the_meta_device() -> None:
    plan = spikepatch.plan(learned(llava), "vanilla", reinit="all")
    with torch.device("meta"):
        structure = transformers.LlavaForConditionalGeneration(llava().config)
    with pytest.raises(spikepatch.Refused, match="keeps learned weights of towers"):
        spikepatch.patch(structure, plan)
    assert not spikepatch.plan(structure, "vanilla", reinit="all").kept


@pytest.mark.slow
@pytest.mark.parametrize("kind", [qwen3_vl, whisper])
def test_folders(kind: Kind, tmp_path: Path, load_test: None) -> None:
    """Towers have the source's bits, and all has the bits of the live model; the parts are named before they are
    written; a fresh process loads it (``convert`` tries).
    """
    model = learned(kind)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/README.md").write_text("---\nbase_model: org/base\n---\n")
    given = [str(tmp_path / "model"), str(tmp_path / "out"), "--seed", "1"]
    dry = CliRunner().invoke(main, ["convert", *given, "--dry-run"])
    assert "towers: kept as they are: " in dry.stdout
    run = CliRunner().invoke(main, ["convert", *given, "--json"])
    assert run.exit_code == 0, run.output
    assert run.stderr.index("towers: kept as they are: ") < run.stderr.index("writing weights")
    plan = json.loads(run.stdout)["plan"]
    assert [p["weights"] for p in plan["parts"]] == ["drawn afresh"] * (len(plan["parts"]) - 1) + ["kept as they are"]
    source, out = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert source.keys() == out.keys()
    assert "base_model: org/base" in (tmp_path / "out/README.md").read_text()  # whose towers it has
    spikepatch.patch(model, "scaled-embed", reinit="all", seed=1).save_pretrained(tmp_path / "live")  # type: ignore[operator]
    live = load_file(tmp_path / "live" / "model.safetensors")
    assert all(torch.equal(out[name], live[name]) for name in live)
    same = [name for name in out if torch.equal(out[name], source[name])]
    assert len(same) == len(plan["kept"]) > 30


@pytest.mark.slow
def test_what_a_pass_does_not_read_is_kept_and_part_all_draws_it(tmp_path: Path) -> None:
    """mllama's images are read by cross-attention from states, which the traced pass is given as they are."""
    learned(mllama).save_pretrained(tmp_path / "model")
    source = load_file(tmp_path / "model" / "model.safetensors")
    for options, kept in (([], ("multi_modal_projector", "vision_model")), (["--part", "all"], ())):
        run = CliRunner().invoke(
            main, ["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--overwrite", *options]
        )
        assert run.exit_code == 0, run.output
        out = load_file(tmp_path / "out" / "model.safetensors")
        same = {name.removeprefix("model.").partition(".")[0] for name in out if torch.equal(out[name], source[name])}
        assert same == {*kept}
