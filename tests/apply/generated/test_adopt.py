"""A live model is adopted, saved, and loaded in a process that cannot import spikepatch."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PretrainedConfig,
    Trainer,
    TrainingArguments,
)

from spikepatch.apply.generated.adopt import adopt, generated_classes
from spikepatch.errors import Refused
from spikepatch.source.classes import original_of

TESTS = Path(__file__).parent
WIDTH, VOCABULARY = 32, 64

#: Arguments of the tiny config; the token embedding, the residual projections and the other filled parameters.
ARCHITECTURES: dict[str, tuple[dict[str, Any], str, list[str], list[str]]] = {
    "gpt2": (
        {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 32},
        "transformer.wte",
        ["transformer.h.*.attn.c_proj.weight", "transformer.h.*.mlp.c_proj.weight"],
        ["transformer.h.*.attn.c_attn.weight"],
    ),
    "llama": (
        {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "model.embed_tokens",
        ["model.layers.*.self_attn.o_proj.weight", "model.layers.*.mlp.down_proj.weight"],
        ["model.layers.*.self_attn.q_proj.weight"],
    ),
    "mixtral": (
        {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4},
        "model.embed_tokens",
        ["model.layers.*.self_attn.o_proj.weight", "model.layers.*.mlp.experts.down_proj"],
        ["model.layers.*.mlp.experts.gate_up_proj"],
    ),
    "opt": (
        {"num_attention_heads": 2, "ffn_dim": 64, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 32},
        "model.decoder.embed_tokens",
        ["model.decoder.layers.*.self_attn.out_proj.weight", "model.decoder.layers.*.fc2.weight"],
        ["model.decoder.layers.*.fc1.weight"],
    ),
    "bloom": (
        {"n_head": 2},
        "transformer.word_embeddings",
        ["transformer.h.*.self_attention.dense.weight", "transformer.h.*.mlp.dense_4h_to_h.weight"],
        ["transformer.h.*.mlp.dense_h_to_4h.weight"],
    ),
    "mamba": (
        {"state_size": 4},
        "backbone.embeddings",
        ["backbone.layers.*.mixer.out_proj.weight"],
        ["backbone.layers.*.mixer.in_proj.weight"],
    ),
}


def tiny_config(model_type: str) -> PretrainedConfig:
    arguments = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if model_type in ("llama", "mixtral"):
        arguments["intermediate_size"] = 64
    return AutoConfig.for_model(model_type, **arguments | ARCHITECTURES[model_type][0])


def tiny_model(model_type: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()


def record_of(model_type: str, edit: dict[str, Any] | None = None) -> dict[str, Any]:
    _, embedding, residual, others = ARCHITECTURES[model_type]
    fills = [_fill(name, 0.3, -0.5) for name in residual]
    fills += [_fill(name, 0.5, 0.0) for name in [*others, f"{embedding}.weight"]]
    axis = 1 if model_type == "gpt2" else 0  # of the outputs
    stream = {"width": WIDTH, "axis": axis, "sublayers": residual, "count": 2 * len(residual)}
    return {
        "version": "0.1.0",
        "recipe": "test",
        "reinit": "none",
        "seed": 0,
        "no_decay": [],
        "embeddings": {embedding: edit or {"factor": "sqrt(width)"}},
        "init": {"streams": [stream], "fills": fills, "constants": []},
    }


def _fill(parameter: str, std: float, depth: float) -> dict[str, Any]:
    law = {"distribution": "normal", "size": std, "cut": 0.0, "fan": WIDTH, "axes": [], "stream": 0}
    return {"parameter": parameter, "std": std, "depth": depth, **law}


def in_a_fresh_process(script: str, *arguments: object, home: Path) -> str:
    """Run ``script`` with warnings as errors, its own module cache, and without spikepatch."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(TESTS / script), *map(str, arguments)],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_in_a_fresh_process(folder: Path, model: Any, ids: torch.Tensor, home: Path) -> None:
    expected = {
        "ids": ids,
        "rows": model.get_input_embeddings()(ids).detach(),
        "logits": model(ids).logits.detach(),
        "parameters": {name: p.detach() for name, p in model.named_parameters()},
    }
    torch.save(expected, home / "expected.pt")
    assert in_a_fresh_process("load_patched.py", folder, home / "expected.pt", home=home) == "loaded\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "edit"),
    [(name, None) for name in ARCHITECTURES] + [("gpt2", {"norm": "layernorm", "eps": 1e-5, "affine": True})],
)
def test_a_patched_model_saves_what_loads_patched(
    model_type: str, edit: dict[str, Any] | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, record = tiny_model(model_type), record_of(model_type, edit)
    ids = torch.randint(3, VOCABULARY, (2, 8))
    embedding = model.get_input_embeddings()
    plain_rows, plain_logits = embedding(ids), model(ids).logits
    tensors = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    names, buffers = set(model.state_dict()), {name for name, _ in model.named_buffers()}
    capfd.readouterr()

    adopt(model, record)

    assert capfd.readouterr() == ("", "")
    after = {name: (id(p), p) for name, p in model.named_parameters()}
    added = {f"{ARCHITECTURES[model_type][1]}.norm.{n}" for n in ("weight", "bias")} if edit else set()
    assert after.keys() - tensors.keys() == added == set(model.state_dict()) - names
    assert all(after[name][0] == identity and torch.equal(after[name][1], p) for name, (identity, p) in tensors.items())
    assert {name for name, _ in model.named_buffers()} == buffers
    assert model.get_input_embeddings() is embedding
    assert all(m.config is model.config for m in model.modules() if getattr(m, "config", None) is not None)
    replaced = {
        "model_type": model_type,
        "architectures": [type(model).__bases__[1].__name__],
        "auto_map": None,
        "tokenizer_class": None,
    }
    assert record.items() <= model.config.spikepatch.items()
    assert model.config.spikepatch["original"] == replaced
    rows = embedding(ids)
    if edit is None:
        assert torch.equal(rows, plain_rows * float(WIDTH) ** 0.5)
    assert not torch.equal(model(ids).logits, plain_logits)

    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    check_in_a_fresh_process(folder, model, ids, home=tmp_path)


@pytest.mark.slow
def test_a_trainer_checkpoint_loads_patched(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    adopt(model, record_of("gpt2"))
    before = model.transformer.wte.weight.clone()
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, VOCABULARY, (4, 8))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert not torch.equal(model.transformer.wte.weight, before)

    ids = torch.randint(3, VOCABULARY, (2, 8))
    check_in_a_fresh_process(tmp_path / "run" / "checkpoint-2", model.eval(), ids, home=tmp_path)


@pytest.mark.slow
def test_the_tokenizer_of_a_folder_without_tokenizer_config_is_still_found(tmp_path: Path) -> None:
    characters = [chr(n) for n in range(33, 127)] + ["Ġ", "Ċ"]
    merges = [("s", "p"), ("sp", "i"), ("Ġ", "p")]
    tokens = ["<|endoftext|>", *characters, *("".join(pair) for pair in merges)]
    plain, patched = tmp_path / "plain", tmp_path / "patched"
    model = GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=1, n_head=2, vocab_size=len(tokens), eos_token_id=0))
    model.save_pretrained(plain)
    record = record_of("gpt2") | {"init": None}
    adopt(model, record)
    model.save_pretrained(patched)
    for folder in (plain, patched):
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        assert not (folder / "tokenizer_config.json").exists()
    text = "spike patch: spikes"
    ids = GPT2Tokenizer.from_pretrained(plain)(text).input_ids
    assert len(set(ids)) > 5
    found = [json.loads(in_a_fresh_process("load_tokenizer.py", f, text, home=tmp_path)) for f in (plain, patched)]
    assert found == [{"class": "GPT2Tokenizer", "trusted": ids, "untrusted": ids}] * 2


