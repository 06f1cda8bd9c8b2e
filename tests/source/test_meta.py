"""Models on the meta device, and which settings they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from spikepatch.errors import Refused
from spikepatch.source.meta import build_meta, settings_read
from tests.architectures import tiny_config
from tests.residual.configs import model_class


def test_settings_that_are_read() -> None:
    config: Any = tiny_config("gpt2", unknown=1)
    with settings_read() as read:
        assert (config.hidden_size, config.vocab_size) == (64, 500)
        assert hasattr(config, "n_layer")
        assert getattr(config, "nowhere", 3) == 3
        config.to_dict()

    assert {"n_embd", "vocab_size", "n_layer", "nowhere"} <= read
    assert not {"unknown", "n_head", "hidden_size"} & read  # hidden_size is another name of n_embd


def test_what_is_read_by_a_part_of_the_model_and_when_it_is_built() -> None:
    config = tiny_config("llama", scale_embedding=False)
    with settings_read() as read:
        build_meta(model_class("llama", "causal"), config, where="llama")

    assert {"hidden_act", "mlp_bias", "attention_dropout", "rms_norm_eps"} <= read
    assert "scale_embedding" not in read


def test_nothing_is_watched_afterwards() -> None:
    before = PreTrainedConfig.__getattribute__
    with pytest.raises(KeyError), settings_read() as read:
        raise KeyError
    _ = tiny_config("llama").hidden_size

    assert not read
    assert PreTrainedConfig.__getattribute__ is before


class Drawn(PreTrainedModel):  # type: ignore[misc]
    config_class = LlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.hidden_size, 4)
        self.register_buffer("table", torch.zeros(8).normal_(std=config.initializer_range))
        self.post_init()


def test_what_a_constructor_draws() -> None:
    """Nothing into parameters, which have no memory; of the generator, they take nothing either."""
    model = build_meta(Drawn, tiny_config("llama", initializer_range=0.5), where="drawn")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = torch.zeros(8).normal_(std=0.5)

    assert isinstance(model.table, torch.Tensor)
    assert torch.equal(model.table, expected)
    assert isinstance(model.linear, nn.Linear)
    assert model.linear.weight.is_meta


class BelowZero(Drawn):
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=-1.0)


def test_a_std_below_zero() -> None:
    with pytest.raises(Refused, match=r"the model cannot be built(.|\n)*normal expects std"):
        build_meta(BelowZero, tiny_config("llama"), where="below zero")
