"""TRL's SFTTrainer trains a converted folder, whole or by an adapter, and what it saves loads patched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import spikepatch
from tests.architectures import tiny_config
from tests.elsewhere import logits_elsewhere

datasets = pytest.importorskip("datasets", reason="needs the extra 'conventions'")
peft = pytest.importorskip("peft", reason="needs the extra 'conventions'")
trl = pytest.importorskip("trl", reason="needs the extra 'conventions'")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),  # TRL's own use
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


@pytest.mark.parametrize("adapter", [False, True])
def test_sft(adapter: bool, gpt2_tokenizer: Path, tmp_path: Path) -> None:
    end = 50256
    config = tiny_config("gpt2", vocab_size=50257, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    config.save_pretrained(tmp_path / "source")
    shutil.copytree(gpt2_tokenizer, tmp_path / "source", dirs_exist_ok=True)
    out = spikepatch.convert(str(tmp_path / "source"), tmp_path / "patched").out
    arguments = trl.SFTConfig(
        str(tmp_path / "run"),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=4,
        max_length=32,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        model_init_kwargs={"trust_remote_code": True, "dtype": "float32"},
    )
    rows = datasets.Dataset.from_list([{"text": f"after {n} comes {n + 1}, and then {n + 2}"} for n in range(8)])
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if adapter else None
    monitor = spikepatch.SpikeMonitor()
    trainer = trl.SFTTrainer(str(out), args=arguments, train_dataset=rows, peft_config=lora, callbacks=[monitor])
    trainer.train()
    assert monitor.report().startswith("no spike in 2 steps")
    trained = trainer.model.eval()
    before: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    ids = torch.randint(5, 50257, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, untrained = trained(ids).logits, before(ids).logits

    assert not torch.equal(expected, untrained)
    if adapter:
        again: Any = peft.AutoPeftModelForCausalLM.from_pretrained(
            tmp_path / "run/checkpoint-2", trust_remote_code=True
        ).eval()
        with torch.no_grad():
            assert torch.equal(again(ids).logits, expected)
        assert again.get_input_embeddings().embed_scale == before.get_input_embeddings().embed_scale
    else:
        found = logits_elsewhere(tmp_path / "run/checkpoint-2", trust=True)
        assert (found["class"], found["problems"]) == (type(before).__name__, {})
        assert torch.equal(found["inputs"]["input_ids"], ids)
        assert torch.equal(found["logits"], expected)
