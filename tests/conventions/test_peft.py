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
from tests.architectures import tiny_config
from tests.elsewhere import logits_elsewhere

peft = pytest.importorskip("peft", reason="needs the extra 'conventions'")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's own use
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
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
