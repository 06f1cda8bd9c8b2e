"""Checkpoints with two different tensors where the config says that they are one: transformers loads two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import spikepatch
from tests.architectures import encoder_decoder, ids, tiny_model


def published(folder: Path, model_type: str) -> tuple[Path, Any]:
    """As T5 1.1, Flan-T5 and mT5 lie on the Hub: a head of its own; and the auto class."""
    seq2seq = model_type.endswith("t5")
    model = (encoder_decoder if seq2seq else tiny_model)(model_type, tie_word_embeddings=not seq2seq)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    table = "shared.weight" if seq2seq else "model.embed_tokens.weight"
    head = torch.randn(tensors[table].shape, generator=torch.Generator().manual_seed(0)) * 0.05
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": not seq2seq}))
    return folder, getattr(transformers, f"AutoModelFor{'Seq2SeqLM' if seq2seq else 'CausalLM'}")


def logits(model: Any) -> torch.Tensor:
    inputs = {"input_ids": ids(model)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5", "qwen2"])
@pytest.mark.parametrize("reinit", ["none", "residual", "all"])
def test_a_head_that_is_stored_apart_stays_apart(model_type: str, reinit: Any, tmp_path: Path) -> None:
    source, auto_class = published(tmp_path / "source", model_type)
    result = spikepatch.convert(str(source), tmp_path / "out", reinit=reinit, factor=3.0)
    live = auto_class.from_pretrained(source)
    head = live.get_output_embeddings().weight.detach().clone()
    loaded, info = auto_class.from_pretrained(result.out, trust_remote_code=True, output_loading_info=True)
    apart = loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight

    assert not any(info.values())
    assert apart == (reinit != "all")  # fresh weights are those of the architecture that the config describes
    if reinit == "all":
        return
    spikepatch.patch(live, result.plan)
    torch.testing.assert_close(logits(loaded), logits(live))
    assert torch.equal(loaded.get_output_embeddings().weight, head)
    folded = spikepatch.fold(str(result.out), tmp_path / "folded")
    torch.testing.assert_close(logits(auto_class.from_pretrained(folded.out)), logits(live))