def test_copies_of_the_config_are_patched_too() -> None:
    model = BartForCausalLM(BartConfig(d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16))
    before = model.config
    nested: Any = nn.Module()
    nested.config = copy.deepcopy(model.config)
    model.model.decoder.nested = nested
    adopt(model, record_of("gpt2") | {"embeddings": {"model.decoder.embed_tokens": {"factor": 2.0}}, "init": None})
    assert model.config is before
    assert type(model.config) is type(nested.config) is model.config_class
    assert model.config.model_type == nested.config.model_type == "spikepatch_bart"


def test_the_generated_class_lives_in_a_real_file() -> None:
    generated = generated_classes(original_of(GPT2LMHeadModel))
    for cls, auto_class in (
        (generated.config, "AutoConfig"),
        (generated.base, "AutoModel"),
        (generated.model, "AutoModelForCausalLM"),
    ):
        assert cls is not None
        file = sys.modules[cls.__module__].__file__
        assert file is not None
        assert Path(file).name == "modeling_spikepatch_gpt2.py"
        assert cls._auto_class == auto_class  # type: ignore[attr-defined]
    assert generated is generated_classes(original_of(GPT2LMHeadModel))


def test_configs_survive_round_trips() -> None:
    config_class: Any = generated_classes(original_of(GPT2LMHeadModel)).config
    record = record_of("gpt2")
    config = config_class(n_layer=3, spikepatch=record)
    for written in (config.to_dict(), config.to_diff_dict(), json.loads(config.to_json_string())):
        read = config_class.from_dict(written)
        assert (read.spikepatch, read.n_layer, read.model_type) == (record, 3, "spikepatch_gpt2")
    assert copy.deepcopy(config).spikepatch == record


def test_a_patched_model_is_not_patched_again() -> None:
    model = tiny_model("gpt2")
    adopt(model, record_of("gpt2"))
    with pytest.raises(Refused, match="patched already"):
        adopt(model, record_of("gpt2"))
    assert model.transformer.wte.embed_scale == pytest.approx(float(WIDTH) ** 0.5)


def test_a_refused_record_leaves_the_model_as_it_was() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="no module"):
        adopt(model, record_of("llama"))
    assert type(model) is GPT2LMHeadModel
    assert type(model.config) is GPT2Config
    assert not hasattr(model.config, "spikepatch")


def test_initialising_an_adopted_model_again_keeps_its_weights() -> None:
    model = tiny_model("gpt2")
    adopt(model, record_of("gpt2"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.initialize_weights()
    assert before
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
