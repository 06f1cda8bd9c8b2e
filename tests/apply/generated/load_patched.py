"""Run by test_generated in a fresh process: all that a patched folder promises, without spikepatch.

Arguments: the folder; a file with what the model gave before it was saved.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from pathlib import Path
from typing import Any

for absent in ("spikepatch", "spikepatch_transforms"):  # an editable install would be importable here
    sys.modules[absent] = None  # type: ignore[assignment]
warnings.simplefilter("error")
# Newer versions of transformers have another name for the method, the oldest supported one has only this.
warnings.filterwarnings("ignore", message=".gradient_checkpointing_", category=FutureWarning)

import torch  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402


def main(folder: Path, expected: dict[str, Any]) -> None:
    ids = expected["ids"]
    model, info = load(AutoModelForCausalLM, folder)
    assert not any(info.values()), info
    assert type(model).__name__.startswith("Spikepatch"), type(model)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected["parameters"].keys()
    assert all(torch.equal(p, expected["parameters"][name]) for name, p in parameters.items())
    assert torch.equal(model.get_input_embeddings()(ids), expected["rows"])
    assert_same(model(ids).logits, expected["logits"])
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings

    check_base(folder, model, expected)
    check_generation(model, ids)
    check_checkpointing(model, ids)
    check_fresh_weights(folder)
    check_resizing_and_saving(folder, model, ids)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the order of summation, which for equal weights depends on how the allocator aligned them."""
    bound = 64 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=bound)


def load(auto_class: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    loaded: tuple[Any, dict[str, Any]] = auto_class.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    return loaded


def check_base(folder: Path, model: Any, expected: dict[str, Any]) -> None:
    base, info = load(AutoModel, folder)
    assert type(base).__name__.startswith("Spikepatch"), type(base)
    assert not info["missing_keys"], info
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"}, info
    assert torch.equal(base.get_input_embeddings()(expected["ids"]), expected["rows"])
    hidden = base(expected["ids"]).last_hidden_state
    assert_same(hidden, model.base_model(expected["ids"]).last_hidden_state)
    assert_same(model.get_output_embeddings()(hidden), expected["logits"])


def check_generation(model: Any, ids: torch.Tensor) -> None:
    prompt = ids[:1, :4]
    cached = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    greedy = prompt
    for _ in range(4):
        logits = model(greedy).logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = -math.inf  # as min_new_tokens does
        greedy = torch.cat([greedy, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, greedy), (cached, greedy)


def check_checkpointing(model: Any, ids: torch.Tensor) -> None:
    model.train()
    gradients = []
    for switch in (lambda: None, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        torch.manual_seed(0)
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 5
    for once, again in zip(*gradients, strict=True):
        assert_same(once, again)
    model.gradient_checkpointing_disable()
    model.eval()


def check_fresh_weights(folder: Path) -> None:
    """``from_config`` with other layers and another width draws the recipe's stds; the patch is there as well."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    init, width, layers = config.spikepatch["init"], config.hidden_size, config.num_hidden_layers
    config.hidden_size, config.num_hidden_layers = 2 * width, 2 * layers
    if hasattr(config, "word_embed_proj_dim"):
        config.word_embed_proj_dim = 2 * width
    if hasattr(config, "time_step_rank"):
        config.intermediate_size = 4 * width
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    patterns = {fill["parameter"]: fill["std"] * math.sqrt(0.5) * 2 ** fill["depth"] for fill in init["fills"]}
    checked = 0
    for name, parameter in model.named_parameters():
        std = patterns.get(re.sub(r"(?<=\.)\d+(?=\.)", "*", name))
        if std is not None:
            # Five standard errors of a sample std.
            error = abs(parameter.std().item() / std - 1)
            assert error < 5 / math.sqrt(2 * parameter.numel()), (name, parameter.std(), std)
            checked += 1
    assert checked == 1 + 2 * layers * (len(patterns) - 1), (checked, patterns)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == config.tie_word_embeddings

    (edit,) = config.spikepatch["embeddings"].values()
    embedding, ids = model.get_input_embeddings(), torch.arange(8)
    rows = embedding.weight[ids]
    shape = (embedding.embedding_dim,)
    out = rows * math.sqrt(shape[0]) if "factor" in edit else torch.layer_norm(rows, shape, eps=edit["eps"])
    assert torch.equal(embedding(ids), out)

    base = AutoModel.from_config(config, trust_remote_code=True)
    prefix = f"{model.base_model_prefix}."
    of_head = {n.removeprefix(prefix): p for n, p in model.named_parameters() if n.startswith(prefix)}
    stds = {n: (p.std().item(), of_head[n].std().item()) for n, p in base.named_parameters() if p.dim() > 1}
    assert len(stds) > 5
    for name, (std, of_full) in stds.items():
        assert math.isclose(std, of_full, rel_tol=0.2), (name, std, of_full)


def check_resizing_and_saving(folder: Path, model: Any, ids: torch.Tensor) -> None:
    rows = model.get_input_embeddings()(ids)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    assert torch.equal(model.get_input_embeddings()(ids), rows)
    logits = model(ids).logits
    assert logits.shape[-1] == model.config.vocab_size
    again = folder.with_name("saved again")
    model.save_pretrained(again)
    assert {f.name for f in again.glob("*.py")} == {f.name for f in folder.glob("*.py")}
    reloaded, info = load(AutoModelForCausalLM, again)
    assert not any(info.values()), info
    assert reloaded.config.spikepatch == model.config.spikepatch
    assert_same(reloaded(ids).logits, logits)
    assert torch.equal(reloaded.get_input_embeddings()(ids), rows)


main(Path(sys.argv[1]), torch.load(sys.argv[2]))
sys.stdout.write("loaded\n")
