"""What a change does to learned weights: the loss on a sample text, by the model as transformers loads it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from spikepatch.quiet import quiet

#: Public domain: Genesis 1, King James Version.
SAMPLE = """In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness
was upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let
there be light: and there was light. And God saw the light, that it was good: and God divided the light from
the darkness. And God called the light Day, and the darkness he called Night. And the evening and the morning
were the first day. And God said, Let there be a firmament in the midst of the waters, and let it divide the
waters from the waters. And God made the firmament, and divided the waters which were under the firmament from
the waters which were above the firmament: and it was so. And God called the firmament Heaven. And the evening
and the morning were the second day. And God said, Let the waters under the heaven be gathered together unto
one place, and let the dry land appear: and it was so. And God called the dry land Earth; and the gathering
together of the waters called he Seas: and God saw that it was good."""


def sample_loss(folder: Path, auto_class: str) -> float | None:
    """Mean next-token loss in nats on ``SAMPLE``, in float32 on the CPU.

    None where the folder has no tokenizer, the model has no language-model loss, or it would fill more than half of
    the free memory.
    """
    import transformers

    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    has_tokenizer = any(folder.glob("tokenizer*")) or (folder / "vocab.json").exists()
    if auto_class != "AutoModelForCausalLM" or not has_tokenizer or 4 * weights > free:
        return None
    with quiet(), torch.no_grad():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        # Ours: the generated file is the only code there, spikepatch never copies any.
        trusted = any(folder.glob("modeling_spikepatch_*.py"))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trusted
        ).eval()
        ids = tokenizer(SAMPLE, return_tensors="pt").input_ids
        return float(model(ids, labels=ids).loss)
