"""LoRA attaches to a converted model, trains, is saved, loaded and merged. peft knows target modules by model type, and
ours is a type of its own: it has to be told them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import spikepatch
from tests.architectures import tiny_config, tiny_model
from tests.elsewhere import logits_elsewhere

peft = pytest.importorskip("peft", reason="needs the extra 'conventions'")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's own use
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

#: Type, options of ``convert``, what the adapter goes on; the last one on the patched embedding itself.
CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("gpt2", {}, "all-linear"),
    ("gpt2", {"untie": True}, "all-linear"),
    ("llama", {"recipe": "embed-ln"}, ["q_proj", "v_proj", "down_proj"]),
    ("llama", {}, ["q_proj", "embed_tokens"]),
]


@pytest.mark.parametrize(("model_type", "options", "targets"), CASES)
def test_lora(model_type: str, options: dict[str, Any], targets: Any, tmp_path: Path) -> None:
    tiny_config(model_type).save_pretrained(tmp_path / "source")
    converted = spikepatch.convert(str(tmp_path / "source"), tmp_path / "patched", **options)
    base: Any = AutoModelForCausalLM.from_pretrained(converted.out, trust_remote_code=True)
    kept = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    for step in range(3):
        ids = torch.randint(5, 500, (4, 16), generator=torch.Generator().manual_seed(step))
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(5, 500, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(converted.out, trust_remote_code=True)(ids).logits
        expected = adapted.eval()(ids).logits
    again: Any = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True).eval()
    with torch.no_grad():
        loaded = again(ids).logits
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    found = logits_elsewhere(tmp_path / "merged", trust=True)

    assert trained
    assert all("lora_" in name for name in trained)
    assert all(torch.equal(tensor, kept[name.removeprefix("base_model.model.").replace(".base_layer", "")])
               for name, tensor in adapted.state_dict().items() if "lora_" not in name)  # fmt: skip
    assert any("embed" in name for name in trained) == ("embed_tokens" in targets)
    assert converted.storage == "code"
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        converted.out
    )
    assert torch.equal(loaded, expected)
    assert (found["class"], found["problems"]) == (type(base).__name__, {})
    assert torch.equal(found["inputs"]["input_ids"], ids)
    # W x + B A x, or (W + B A) x: another order of the same sums, in each of at most 7 products of 3 layers.
    bound = 7 * 3 * math.sqrt(256) * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (found["logits"] - expected).abs().max() <= bound
    assert (expected - plain).abs().max() > 100 * bound


ADAPTERS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 3]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["embed_tokens"], "use_dora": True},
]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_an_adapter_that_would_leave_the_norm_out_is_not_put_on(adapter: dict[str, Any], model_type: str) -> None:
    """PEFT looks rows up in the matrix itself. Of Gemma's embedding it knows the factor that is its own."""
    model: Any = tiny_model(model_type)
    if model_type == "llama":
        spikepatch.patch(model, "embed-ln", reinit="all")
    else:
        spikepatch.patch(model, "scaled-embed", reinit="all", replace=True, factor=3.0)
    with pytest.raises(ValueError, match=r"an adapter on this embedding would leave out what config\.spikepatch says"):
        peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **adapter))


def test_the_whole_embedding_can_be_trained_with_its_norm() -> None:
    """As the refusal says."""
    model: Any = spikepatch.patch(tiny_model("llama"), "embed-ln", reinit="all")
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        before = model(ids).logits
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
        adapted = peft.get_peft_model(model, config)
        assert torch.equal(adapted(ids).logits, before)
        assert torch.equal(adapted.merge_and_unload()(ids).logits, before)


def test_tokens_of_a_scaled_embedding_are_trained_as_before() -> None:
    model: Any = spikepatch.patch(tiny_model("llama"), "scaled-embed", reinit="all")
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        before = model(ids).logits
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[1, 2, 3])
        torch.testing.assert_close(peft.get_peft_model(model, config)(ids).logits, before)
