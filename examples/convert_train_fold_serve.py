"""The whole life of a patched model, from a config to a server that has never heard of it: run as a script, on any
machine, or step by step with your own loop in the middle:

    spikepatch convert source/ patched/
    spikepatch fold trained/ plain/

A tiny Llama learns the bytes of this very file. The process that serves it has transformers alone and runs no code but
transformers' own; its logits are those of the trained model, bit for bit.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import spikepatch

TEXT = Path(__file__).read_bytes()
PROMPT = torch.tensor([list(b"import ")])

SERVE = """
import sys
sys.modules["spikepatch"] = sys.modules["spikepatch_transforms"] = None  # as where it is not installed
import torch
from transformers import AutoModelForCausalLM
folder, file = sys.argv[1:]
prompt = torch.load(file)
model = AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    torch.save(model(prompt).logits, file)
text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
print(f"{type(model).__name__}: {bytes(text[0].tolist())}")
"""


def train(patched: Path, trained: Path) -> float:
    """Your own loop: the patched folder loads as any model with code of its own, and is saved as any model."""
    model = AutoModelForCausalLM.from_pretrained(patched, trust_remote_code=True)
    optimizer = torch.optim.AdamW(spikepatch.param_groups(model, weight_decay=0.1), lr=3e-3)
    windows = torch.tensor(list(TEXT)).unfold(0, 64, 16)  # (windows, 64)
    for step in range(100):
        batch = windows[torch.randint(len(windows), (4,), generator=torch.Generator().manual_seed(step))]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(trained)
    return float(loss.detach())


def main() -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, vocab_size=256,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source, patched, trained, plain = (Path(folder, name) for name in ("source", "patched", "trained", "plain"))
        config.save_pretrained(source)

        converted = spikepatch.convert(str(source), patched, recipe="scaled-embed", seed=0)
        print(f"converted: storage {converted.storage}, {converted.parameters:,} parameters")  # noqa: T201
        print(f"trained: loss of the last step {train(patched, trained):.2f}")  # noqa: T201
        folded = spikepatch.fold(str(trained), plain)
        print(f"folded into {', '.join(folded.tables)}: {folded.architecture}")  # noqa: T201

        model = AutoModelForCausalLM.from_pretrained(trained, trust_remote_code=True)
        with torch.no_grad():
            before = model(PROMPT).logits
        file = Path(folder, "prompt.pt")
        torch.save(PROMPT, file)
        subprocess.run([sys.executable, "-c", SERVE, str(plain), str(file)], check=True)
        assert torch.equal(torch.load(file), before), "the folded model computes something else"


if __name__ == "__main__":
    main()
