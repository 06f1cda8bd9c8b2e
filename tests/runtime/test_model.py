"""What generated classes share: what they are built from, what stays patched, what fresh rows hold, what is saved."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.architectures import encoder_decoder, ids, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import spikepatch


@pytest.fixture
def unfilled() -> Iterator[None]:
    """Memory that nobody has written to holds NaN, and the largest integer."""
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


def patched(model: Any, recipe: str = "scaled-embed", **options: Any) -> Any:
    return spikepatch.patch(model, recipe, **{"reinit": "none", "factor": 3.0, **options})


def rows(model: Any) -> Any:
    """What enters a model for its tokens, and what its matrix holds for them."""
    tokens, table = ids(model), model.get_input_embeddings()
    return table(tokens), table.weight[tokens]


# Buffers


def test_buffers_that_another_module_fills_are_filled(unfilled: None, tmp_path: Path) -> None:
    """Falcon-H1's model fills a buffer of each of its layers, which no checkpoint has."""
    live = patched(
        tiny_model(
            "falcon_h1", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=16,
            ssm_multipliers=[0.5, 2.0, 3.0, 4.0, 5.0],
        )
    )  # fmt: skip
    live.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    buffers = dict(live.named_buffers())

    assert any(name.endswith("mup_vector") for name in buffers)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in loaded.named_buffers())
    assert torch.isfinite(loaded(ids(loaded)).logits).all()


# Heads that ask an auto class for their backbone


HEADS = [
    (f"AutoModelFor{task}", model_type)
    for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering")
    for model_type in ("llama", "qwen3", "mistral")
]


@pytest.mark.parametrize(("auto_class", "model_type"), HEADS)
def test_a_general_head_loads_with_its_backbone(auto_class: str, model_type: str, tmp_path: Path) -> None:
    auto = getattr(transformers, auto_class)
    config = tiny_config(model_type, architectures=None)
    live = patched(auto.from_config(config).eval())
    live.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    entering, held = rows(loaded)

    assert type(loaded).__name__.startswith("Spikepatch")
    assert not any(info.values())
    assert torch.equal(entering, 3 * held)
    assert type(loaded.config) is type(loaded).config_class
    assert loaded.config.auto_map == live.config.auto_map
    for one, other in zip(loaded(ids(loaded))[:1], live(ids(live))[:1], strict=True):
        torch.testing.assert_close(one, other)


# What stays patched


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
def test_the_inner_model_keeps_the_patch(model_type: str) -> None:
    model = patched(tiny_model(model_type))
    inner = model.base_model
    before = rows(inner)
    with pytest.raises(ValueError, match=r"would lose what config\.spikepatch says"):
        inner.set_input_embeddings(nn.Embedding(500, 64))

    assert all(torch.equal(one, other) for one, other in zip(rows(inner), before, strict=True))
    assert torch.equal(before[0], 3 * before[1])
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="would lose"):
        twin.base_model.set_input_embeddings(nn.Embedding(500, 64))
    assert twin.base_model.get_input_embeddings() is not inner.get_input_embeddings()
    assert pickle.dumps(inner.set_input_embeddings)


@pytest.mark.parametrize("model_type", ["t5", "mt5"])
@pytest.mark.parametrize("recipe", ["scaled-embed", "embed-ln"])
def test_input_embeddings_are_what_enters(model_type: str, recipe: str) -> None:
    """T5's own answer is a table that no forward pass looks anything up in."""
    model = encoder_decoder(model_type)
    model = patched(model, recipe, **({"factor": None} if recipe == "embed-ln" else {}))
    tokens = ids(model)
    decoder = torch.zeros(1, 1, dtype=torch.long)
    for part in (model, model.base_model):
        with torch.no_grad():
            entering = part.get_input_embeddings()(tokens)
            by_rows = model(inputs_embeds=entering, decoder_input_ids=decoder).logits
            by_ids = model(input_ids=tokens, decoder_input_ids=decoder).logits
        assert torch.equal(by_rows, by_ids)
    names = set(model.state_dict())
    model.resize_token_embeddings(510)
    assert set(model.state_dict()) == names
    assert len(model.get_input_embeddings().weight) == 510
    assert torch.equal(model.get_input_embeddings()(tokens), entering)


def test_a_folder_does_not_claim_what_it_lacks(tmp_path: Path) -> None:
    model = patched(tiny_model("llama"))
    model.model.embed_tokens = nn.Embedding(500, 64)
    with pytest.raises(ValueError, match=r"the embedding at model\.embed_tokens is not what config\.spikepatch says"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Rows that are added


@pytest.mark.parametrize("untie", [False, True])
def test_added_rows_of_a_fresh_model_are_drawn_as_the_others(untie: bool) -> None:
    model = patched(tiny_model("gpt2", vocab_size=2000), reinit="all", factor=None, untie=untie)
    std = (2 / (5 * 64)) ** 0.5
    model.resize_token_embeddings(4000)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert float(table.weight[2000:].detach().std()) == pytest.approx(std, rel=0.02)
    model.resize_token_embeddings(4500, mean_resizing=True)
    assert float(model.get_input_embeddings().weight[4000:].detach().std()) < std / 5


def test_added_rows_of_a_learned_model_are_transformers_own() -> None:
    model = patched(tiny_model("gpt2", vocab_size=2000))
    model.resize_token_embeddings(4000)
    assert float(model.get_input_embeddings().weight[2000:].detach().std()) < 0.01


# The config


def test_a_constructor_that_copies_the_config(tmp_path: Path) -> None:
    """As the decoders of encoder-decoders do, alone: what is saved is patched all the same."""
    sizes = {"d_model": 64, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4}
    live = patched(tiny_model("pegasus", **sizes))
    live.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", trust_remote_code=True)
    assert type(loaded.config) is type(loaded).config_class
    torch.testing.assert_close(again(ids(again)).logits, live(ids(live)).logits)


def test_settings_that_a_constructor_derives_are_there(tmp_path: Path) -> None:
    live = patched(tiny_model("llama"))
    live.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert (loaded.head_dim, loaded.spikepatch) == (16, live.config.spikepatch)
    assert loaded.to_dict() | {"_name_or_path": ""} == live.config.to_dict()
