"""The map as a table: everything that the map says, readable, and names that can be copied."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, T5Config, T5ForConditionalGeneration

import spikepatch
from spikepatch.report.document import Table
from spikepatch.report.terminal import table_lines
from spikepatch.residual.map import ResidualMap, pattern
from spikepatch.residual.table import described
from tests.architectures import tiny_model
from tests.residual import plain_gpt
from tests.residual.plain_gpt import GPT


def lines(residual: ResidualMap) -> Iterator[str]:
    for part in described(residual):
        if isinstance(part, str):
            yield part
        else:
            yield from table_lines(Table("", ("",) * len(part[0]), tuple(part)), None)


def test_table_of_a_plain_gpt() -> None:
    residual = spikepatch.inspect(GPT(), example_inputs={"idx": torch.arange(12)[None]})
    assert (
        "\n".join(lines(residual))
        == """\
GPT (a plain module): pre-norm, width d = 32, N = 3 layers, S = 6 sub-layers
proven: with all 6 residual projections cut, the output depends only on the embedding path, on
norms and gains on the stream, and on the head; any one given back brings its own sub-layer alive
embedding            transformer.wte.weight                          token, times 1
embedding            transformer.wpe.weight                          position, times 1
matrix               transformer.h.*.attn.c_attn.weight  layers 0-2  attention, 32 -> 96, reads the stream
matrix               transformer.h.*.mlp.c_fc.weight     layers 0-2  mlp, 32 -> 128, reads the stream
residual projection  transformer.h.*.attn.c_proj.weight  layers 0-2  attention, 32 -> 32, then bias attn.c_proj.bias
residual projection  transformer.h.*.mlp.c_proj.weight   layers 0-2  mlp, 128 -> 32, then bias mlp.c_proj.bias
pre norm             transformer.h.*.ln_1                layers 0-2  layernorm, eps 1e-05, gain w, bias
pre norm             transformer.h.*.ln_2                layers 0-2  layernorm, eps 1e-05, gain w, bias
final norm           transformer.ln_f                                layernorm, eps 1e-05, gain w, bias
head                 lm_head.weight                                  tied
tied                 lm_head.weight                                  is transformer.wte.weight"""
    )


def test_a_map_prints_in_short() -> None:
    """One line for each group of parameters, and whether it is proven; of a map that is not, why."""
    residual = spikepatch.inspect(tiny_model("qwen2_moe"))
    first, *others = str(residual).splitlines()
    assert first.endswith(f"N = {residual.layers} layers, S = {residual.sublayers} sub-layers, proven")
    named = {line.split()[-1] for line in others}
    assert {pattern(p.parameter) for p in residual.residual_projections} <= named
    assert len(others) < 25
    wrong = dataclasses.replace(residual, proven=False, leaks=("a reason", "another"))
    assert str(wrong).splitlines()[0].endswith("NOT proven: a reason; another")


@pytest.mark.slow
def test_table_says_how_weights_are_stored_and_what_follows_them() -> None:
    transposed = "\n".join(lines(spikepatch.inspect(tiny_model("gpt2"))))
    assert "attention, 64 -> 192, (in, out), reads the stream" in transposed
    gemma = "\n".join(lines(spikepatch.inspect(tiny_model("gemma2"))))
    assert "token, times 8\n" in gemma
    assert "attention, 64 -> 64, then the norm post_attention_layernorm" in gemma
    assert "rmsnorm, eps 1e-06, gain 1+w\n" in gemma
    granite = "\n".join(lines(spikepatch.inspect(tiny_model("granite", residual_multiplier=0.25))))
    assert "mlp, 96 -> 64, then times 0.25\n" in granite
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28}
    dinov2 = "\n".join(lines(spikepatch.inspect(Dinov2Model(Dinov2Config(**sizes)))))
    assert "then bias attention.o_proj.bias, gain layer_scale1.lambda1" in dinov2


def test_every_stream_is_in_the_table() -> None:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    residual = spikepatch.inspect(T5ForConditionalGeneration(T5Config(**sizes)))
    text = [*lines(residual)]
    (blank,) = (i for i, line in enumerate(text) if not line)
    assert (
        text[blank + 1]
        == "the stream that cross-attention reads: pre-norm, width d = 32, N = 2 layers, S = 4 sub-layers"
    )
    assert [line.startswith("proven: ") for line in text].count(True) == 2
    own = {name for line in text[:blank] for name in line.split() if name.startswith("encoder.")}
    assert own == {"encoder.embed_tokens.weight"}  # tied
    assert any("encoder.block.*.layer.*.SelfAttention.o.weight" in line for line in text[blank:])


@pytest.mark.slow
def test_leaks_are_listed() -> None:
    residual = spikepatch.inspect(tiny_model("gpt2"))
    broken = dataclasses.replace(residual, proven=False, leaks=("a.weight: still reaches the output",))
    text = [*lines(broken)]
    assert text[1:3] == [
        "NOT proven: with all 6 residual projections cut,",
        "  a.weight: still reaches the output",
    ]


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A checkpoint's folder with modelling code of its own, and no weights."""
    folder = tmp_path / "remote"
    folder.mkdir()
    shutil.copy(plain_gpt.__file__, folder / "modeling_plain.py")
    classes = {"AutoConfig": "PlainConfig", "AutoModelForCausalLM": "PlainForCausalLM"}
    config = {
        "model_type": "plain_gpt",
        "architectures": ["PlainForCausalLM"],
        "tie_word_embeddings": True,
        "auto_map": {auto: f"modeling_plain.{name}" for auto, name in classes.items()},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def inspect(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where trusted code leaves nothing behind for other tests."""
    command = [sys.executable, "-m", "spikepatch", "inspect", str(folder), *options]
    env = os.environ | {"HF_MODULES_CACHE": str(folder.parent / "modules")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.slow
def test_own_code_is_run_when_trusted(remote: Path) -> None:
    shown = inspect(remote, "--trust-remote-code")
    assert shown.returncode == 0, shown.stderr
    summary, proof = shown.stdout.splitlines()[:2]
    assert summary == "PlainForCausalLM (plain_gpt): pre-norm, width d = 32, N = 3 layers, S = 6 sub-layers"
    assert proof.startswith("proven: with all 6 residual projections cut")
    assert any(line.split()[-1] == "gpt.transformer.wte.weight" for line in shown.stdout.splitlines())


@pytest.mark.slow
def test_own_code_is_refused_without_trust(remote: Path) -> None:
    refused = inspect(remote)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "needs code that comes with the model" in refused.stderr
    assert "--trust-remote-code" in refused.stderr
    assert not (remote.parent / "modules").exists()
