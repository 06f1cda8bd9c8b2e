"""Routes are chosen by what models compute: a setting is used only where it is the patch, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel, WhisperForCausalLM

import spikepatch
from spikepatch.apply.folder import convert as conversion
from spikepatch.apply.folder import routes
from spikepatch.apply.folder.conversion import Conversion
from spikepatch.apply.folder.hosts import HOSTS
from spikepatch.apply.generated.structure import restructure
from spikepatch.plans.plan import Untie
from spikepatch.residual.identity import forward_of
from spikepatch.residual.trace import Trace
from spikepatch.source.meta import settings_read
from spikepatch.source.open import Source, build_meta
from tests.architectures import tiny_config, tiny_model
from tests.elsewhere import logits_elsewhere
from tests.residual.configs import tiny_config_for

#: Encoder-decoders; the first is pre-norm, with a flag for sqrt(d).
SEQ2SEQ = {"pegasus": "PegasusForConditionalGeneration", "bart": "BartForConditionalGeneration"}
_SIZES = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 500, "max_position_embeddings": 64,
    "decoder_start_token_id": 0, "forced_eos_token_id": None,
}  # fmt: skip


def config_of(model_type: str, **changes: Any) -> Any:
    if model_type in SEQ2SEQ:
        return AutoConfig.for_model(model_type, **_SIZES, architectures=[SEQ2SEQ[model_type]])
    return tiny_config(model_type, **changes)


def convert(tmp_path: Path, model_type: str, changes: dict[str, Any] | None = None, **options: Any) -> Conversion:
    config_of(model_type, **(changes or {})).save_pretrained(tmp_path / "source")
    return spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", **options)


def patched(result: Conversion, **options: Any) -> PreTrainedModel:
    """The same plan on a live model."""
    source = str(result.out.with_name("source"))
    config = AutoConfig.from_pretrained(source)
    model = getattr(transformers, result.auto_class).from_config(config).eval()
    plan = spikepatch.plan(source, "scaled-embed", reinit="all", **options)
    spikepatch.patch(model, plan)
    return model


def config_json(result: Conversion) -> dict[str, Any]:
    return dict(json.loads((result.out / "config.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "setting", "value"),
    [
        ("granite", "embedding_multiplier", 8.0),
        ("hyperclovax", "embedding_multiplier", 8.0),
        ("pegasus", "scale_embedding", True),
    ],
)
def test_a_setting_of_the_architecture(model_type: str, setting: str, value: Any, tmp_path: Path) -> None:
    result = convert(tmp_path, model_type)
    found = logits_elsewhere(result.out, trust=False, auto_class=result.auto_class)
    with torch.no_grad():
        logits = patched(result)(**found["inputs"]).logits

    assert (result.storage, result.trust) == ("native", False)
    assert f"{setting} = {value}" in " ".join(result.notes)
    assert config_json(result)[setting] == value
    assert found["class"] == result.plan.architecture
    assert found["problems"] == {}
    assert torch.equal(found["logits"], logits)
    assert found["generated"].shape[1] > 3
    assert not list(result.out.glob("*.py"))


def test_a_flag_has_one_factor_only(tmp_path: Path) -> None:
    """It multiplies by sqrt(d) = 8."""
    assert convert(tmp_path, "pegasus", factor=7.0, dry_run=True).storage == "code"
    assert convert(tmp_path, "pegasus", factor=8.0, dry_run=True).storage == "native"
    with pytest.raises(spikepatch.Refused, match=r"no setting of its config makes the plain Pegasus.* by 7"):
        convert(tmp_path, "pegasus", factor=7.0, storage="native")


def test_a_number_has_any_factor(tmp_path: Path) -> None:
    result = convert(tmp_path, "granite", factor=math.pi)

    assert result.storage == "native"
    assert config_json(result)["embedding_multiplier"] == math.pi


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_setting_that_does_nothing(model_type: str, tmp_path: Path) -> None:
    """Unknown keys are accepted and ignored; they are even ones that other architectures use."""
    ignored = {"embedding_multiplier": 1.0, "scale_emb": 1, "scale_embedding": False, "normalize_embedding": False}
    result = convert(tmp_path, model_type, ignored)

    assert result.storage == "code"
    assert "no setting of its config" in " ".join(result.notes)
    assert {name: config_json(result)[name] for name in ignored} == ignored


def test_a_setting_that_is_read_and_never_applied(tmp_path: Path) -> None:
    """whisper computes ``embed_scale`` from ``scale_embedding`` and leaves it at that."""
    sizes = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "vocab_size": 500}
    tokens = {"max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model("whisper", **sizes, **tokens, decoder_start_token_id=1, suppress_tokens=None)
    WhisperForCausalLM(config).save_pretrained(tmp_path / "source")
    assert config.scale_embedding is False
    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", reinit="none", dry_run=True)

    assert result.storage == "code"
    with pytest.raises(spikepatch.Refused, match="encoder_attn"):  # which only an encoder's output would run
        spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", dry_run=True)


def test_what_no_setting_does(tmp_path: Path) -> None:
    with pytest.raises(spikepatch.Refused, match="embed-ln does more to the embedding than to multiply it"):
        convert(tmp_path, "granite", recipe="embed-ln", storage="native")
    with pytest.raises(spikepatch.Refused, match="has nothing to hold"):
        convert(tmp_path, "granite", recipe="vanilla", storage="native")
    assert convert(tmp_path, "granite", recipe="vanilla", dry_run=True).storage == "plain"
    assert convert(tmp_path, "granite", recipe="embed-ln", dry_run=True).storage == "code"


@pytest.mark.slow
def test_an_encoder_decoder_as_a_subclass(tmp_path: Path) -> None:
    """A post-norm one has no use for a large shortcut; small sub-layers it can have."""
    with pytest.raises(spikepatch.Refused, match="does not apply to a post-norm model"):
        convert(tmp_path, "bart")
    result = convert(tmp_path, "bart", recipe="vanilla", storage="code")
    found = logits_elsewhere(result.out, trust=True, auto_class="AutoModelForSeq2SeqLM")
    live = transformers.BartForConditionalGeneration(config_of("bart")).eval()
    spikepatch.patch(live, "vanilla", reinit="all")

    assert (found["class"], found["problems"]) == ("SpikepatchBartForConditionalGeneration", {})
    assert found["generated"].shape[1] > 3
    with torch.no_grad():
        assert torch.equal(found["logits"], live(**found["inputs"]).logits)


@pytest.mark.parametrize("storage", ["auto", "native", "code"])
def test_an_architecture_that_always_scales(storage: Any, tmp_path: Path) -> None:
    with pytest.raises(spikepatch.Refused, match="already multiplied by 8"):
        convert(tmp_path, "gemma2", storage=storage)


def test_a_second_factor_would_multiply_with_the_setting(tmp_path: Path) -> None:
    with pytest.raises(spikepatch.Refused, match="already multiplied by 12"):
        convert(tmp_path, "granite", {"embedding_multiplier": 12.0})


# What it costs to find one


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the models whose forward pass has been recorded."""
    recorded: list[str] = []

    def recording(model: PreTrainedModel) -> Trace:
        recorded.append(type(model).__name__)
        return forward_of(model)

    monkeypatch.setattr(routes, "forward_of", recording)
    return recorded


