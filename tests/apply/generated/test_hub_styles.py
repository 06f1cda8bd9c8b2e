"""Models with code of their own, as the Hub has them: what is written loads, and is the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import spikepatch
from tests.remote_sources import STYLES, built, save_style


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("name", STYLES)
def test_it_loads_as_the_same_model(name: str, tmp_path: Path) -> None:
    source = save_style(tmp_path / "source", name)
    options: dict[str, Any] = {"reinit": "none", "factor": 3.0, "storage": "code", "trust_remote_code": True}
    first = spikepatch.convert(str(source), tmp_path / "out", **options)
    live = spikepatch.patch(built(source), "scaled-embed", reinit="none", factor=3.0)
    loaded, info = AutoModelForCausalLM.from_pretrained(first.out, trust_remote_code=True, output_loading_info=True)
    author, ours = (AutoConfig.from_pretrained(folder, trust_remote_code=True) for folder in (source, first.out))
    unlike = {"_name_or_path", "auto_map", "architectures", "spikepatch", "tokenizer_class", "dtype"}
    unlike |= {"model_type", "transformers_version"}
    written = json.loads((first.out / "config.json").read_text())

    assert not any(info.values())
    assert type(loaded).__name__ == "SpikepatchOwnForCausalLM"
    assert torch.isfinite(logits(loaded)).all()
    torch.testing.assert_close(logits(loaded), logits(live))
    buffers = dict(live.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in loaded.named_buffers())
    assert {k: v for k, v in vars(ours).items() if k not in unlike and not hasattr(v, "to_dict")} == {
        k: v for k, v in vars(author).items() if k not in unlike and not hasattr(v, "to_dict")
    }
    assert written["model_type"] == f"spikepatch_{type(author).model_type}"
    if "AutoModel" in STYLES[name].auto_map:
        base = AutoModel.from_pretrained(first.out, trust_remote_code=True)
        assert torch.equal(base.get_input_embeddings()(torch.tensor(7)), 3 * base.get_input_embeddings().weight[7])
    # A patched folder as the source, and back.
    again = spikepatch.convert(str(first.out), tmp_path / "again", **options | {"factor": 5.0})
    rows = AutoModelForCausalLM.from_pretrained(again.out, trust_remote_code=True).get_input_embeddings()
    assert torch.equal(rows(torch.tensor(7)), 5 * rows.weight[7])
    folded = spikepatch.fold(str(again.out), tmp_path / "folded", trust_remote_code=True)
    assert json.loads((folded.out / "config.json").read_text())["auto_map"] == dict(STYLES[name].auto_map)
    other = spikepatch.patch(built(source), "scaled-embed", reinit="none", factor=5.0)
    torch.testing.assert_close(logits(built(folded.out)), logits(other))
    loaded.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)), logits(live)
    )
