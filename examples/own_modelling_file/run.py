"""Write the recipe into a modelling file of your own: run as a script, on any machine.

The same as ``spikepatch codemod model.py --factory model:small``, which prints the diff; with ``--write`` it goes into
the file. Here the edited text becomes a module beside the original, and the std of the residual stream is compared.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

import spikepatch

FILE = Path(__file__).parent / "model.py"


def main() -> None:
    edit = spikepatch.codemod(FILE, "model:small", "scaled-embed")
    print(edit.diff)  # noqa: T201
    with tempfile.TemporaryDirectory() as folder:
        edited = Path(folder, "edited.py")
        edited.write_bytes(edit.after)
        for file in (FILE, edited):
            module = imported(file)
            model = module.Model(module.Config(layers=12))  # deeper than what was built for the edit
            print(f"{file.name}: std of the stream", *(f"{std:.2f}" for std in stream(model)))  # noqa: T201


def imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stream(model: nn.Module) -> list[float]:
    """std of the residual stream at the input of each sub-layer."""
    found: list[float] = []
    for sublayer in model.get_submodule("sublayers").children():
        sublayer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].std().item()))
    with torch.no_grad():
        model(torch.arange(64).unsqueeze(0))
    return found


if __name__ == "__main__":
    main()
