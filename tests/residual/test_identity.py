"""Two models are told to compute the same only where they do, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from spikepatch.residual.identity import Values, forward_of
from spikepatch.runtime.embedding import norm_output, scale_output
from tests.architectures import ids, tiny_config, tiny_model
from tests.residual.maps import TYPES


def same_function(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    values = Values()
    return values.output(forward_of(first)) == values.output(forward_of(second))


def scaled(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    scale_output(model.get_input_embeddings(), factor)
    return model


@pytest.mark.parametrize("model_type", TYPES)
def test_a_model_is_itself_with_other_weights(model_type: str) -> None:
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()

    assert same_function(tiny_model(model_type), other)


@pytest.mark.parametrize("factor", [1.0, 1])
def test_a_factor_of_one_is_none(factor: float) -> None:
    model = tiny_model("gpt2")
    tokens = ids(model)
    before = model(tokens).logits
    patched = scaled(tiny_model("gpt2"), factor)

    assert same_function(model, patched)
    assert torch.equal(patched(tokens).logits, before)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm_epsilon": 1e-6},
        {"activation_function": "gelu"},
        {"num_hidden_layers": 2},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
    ],
)
def test_what_changes_a_model_is_seen(changes: dict[str, Any]) -> None:
    assert not same_function(tiny_model("gpt2"), tiny_model("gpt2", **changes))


def test_what_a_config_takes_and_does_not_use_is_no_change() -> None:
    assert same_function(tiny_model("gpt2"), tiny_model("gpt2", embedding_multiplier=8.0, scale_embedding=True))


def test_factors_are_told_apart_to_the_last_bit() -> None:
    factor = 8.0
    nearly = torch.nextafter(torch.tensor(factor, dtype=torch.float64), torch.tensor(9.0, dtype=torch.float64)).item()

    assert same_function(scaled(tiny_model("llama"), factor), scaled(tiny_model("llama"), factor))
    assert not same_function(scaled(tiny_model("llama"), factor), scaled(tiny_model("llama"), nearly))
    assert not same_function(scaled(tiny_model("llama"), factor), tiny_model("llama"))


def test_a_buffer_counts_by_its_value() -> None:
    other = tiny_model("llama")
    (rotary,) = (m for m in other.modules() if hasattr(m, "inv_freq"))
    rotary.inv_freq[3] *= 1.001

    assert not same_function(tiny_model("llama"), other)


def test_a_norm_is_no_factor() -> None:
    other = tiny_model("gpt2")
    norm_output(other.get_input_embeddings(), 1e-5)

    assert not same_function(tiny_model("gpt2"), other)