@pytest.mark.parametrize(
    ("model_type", "unread", "needed"),
    [
        ("llama", {"scale_embedding": False, "use_mrope": False}, 0),  # what it reads adds biases: nothing to compare
        ("gpt2", {"scale_emb": 1.0}, 3),  # what is wanted, and two ways of attention
    ],
)
def test_only_settings_that_are_read_are_tried(
    model_type: str,
    unread: dict[str, Any],
    needed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recordings: list[str],
) -> None:
    result = convert(tmp_path, model_type, unread, dry_run=True)
    assert (result.storage, len(recordings)) == ("code", needed)

    recordings.clear()
    everything = nullcontext(set(config_of(model_type, **unread).to_dict()))
    monkeypatch.setattr(conversion, "settings_read", lambda: everything)
    again = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", dry_run=True)

    assert again == result
    assert len(recordings) > needed


class Derived(transformers.GraniteConfig):  # type: ignore[misc]
    """A flag of its own, which only the constructor reads."""

    times_eight: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.embedding_multiplier = 8.0 if self.times_eight else 1.0


def test_a_setting_that_the_constructor_reads(recordings: list[str]) -> None:
    small = tiny_config("granite").to_dict()
    config = Derived(**{name: value for name, value in small.items() if name != "embedding_multiplier"})
    source = Source("derived", "arch", None, config, transformers.GraniteForCausalLM, "AutoModelForCausalLM")
    with settings_read() as read:
        model = build_meta(source)
        plan = spikepatch.plan(model, "scaled-embed", reinit="all")
    restructure(model, plan)
    route = routes.choose(source, plan, model, "auto", read=read)

    assert not {"times_eight"} & read
    assert (route.kind, dict(route.original)) == ("native", {"times_eight": False})
    assert recordings


