"""Run in a fresh process: the logits of a folder, as somebody gets them who does not have spikepatch.

Arguments: the folder; the auto class; ``trust`` or ``plain``; the file to write; a dtype, or none for the stored one.
"""

from __future__ import annotations

import sys
import warnings

for absent in ("spikepatch", "spikepatch_transforms"):  # an editable install would be importable here
    sys.modules[absent] = None  # type: ignore[assignment]
warnings.simplefilter("error")

import torch  # noqa: E402
import transformers  # noqa: E402

folder, auto_class, trust, file, *dtype = sys.argv[1:]
options = {"dtype": getattr(torch, dtype[0])} if dtype else {}
model, info = getattr(transformers, auto_class).from_pretrained(
    folder, trust_remote_code=trust == "trust", output_loading_info=True, **options
)
model.eval()
ids = torch.randint(5, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
inputs = {"input_ids": ids}
if model.config.is_encoder_decoder:
    inputs["decoder_input_ids"] = ids.flip(0)
with torch.no_grad():
    logits = model(**inputs).logits
    generated = model.generate(ids[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False)
torch.save(
    {
        "class": type(model).__name__,
        "problems": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "inputs": inputs,
        "logits": logits,
        "generated": generated,
    },
    file,
)
