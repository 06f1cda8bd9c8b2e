"""``check`` end to end: sources, recipes side by side, real numbers, many architectures."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers import AutoModelForCausalLM, PegasusConfig, PegasusForConditionalGeneration

import spikepatch
from spikepatch import Refused, StabilityReport
from spikepatch.cli import main
from spikepatch.preflight.inputs import random_tokens
from spikepatch.preflight.judge import Thresholds
from spikepatch.preflight.present import summary_table
from spikepatch.source.meta import build_meta
from spikepatch.source.tokenizer import SAMPLE
from tests.architectures import tiny_config, tiny_model
from tests.preflight.initialisations import gpt2, reports
from tests.residual import configs
from tests.residual.configs import model_class, tiny_config_for
from tests.residual.test_stream import EXAMPLE, Block

#: Architectures of different structure: (mapping, type); the first in the default suite.
DEFAULT: tuple[tuple[configs.Mapping, str], ...] = (
    ("causal", "gpt2"), ("causal", "gemma2"), ("causal", "mixtral"), ("causal", "mamba2"), ("masked", "bert"),
    ("seq2seq", "t5"),
)  # fmt: skip
OTHERS: tuple[tuple[configs.Mapping, str], ...] = (
    ("causal", "llama"), ("causal", "falcon"),
    ("causal", "gpt_neox"), ("causal", "gptj"), ("causal", "opt"), ("causal", "bloom"), ("causal", "olmo2"),
    ("causal", "granite"), ("causal", "jamba"), ("causal", "nemotron_h"), ("causal", "deepseek_v3"),
    ("causal", "qwen3_next"), ("causal", "phi3"), ("causal", "cohere"), ("causal", "recurrent_gemma"),
    ("causal", "lfm2"), ("causal", "gpt_oss"), ("causal", "zamba2"), ("causal", "gpt_neo"), ("causal", "xglm"),
    ("causal", "rwkv"), ("causal", "minimax"), ("masked", "modernbert"), ("masked", "albert"), ("masked", "deberta-v2"),
    ("seq2seq", "bart"),
)  # fmt: skip

#: What scripts rely on.
KEYS = {
    "verdict", "findings", "embeddings", "layers", "initial_loss", "log_vocab", "gradient_ratio", "eq15_excess_layer1",
    "eq15_excess_layer1_stream", "models", "audit", "refused",
}  # fmt: skip
LAYER_KEYS = {"sigma_in", "sigma_branch", "bound_attention", "bound_mlp", "jacobian", "gradient_norm"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mapping", "model_type"), [*DEFAULT, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_every_structure(mapping: configs.Mapping, model_type: str) -> None:
    model = build_meta(model_class(model_type, mapping), tiny_config_for(model_type, mapping), where=model_type)
    report = spikepatch.check(model, tokens=12, deep=True)
    assert report.verdict in {"stable", "at-risk", "unstable"}
    assert not report.not_measured
    residual = spikepatch.inspect(model)
    assert sum(len(layer.sublayers) for layer in report.layers) == report.sublayers == residual.sublayers
    assert report.initial_loss is not None
    assert report.log_vocab is not None
    assert math.isfinite(report.initial_loss)
    for sublayer in (s for layer in report.layers for s in layer.sublayers):
        assert sublayer.sigma_in >= sublayer.sigma_in_least > 0
        assert sublayer.gradient_norm > 0
        assert sublayer.jacobian is not None
        assert (sublayer.bound is None) == bool(sublayer.not_covered)
        if sublayer.bound is not None:
            assert sublayer.bound >= sublayer.jacobian


def test_there_are_many_structures() -> None:
    assert len({*DEFAULT, *OTHERS}) >= 30


def test_bounds_hold_for_gaussian_weights() -> None:
    """Eq. 15 and Eq. 20 from above, and not by orders of magnitude, for every initialisation."""
    checked = 0
    model = gpt2(3, 64, 4, vocabulary=300, positions=32)
    report = spikepatch.check(model, recipes=["vanilla", "embed-ln"], tokens=16, deep=True)
    for each in (report, *report.models):
        assert each.bound_product is not None
        assert each.jacobian_product is not None
        assert each.bound_product >= each.jacobian_product > 1
        for sublayer in (s for layer in each.layers for s in layer.sublayers):
            assert sublayer.bound is not None
            assert sublayer.jacobian is not None
            assert sublayer.jacobian <= sublayer.bound <= 5 * sublayer.jacobian
            checked += 1
    assert checked == 3 * 6


def test_json_keys() -> None:
    report = spikepatch.check(tiny_model("gpt2"), recipes=["scaled-embed"], tokens=12)
    data = json.loads(report.to_json())
    assert data.keys() >= KEYS
    assert data["layers"][0].keys() >= LAYER_KEYS
    assert [model["recipe"] for model in data["models"]] == ["scaled-embed"]
    assert data["models"][0].keys() == data.keys()
    assert data["findings"][0].keys() == {"name", "severity", "what", "measured", "limit", "equation", "remedy"}


def test_a_folder_is_checked_with_its_weights(save_tiny: Callable[..., Path]) -> None:
    """The same numbers as for the loaded model; a recipe's are those of the converted folder."""
    folder = save_tiny("gpt2", n_embd=64, n_layer=3, n_head=4, vocab_size=500, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    stored, loaded = (spikepatch.check(m, recipes=["scaled-embed"], tokens=16, seed=5) for m in (str(folder), model))
    assert stored.weights == f"stored in {folder}"
    assert stored.audit is not None
    assert not stored.audit.learned
    assert _numbers(stored) == _numbers(loaded)
    assert _numbers(stored.models[0]) == _numbers(loaded.models[0])
    assert stored.gradient_ratio != stored.models[0].gradient_ratio


def test_a_patched_model_is_what_the_recipe_column_shows(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_tiny("llama", **_LLAMA)
    spikepatch.convert(str(folder), tmp_path / "out", recipe="scaled-embed", seed=2)
    column = spikepatch.check(str(folder), recipes=["scaled-embed"], tokens=16, seed=2).models[0]
    patched = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert _numbers(spikepatch.check(patched, tokens=16, seed=2)) == _numbers(column)


_LLAMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 64,
}  # fmt: skip


def _numbers(report: StabilityReport) -> dict[str, object]:
    left_out = {"source", "architecture", "weights", "recipe", "findings", "models", "verdict", "audit"}
    return {k: v for k, v in dataclasses.asdict(report).items() if k not in left_out}


def test_the_model_is_not_changed() -> None:
    model = tiny_model("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spikepatch.check(model, recipes=["scaled-embed"], untie=True, tokens=12, deep=True, steps=2)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not hasattr(model.config, "spikepatch")


def test_an_encoder_has_a_report_of_its_own() -> None:
    """Against hidden states of transformers' own forward pass, and gradients of its own backward pass."""
    sizes = {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = PegasusConfig(d_model=64, encoder_layers=3, decoder_layers=2, vocab_size=200, dropout=0.0, **sizes)
    model = PegasusForConditionalGeneration(config).eval()
    report = spikepatch.check(model, tokens=12, batch=2, seed=3)
    (encoder,) = report.streams
    assert (encoder.stream, encoder.sublayers, len(encoder.layers)) == ("encoder", 6, 3)
    assert (report.stream, report.sublayers, len(report.layers)) == ("output", 6, 2)
    assert encoder.initial_loss is None

    inputs = random_tokens(model, tokens=12, batch=2, seed=3)
    output = model(**inputs, output_hidden_states=True)
    states = output.encoder_hidden_states
    for state in states:
        state.retain_grad()
    targets = inputs["decoder_input_ids"][:, 1:].flatten()
    loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    assert report.initial_loss == pytest.approx(float(loss.detach()), rel=1e-5)
    for layer, state in zip(encoder.layers, states[:-1], strict=True):
        assert layer.sigma_in == pytest.approx(float(state.detach().std(-1, correction=0).mean()), rel=1e-5)
        assert layer.gradient_norm == pytest.approx(float(state.grad.norm()), rel=1e-4)
    outputs = [*(m for layer in model.model.encoder.layers for m in (layer.self_attn.out_proj, layer.fc2)),
               *(m for layer in model.model.decoder.layers
                 for m in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2))]  # fmt: skip
    expected = math.hypot(*(float(m.weight.grad.norm()) for m in outputs))
    assert report.gradients["residual projections"] == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        model.model.encoder.layers[2].fc2.weight[0, 0] = math.nan
    assert spikepatch.check(model, tokens=12).streams[0].verdict == "unstable"


def test_a_plain_module() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.block = nn.Embedding(50, 16), Block(16)
            self.head = nn.Linear(16, 50, bias=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.block(self.tokens(ids)))
            return logits

    model = Plain()
    report = spikepatch.check(model, recipes=["scaled-embed"], example_inputs=EXAMPLE)
    patched = spikepatch.patch(copy.deepcopy(model), "scaled-embed", reinit="all", example_inputs=EXAMPLE)
    for each, measured in zip((model, patched), report.every, strict=True):
        start = each.get_submodule("tokens")(EXAMPLE["ids"]).detach().double()  # (1, tokens, width)
        expected = float(start.std(-1, correction=0).mean())
        assert measured.sigma_start == pytest.approx(expected, rel=16 * torch.finfo(torch.float32).eps)
    with torch.no_grad():  # as many outputs as the table has rows: logits
        loss = nn.functional.cross_entropy(model(EXAMPLE["ids"])[0, :-1], EXAMPLE["ids"][0, 1:])
    assert report.initial_loss == pytest.approx(float(loss), rel=1e-5)
    assert report.gradient_ratio == 1


def test_half_precision_is_measured_in_single() -> None:
    model = tiny_model("llama")
    single = spikepatch.check(model, tokens=12)
    half = spikepatch.check(model.to(torch.bfloat16), tokens=12)
    assert half.sigma_start == pytest.approx(single.sigma_start, rel=2**-8)
    assert half.gradient_ratio == pytest.approx(single.gradient_ratio, rel=0.01)


def test_steps_move_the_model() -> None:
    report = spikepatch.check(gpt2(2, 64, 4, vocabulary=300, positions=32), tokens=16, steps=5, lr=1e-2)
    assert [step.step for step in report.steps] == [0, 1, 2, 3, 4, 5]
    assert report.steps[0].loss == pytest.approx(report.initial_loss, rel=1e-5)
    assert report.steps[-1].loss < report.steps[0].loss - 0.5
    assert report.steps[-1].sigma_last > report.steps[0].sigma_last
    assert all(step.attention_logit is not None for step in report.steps)


def test_a_learning_rate_that_is_too_large() -> None:
    report = spikepatch.check(gpt2(2, 64, 4, vocabulary=300, positions=32), tokens=16, steps=8, lr=30.0)
    assert report.verdict == "unstable"
    assert "steps" in {finding.name for finding in report.findings}


def test_the_largest_attention_logit() -> None:
    """Against the model's own queries and keys, of the tokens that each one sees."""
    model = gpt2(1, 64, 4, vocabulary=300, positions=32)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(40)
    report = spikepatch.check(model, tokens=16, batch=1, steps=1)
    ids = random_tokens(model, tokens=16, batch=1, seed=0)["input_ids"]
    block = model.transformer.h[0]
    with torch.no_grad():
        x = block.ln_1(model.transformer.wte(ids) + model.transformer.wpe(torch.arange(16)))
        query, key, _ = block.attn.c_attn(x).split(64, dim=2)
        split = [t.view(1, 16, 4, 16).transpose(1, 2) for t in (query, key)]
        seen = torch.ones(16, 16, dtype=torch.bool).tril()
        expected = float((split[0] @ split[1].transpose(2, 3))[..., seen].max()) / 4
    assert report.steps[0].attention_logit == pytest.approx(expected, rel=1e-4)


def test_what_is_refused() -> None:
    with pytest.raises(spikepatch.Refused, match="tokens cannot be 1"):
        spikepatch.check(tiny_model("gpt2"), tokens=1)
    with pytest.raises(spikepatch.Refused, match="no device"):
        spikepatch.check(tiny_model("gpt2"), device="nowhere")
    partly = tiny_model("gpt2")
    partly.transformer.h[1].to("meta")
    with pytest.raises(spikepatch.Refused, match="not in memory"):
        spikepatch.check(partly)
    with pytest.raises(spikepatch.Refused, match="no recipe"):
        spikepatch.check(tiny_model("gpt2"), recipes=["nothing"])
    with pytest.raises(spikepatch.BadSource, match="no learned weights"):
        spikepatch.check("arch:gpt2", recipes=["scaled-embed"], reinit="none", tokens=8)


@pytest.mark.slow
def test_the_order_of_initialisations() -> None:
    """24 layers as in the paper, narrow: the verdicts of the five, and gradients in the paper's order."""
    found = reports(gpt2(24, 64, 4, vocabulary=500, positions=32), tokens=24)
    ratios = {name: report.gradient_ratio for name, report in found.items()}
    assert all(ratio is not None for ratio in ratios.values())
    assert ratios["Embed LN"] < ratios["Scaled Embed"] < 1.5 < ratios["Vanilla"] < ratios["Xavier"]  # type: ignore[operator]
    assert found["Scaled Embed"].verdict == found["Embed LN"].verdict == "stable"
    assert found["HF default"].verdict == found["Vanilla"].verdict == "at-risk"
    assert found["Xavier"].verdict in {"at-risk", "unstable"}
    # Independent of the width.
    assert found["Scaled Embed"].eq15_excess_layer1 == pytest.approx(0.822, rel=0.05)
    assert found["Embed LN"].eq15_excess_layer1 == pytest.approx(0.520, rel=0.05)


@pytest.mark.slow
def test_the_paper_sized_table() -> None:
    """24 layers, d = 1024, 256 random tokens, another seed than the table's: single draws differ by a few per cent."""
    found = reports(gpt2(24, 1024, 16), tokens=256)
    table = {
        "HF default": (0.028, 0.077, 0.390, 13.3, 11.0),
        "Vanilla": (0.028, 0.075, 0.389, 12.9, 11.1),
        "Scaled Embed": (0.632, 0.636, 0.717, 1.2, 17.7),
        "Embed LN": (0.988, 0.991, 1.044, 1.1, 19.1),
        "Xavier": (0.032, 0.492, 3.869, 122, 10.9),
    }
    for name, (first, second, last, ratio, loss) in table.items():
        report = found[name]
        sizes = [report.layers[i].sigma_in for i in (0, 1, -1)]
        assert sizes == pytest.approx([first, second, last], rel=0.05), name
        assert report.gradient_ratio == pytest.approx(ratio, rel=0.1), name
        assert report.initial_loss == pytest.approx(loss, rel=0.05), name
    verdicts = {name: report.verdict for name, report in found.items()}
    assert verdicts == {
        "HF default": "at-risk", "Vanilla": "at-risk", "Scaled Embed": "stable", "Embed LN": "stable",
        "Xavier": "unstable",
    }  # fmt: skip
    closed = {"Vanilla": 26.3, "Scaled Embed": 0.822, "Embed LN": 0.520, "Xavier": 576}
    assert {name: found[name].eq15_excess_layer1 for name in closed} == pytest.approx(closed, rel=0.02)
    stream = {"Vanilla": 18.6, "Scaled Embed": 0.82, "Embed LN": 0.53, "Xavier": 113}
    assert {name: found[name].eq15_excess_layer1_stream for name in stream} == pytest.approx(stream, rel=0.02)


@pytest.mark.slow
def test_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct on English text, against the loss and the sizes measured with transformers."""
    text = tmp_path / "genesis.txt"
    text.write_text(SAMPLE)
    report = spikepatch.check(str(smollm2), text=text, tokens=200, batch=1)
    assert report.verdict == "learned"
    assert {finding.name for finding in report.findings} == {"learned"}
    assert report.audit is not None
    assert report.audit.findings == ()
    assert report.sigma_start == pytest.approx(0.11, rel=0.1)
    assert report.layers[1].sigma_in == pytest.approx(1.84, rel=0.2)
    assert report.layers[-1].sigma_in == pytest.approx(31.4, rel=0.2)
    assert report.initial_loss == pytest.approx(1.74, rel=0.05)
    assert report.eq15_excess_layer1 is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gpt2", {"recipe": "scaled-embed"}),
        ("gpt2", {"recipe": "embed-ln", "untie": True}),
        ("llama", {"recipe": "embed-ln"}),
        ("llama", {"storage": "host"}),
        ("granite", {"storage": "native"}),
    ],
)
def test_a_patched_folder_is_measured_with_its_patch(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    tiny_config(model_type).save_pretrained(tmp_path / "source")
    done = spikepatch.convert(str(tmp_path / "source"), tmp_path / "patched", **options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", trust_remote_code=True)

    found = spikepatch.check(str(tmp_path / "patched"), tokens=16, recipes=["vanilla", "embed-ln"])
    live = spikepatch.check(loaded, tokens=16)
    before = spikepatch.check(str(tmp_path / "source"), tokens=16)

    assert done.storage == options.get("storage", "code")
    assert live.layers[0].sigma_in > 2 * before.layers[0].sigma_in
    for name in ("embeddings", "layers", "initial_loss", "gradient_ratio", "verdict"):
        assert getattr(found, name) == getattr(live, name), name
    source = spikepatch.check(str(tmp_path / "source"), tokens=16, recipes=["vanilla", "embed-ln"])
    for ours, theirs in zip(found.models, source.models, strict=True):  # an untied head stays so, and has gradients
        assert [layer.sigma_in for layer in ours.layers] == [layer.sigma_in for layer in theirs.layers]


def test_a_patched_config_without_weights_is_refused(tmp_path: Path) -> None:
    tiny_config("gpt2").save_pretrained(tmp_path / "source")
    spikepatch.convert(str(tmp_path / "source"), tmp_path / "patched")
    (tmp_path / "patched" / "model.safetensors").unlink()
    with pytest.raises(Refused, match="it is patched, and has no weights"):
        spikepatch.check(str(tmp_path / "patched"))


def test_a_recipe_that_does_not_apply_is_a_column() -> None:
    """Gemma 2 multiplies its embedding already; the other recipe is measured all the same."""
    report = spikepatch.check(tiny_model("gemma2"), recipes=["scaled-embed", "vanilla"], tokens=12)
    refused, vanilla = report.models
    assert "already" in refused.refused
    assert refused.verdict == "unknown"
    assert vanilla.sigma_start is not None
    assert not vanilla.refused
    shown = {row[0]: row[1:] for row in summary_table(report, Thresholds()).rows}
    assert shown["verdict"][1].startswith("refused: ")


@pytest.mark.parametrize(
    "model_type", ["gemma2", *(pytest.param(t, marks=pytest.mark.slow) for t in ("gpt2", "olmo2", "granite"))]
)
@pytest.mark.parametrize("untie", [False, True])
def test_every_remedy_that_is_printed_runs(model_type: str, untie: bool, tmp_path: Path) -> None:
    """Of a folder: the commands. Of a loaded model: the calls. Each as it stands, but for the place of the output."""
    strict = {"ratio_at_risk": 1e-3, "ratio_unstable": 1e6}
    tiny_config(model_type, tie_word_embeddings=True, vocab_size=60).save_pretrained(tmp_path / "source")
    source, model, ran = str(tmp_path / "source"), tiny_model(model_type), 0
    own = tmp_path / "of our own.toml"
    kinds = "".join(f'[[transform]]\nkind = "{kind}"\n' for kind in ("small_init", "residual_init", "embed_norm"))
    own.write_text(f'name = "own"\n{kinds}')
    for subject in (source, model):
        report = spikepatch.check(subject, recipes=["vanilla", str(own)], untie=untie, tokens=12, thresholds=strict)
        assert [each.recipe for each in report.models] == ["vanilla", "own"]
        (first,) = {f.remedy for f in report.findings if "spikepatch" in f.remedy}
        (first,) = {f.remedy for f in report.findings if "spikepatch" in f.remedy}
        tied = subject is source or bool(model.config.tie_word_embeddings)
        assert ("untie" in first) == (untie and tied)
        for remedy in {f.remedy for each in report.every for f in each.findings if f.remedy.startswith("spikepatch")}:
            ran += 1
            if subject is source:
                words = shlex.split(remedy.replace(" OUT ", f" {tmp_path / f'out{ran}'} "))
                assert words[0] == "spikepatch"
                done = CliRunner().invoke(main, [*words[1:], *(["--tokens", "12"] if words[1] == "check" else [])])
                assert done.exit_code == 0, (remedy, done.output)
            else:
                eval(remedy, {"spikepatch": spikepatch, "model": copy.deepcopy(model)})
    assert ran >= 2
