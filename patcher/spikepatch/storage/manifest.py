"""What an output folder says of itself: ``spikepatch.json`` for machines, the model card for people."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spikepatch import __version__
from spikepatch.plans import Fill, NormEmbedding, Plan, ScaleEmbedding, Untie

MANIFEST = "spikepatch.json"


def manifest(plan: Plan, storage: str, source: Mapping[str, Any], command: str, hashes: Mapping[str, str]) -> str:
    """The manifest's JSON text; without times or paths, so that the same command writes the same bytes.

    Args:
        source: fingerprint of the source.
        hashes: file name -> SHA-256 of every other file of the folder.
    """
    from spikepatch.fill import gaussian

    probe = hashlib.sha256(gaussian(plan.seed, "probe", 0, 4096, 1.0).numpy().tobytes()).hexdigest()
    data = {
        "spikepatch": __version__,
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors", "numpy")},
        "command": command,
        "source": dict(source),
        "storage": storage,
        "probe": probe,
        "files": dict(sorted(hashes.items())),
        "plan": plan.to_dict(),
    }
    return json.dumps(data, indent=2) + "\n"


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_card(plan: Plan, storage: str, *, auto_class: str, base_model: str | None = None) -> str:
    """README.md of the output: front matter by the hub's rules, and how to load it."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="transformers",
        tags=["spikepatch", plan.recipe],
        base_model=base_model,
    )
    trust = ", trust_remote_code=True" if storage == "code" else ""
    weights = {
        "all": "**Fresh weights**: a model to pre-train. Learned weights of the source are not in it.",
        "residual": "Learned weights, with the residual projections drawn afresh: to be trained on before use.",
        "none": "Learned weights behind a larger shortcut: to be trained on, the function has changed.",
    }[plan.reinit]
    changes = "\n".join(f"- {line}" for line in _changes(plan))
    return f"""---
{data.to_yaml()}
---

# {plan.source}, patched with spikepatch ({plan.recipe})

{weights}

{changes}

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("PATH"{trust})
```

The recipe follows Takase et al., *Spike No More: Stabilizing the Pre-training of Large Language Models*
(arXiv 2312.16903). `{MANIFEST}` holds the whole plan, with seed, versions and checksums.
"""


def _changes(plan: Plan) -> list[str]:
    fills = plan.select(Fill)
    lines = []
    if fills:
        stds = sorted({fill.std for fill in fills})
        lines.append(f"{len(fills)} parameters drawn from N(0, std²), std {', '.join(f'{s:.6g}' for s in stds)}")
        lines.append(f"S = {len(plan.sublayers)} sub-layers, stream width d = {plan.width}, seed {plan.seed}")
    lines += [f"`{e.module}`: output multiplied by {e.factor:.6g}" for e in plan.select(ScaleEmbedding)]
    lines += [f"`{e.module}`: output through a LayerNorm (eps {e.eps:g})" for e in plan.select(NormEmbedding)]
    lines += [f"`{e.head}`: own matrix, no longer tied to `{e.embedding}`" for e in plan.select(Untie)]
    return lines
