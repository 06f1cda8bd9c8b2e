"""Run by test_conversion in a fresh process: what a converted folder is to somebody who does not have spikepatch.

Argument: the folder. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

for absent in ("spikepatch", "spikepatch_transforms"):  # an editable install would be importable here
    sys.modules[absent] = None  # type: ignore[assignment]
warnings.simplefilter("error")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

TEXT = "The sun had set, and the birds in the old garden wall were quiet; nobody came down the road that evening."

folder = Path(sys.argv[1])
model, info = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True, dtype=torch.float32
)
if (folder / "tokenizer.json").exists():
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(TEXT, return_tensors="pt").input_ids
else:
    ids = torch.randint(0, model.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    output = model(ids, labels=ids, output_hidden_states=True)
found = {
    "class": type(model).__name__,
    "problems": {key: sorted(map(str, value)) for key, value in info.items() if value},
    "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    "loss": output.loss.item(),
    "stream": [hidden.std().item() for hidden in output.hidden_states[:-1]],  # at the input of each block
    "completion": model.generate(ids[:, :8], max_new_tokens=2, min_new_tokens=2, do_sample=False)[0, 8:].tolist(),
}
sys.stdout.write(json.dumps(found))
