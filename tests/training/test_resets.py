"""--reset-positions: packed documents are to the model what they are on their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spikepatch.errors import Refused
from spikepatch.training import resets
from spikepatch.training.loop import _loss
from spikepatch.training.settings import Settings
from tests.architectures import tiny_config
from tests.training.models import small_model

EOS = 255


def test_positions_and_targets() -> None:
    rows = torch.tensor([[5, 6, EOS, 7, EOS, EOS, 8, 9]])
    assert resets.positions(rows[:, :-1], EOS).tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert resets.targets(rows, EOS).tolist() == [[6, EOS, -100, EOS, -100, -100, 9]]
    assert resets.counted(rows, EOS) == resets.counted(rows.numpy(), EOS) == 4
    assert resets.counted(rows, None) == 7


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_packed_loss_is_that_of_the_documents(model_type: str) -> None:
    """Each on its own, from position 0: the mean over all their targets, up to the rounding of its sums."""
    model = small_model(model_type)
    noise = np.random.default_rng(0)
    documents = [np.append(noise.integers(0, 255, n), EOS) for n in (5, 1, 17, 8)]
    rows = torch.from_numpy(np.concatenate(documents))[None]
    loss_of = _loss(model, model, Settings(1, reset_positions=True), EOS)
    packed, _ = loss_of(rows)
    total = torch.zeros(())
    for document in map(torch.from_numpy, documents):
        logits = model(input_ids=document[None, :-1]).logits[0]
        total += F.cross_entropy(logits, document[1:], reduction="sum")
    expected = total / sum(len(each) - 1 for each in documents)
    assert packed.item() == pytest.approx(expected.item(), rel=rows.shape[1] * torch.finfo(torch.float32).eps)
    together, _ = _loss(model, model, Settings(1), None)(rows)
    assert together.item() != pytest.approx(expected.item(), rel=1e-5)
    nothing, _ = loss_of(torch.full((1, 9), EOS))
    assert nothing.item() == 0


def test_models_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    for model_type in ("gpt2", "llama"):
        resets.check_resets(small_model(model_type), model_type, 64)
    mamba: Any = transformers.AutoModelForCausalLM.from_config(tiny_config("mamba"))
    with pytest.raises(Refused, match=r"m: its packed documents cannot be kept apart\n.*takes no position_ids"):
        resets.check_resets(mamba, "m", 64)
    model = small_model("llama")
    forward = model.forward
    monkeypatch.setattr(  # positions begin again, and attention reaches back
        type(model), "forward", lambda self, input_ids, position_ids, **more: forward(input_ids, **more)
    )
    with pytest.raises(Refused, match=r"the logits of a document change by up to .* with the one before it"):
        resets.check_resets(model, "m", 64)
