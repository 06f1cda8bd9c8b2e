"""What a folder is to a process that cannot import spikepatch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def logits_elsewhere(
    folder: Path,
    *,
    trust: bool,
    auto_class: str = "AutoModelForCausalLM",
    dtype: str | None = None,
    python: Path | str = sys.executable,
) -> dict[str, Any]:
    """What ``load_logits.py`` finds, with a module cache of its own; ``python``: of another environment."""
    file = folder.with_name(f"{folder.name}.logits.pt")
    script = Path(__file__).with_name("load_logits.py")
    arguments = [str(folder), auto_class, "trust" if trust else "plain", str(file), *([dtype] if dtype else [])]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder.with_name(f"{folder.name}.home")), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(file)
    file.unlink()
    return found