def test_a_config_that_does_not_say_whether_the_head_is_tied(tmp_path: Path) -> None:
    config: Any = tiny_config_for("omniasr", "seq2seq")
    assert not hasattr(config, "tie_word_embeddings")
    config.save_pretrained(tmp_path / "source")

    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", part="language", dry_run=True)
    assert result.storage == "code"


# Hosts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changes", "untie"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-4, "is_llama_config": True}, False),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}, True),
        ("mistral", {"sliding_window": None}, False),
    ],
)
def test_a_host(model_type: str, changes: dict[str, Any], untie: bool, tmp_path: Path) -> None:
    changes = {**changes, "tie_word_embeddings": untie}
    result = convert(tmp_path, model_type, changes, storage="host", untie=untie, factor=7.3)
    found = logits_elsewhere(result.out, trust=False)
    with torch.no_grad():
        logits = patched(result, untie=untie, factor=7.3)(**found["inputs"]).logits

    assert len(result.plan.select(Untie)) == untie
    assert (result.storage, found["class"], found["problems"]) == ("host", "GraniteForCausalLM", {})
    assert torch.equal(found["logits"], logits)
    assert not list(result.out.glob("*.py"))


@pytest.mark.slow
def test_a_host_with_learned_weights(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", reinit="none", storage="host", factor=3.0)
    found = logits_elsewhere(result.out, trust=False)
    model = tiny_model("llama")
    spikepatch.patch(model, "scaled-embed", reinit="none", factor=3.0)
    with torch.no_grad():
        assert torch.equal(found["logits"], model(**found["inputs"]).logits)


def test_what_a_host_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(spikepatch.Refused, match="granite has no sliding_window, which the source's config sets"):
        convert(tmp_path, "mistral", {"sliding_window": 16}, storage="host")
    with pytest.raises(spikepatch.Refused, match="no architecture is known to compute what GPT2LMHeadModel does"):
        convert(tmp_path, "gpt2", storage="host")


def test_auto_takes_no_host(tmp_path: Path) -> None:
    assert convert(tmp_path, "llama", dry_run=True).storage == "code"


@pytest.mark.parametrize(
    "wrong",
    [
        {"constants": {"residual_multiplier": 1.0, "logits_scaling": 1.0 + 2**-40}},
        {"constants": {"residual_multiplier": 0.5, "logits_scaling": 1.0}},
        {"powers": {"attention_multiplier": ("head_dim", -0.49)}},
        {"factor": "logits_scaling", "constants": {"residual_multiplier": 1.0}},
    ],
)
def test_a_host_is_not_believed(wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "HOSTS", {"llama": dataclasses.replace(HOSTS["llama"], **wrong)})
    with pytest.raises(spikepatch.Refused, match="granite does not compute the same for this config"):
        convert(tmp_path, "llama", storage="host")
