"""``check --layers``: the first layers and their growth against the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AlbertConfig, AlbertForMaskedLM, T5Config, T5ForConditionalGeneration

import spikepatch
from spikepatch.cli import main
from spikepatch.errors import Refused
from spikepatch.preflight.shorter import OFF
from tests.architectures import tiny_model


def gpt2(layers: int = 10) -> Any:
    torch.manual_seed(0)
    return tiny_model("gpt2", num_hidden_layers=layers)


def test_growth_says_what_the_whole_is() -> None:
    model = gpt2()
    whole = spikepatch.check(model, tokens=16, recipes=["scaled-embed"])
    short = spikepatch.check(model, tokens=16, recipes=["scaled-embed"], layers=5)
    assert [m.recipe for m in short.every] == [None, "scaled-embed"]
    for measured, extended in zip(whole.every, short.every, strict=True):
        assert (len(measured.layers), len(extended.layers)) == (10, 5)
        assert extended.sublayers == measured.sublayers == 20
        assert extended.shortened is not None
        assert measured.gradient_ratio is not None
        assert extended.gradient_ratio is not None
        assert measured.sigma_end is not None
        assert extended.sigma_end is not None
        assert extended.shortened.gradient_ratio != extended.gradient_ratio
        assert abs(math.log(extended.gradient_ratio / measured.gradient_ratio)) < 0.3
        assert abs(math.log(extended.sigma_end / measured.sigma_end)) < 0.15
        # the first layers are those of the whole, bit for bit: a recipe counts all sub-layers, whatever is run
        assert [x.sigma_branch for x in extended.layers] == [x.sigma_branch for x in measured.layers[:5]]
    assert short.audit == whole.audit
    notes = [f.what for f in short.findings if f.name == "layers"]
    assert "the first 5 of 10 layers" in notes[0]
    assert len(OFF) >= 3
    assert all(name in notes[1] for name, *_ in OFF)


def test_encoder_and_decoder_are_both_cut() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "vocab_size": 100}
    model: Any = T5ForConditionalGeneration(T5Config(**sizes, num_layers=4, decoder_start_token_id=0))
    short = spikepatch.check(model, tokens=12, layers=2)
    assert [len(m.layers) for m in short.every] == [2, 2]
    assert [m.sublayers for m in short.every] == [12, 8]
    assert len(model.encoder.block) == 4


def test_as_many_layers_as_there_are_is_the_whole() -> None:
    report = spikepatch.check(gpt2(3), tokens=12, layers=3)
    assert report.shortened is None
    assert len(report.layers) == 3


def test_what_runs_its_blocks_again_cannot_be_cut() -> None:
    model = AlbertForMaskedLM(
        AlbertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4, vocab_size=100,
            embedding_size=16, num_hidden_groups=4,
        )
    )  # fmt: skip
    with pytest.raises(Refused, match="run several times"):
        spikepatch.check(model, tokens=12, layers=2)


def test_steps_say_nothing_of_the_whole() -> None:
    with pytest.raises(Refused, match="--steps with --layers"):
        spikepatch.check(gpt2(3), layers=2, steps=1)


@pytest.mark.slow
def test_the_command(save_tiny: Callable[..., Any]) -> None:
    folder = save_tiny(
        "llama",
        num_hidden_layers=6,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
    )
    done = CliRunner().invoke(main, ["check", str(folder), "--layers", "3", "--tokens", "12"])
    assert done.exit_code == 0, done.output
    assert "3 of 6" in done.stdout
