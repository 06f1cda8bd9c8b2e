"""Models patched on the meta device and filled where they have memory: the bits of ``patch`` on a whole model."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import spikepatch
from spikepatch.apply.values import draw as fill
from spikepatch.errors import Refused
from spikepatch.plans.plan import Plan
from tests import ROOT
from tests.apply.live.ranks import FOUR, TWO, compare, meta_model, spoil
from tests.apply.live.test_patch import refused as patch_refused
from tests.architectures import ids, tiny_config, tiny_model
from tests.residual.configs import CLASSES, model_class, tiny_config_for
from tests.residual.maps import SCALED_ALREADY, TYPES
from tests.residual.test_stream import EXAMPLE, Model


def filled(model_type: str, recipe: str = "scaled-embed", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Patched on the meta device, given memory, spoilt, initialised, and found equal to a patched whole model."""
    model = meta_model(model_type, dtype, **changes)
    plan = spikepatch.plan(model, recipe, reinit="all", seed=5)
    spikepatch.patch(model, plan)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    spoil(model)
    spikepatch.initialize(model, plan)
    whole = tiny_model(model_type, num_hidden_layers=2, **changes).to(dtype)
    spikepatch.patch(whole, plan)
    compare(model, whole)
    tokens = ids(whole)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, whole(tokens).logits)
    return model


def prepared(model_type: str = "gpt2", **changes: Any) -> tuple[Any, Plan]:
    """A patched model that has memory, NaN all over, and its plan."""
    model = meta_model(model_type, **changes)
    plan = spikepatch.plan(model, "scaled-embed", reinit="all")
    spikepatch.patch(model, plan)
    model.to_empty(device="cpu")
    spoil(model)
    return model, plan


def filled_module(build: Callable[[], nn.Module]) -> nn.Module:
    """The same of a plain module, whose buffers are real."""
    with init_empty_weights(include_buffers=False):
        model = build()
    plan = spikepatch.plan(model, "scaled-embed", reinit="all", example_inputs=EXAMPLE)
    spikepatch.patch(model, plan)
    model.to_empty(device="cpu")
    spoil(model)
    spikepatch.initialize(model, plan)
    whole = build()
    spikepatch.patch(whole, plan)
    compare(model, whole)
    return model


def refused(model: nn.Module, plan: Plan, match: str) -> None:
    with pytest.raises(Refused, match=match):
        spikepatch.initialize(model, plan)
    floats = [p for p in model.parameters() if p.is_floating_point()]
    assert floats
    assert all(p.is_meta or bool(p.isnan().all()) for p in floats)


# One process.


@pytest.mark.parametrize("model_type", TYPES)
def test_every_type(model_type: str) -> None:
    filled(model_type, "vanilla" if model_type in SCALED_ALREADY else "scaled-embed")


@pytest.mark.parametrize(("recipe", "dtype"), [("embed-ln", torch.bfloat16), ("vanilla", torch.float16)])
def test_every_recipe(recipe: str, dtype: torch.dtype) -> None:
    filled("gpt2", recipe, dtype)


@pytest.mark.parametrize("rope", ["default", *ROPE_INIT_FUNCTIONS])
def test_every_kind_of_rotary_frequencies(rope: str) -> None:
    """They are buffers that no checkpoint has; only the config knows their values."""
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "partial_rotary_factor": 1.0}
    parameters |= {"short_factor": [1.5] * 8, "long_factor": [3.0] * 8}
    model = filled("llama", rope_parameters=parameters)
    assert "model.rotary_emb.inv_freq" in dict(model.named_buffers())


def test_an_untied_head() -> None:
    model = meta_model("gpt2")
    plan = spikepatch.plan(model, "scaled-embed", reinit="all", untie=True)
    spikepatch.patch(model, plan)
    model.to_empty(device="cpu")
    spikepatch.initialize(model, plan)
    whole = tiny_model("gpt2", num_hidden_layers=2)
    spikepatch.patch(whole, plan)
    compare(model, whole)
    assert model.lm_head.weight is not model.transformer.wte.weight


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_a_plan_from_a_source_and_json(model_type: str, tmp_path: Path) -> None:
    tiny_config(model_type, num_hidden_layers=2).save_pretrained(tmp_path)
    plan = spikepatch.plan(str(tmp_path), "scaled-embed", reinit="all")
    model = meta_model(model_type)
    spikepatch.patch(model, "scaled-embed", reinit="all")
    model.to_empty(device="cpu")
    spikepatch.initialize(model, Plan.from_dict(json.loads(plan.to_json())))
    whole = tiny_model(model_type, num_hidden_layers=2)
    spikepatch.patch(whole, plan)
    compare(model, whole)


def test_wrappers_are_looked_through() -> None:
    """torch.compile around a block, a checkpoint wrapper around that, and torch.compile around it all."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, plan = prepared("llama")
    compiled: Any = functools.partial(torch.compile, backend="eager")
    blocks = model.model.layers
    blocks[0], blocks[1] = checkpoint_wrapper(compiled(blocks[0])), compiled(blocks[1])
    wrapped: Any = compiled(model)
    assert any(
        "_orig_mod.model.layers.0._checkpoint_wrapped_module._orig_mod." in n for n, _ in wrapped.named_parameters()
    )
    assert spikepatch.initialize(wrapped, plan) is wrapped
    whole = tiny_model("llama", num_hidden_layers=2)
    spikepatch.patch(whole, plan)
    compare(wrapped, whole)


def test_a_plain_module() -> None:
    filled_module(Model)


def test_what_is_saved_loads_patched(tmp_path: Path) -> None:
    model = filled("mixtral")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    compare(loaded, model)
    assert loaded.model.embed_tokens.embed_scale == 8.0


def test_no_more_than_a_chunk_is_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tensor's size; and the bits stay."""
    drawn: list[int] = []

    def watched(edit: Any, seed: int, name: str, start: int, stop: int) -> torch.Tensor:
        drawn.append(stop - start)
        return fill.draw(edit, seed, name, start, stop)

    model, plan = prepared("mixtral")
    monkeypatch.setattr("spikepatch.apply.live.initialize.draw", watched)
    monkeypatch.setattr(fill, "CHUNK", 1000)
    spikepatch.initialize(model, plan)
    monkeypatch.undo()
    assert max(drawn) <= 1000 < sum(drawn)
    whole = tiny_model("mixtral", num_hidden_layers=2)
    spikepatch.patch(whole, plan)
    compare(model, whole)


@pytest.mark.slow
def test_every_third_language_model() -> None:
    """Of those that transformers has, at tiny widths; persistent buffers and ones of no checkpoint among them."""
    filled_types, buffers = [], 0
    for model_type in sorted(CLASSES["causal"])[::3]:
        config, built = tiny_config_for(model_type, "causal"), model_class(model_type, "causal")
        with torch.device("meta"):
            model: Any = built._from_config(config)
        try:
            plan = spikepatch.plan(model, "vanilla", reinit="all")
            spikepatch.patch(model, plan)
        except Refused:
            continue  # as a whole model is
        model.to_empty(device="cpu")
        spoil(model)
        spikepatch.initialize(model, plan)
        whole = built._from_config(config)
        spikepatch.patch(whole, plan)
        compare(model, whole)
        filled_types.append(model_type)
        buffers += len(list(model.buffers()))
    assert len(filled_types) >= 55
    assert buffers > 100


# Refusals. Nothing is written.


def test_not_patched() -> None:
    plan = spikepatch.plan(meta_model("gpt2"), "scaled-embed", reinit="all")
    model = tiny_model("gpt2", num_hidden_layers=2)
    spoil(model)
    refused(model, plan, "was not patched on the meta device")


def test_patched_where_it_had_memory() -> None:
    model = tiny_model("gpt2")
    plan = spikepatch.plan(model, "scaled-embed", reinit="all")
    spikepatch.patch(model, plan)
    spoil(model)
    refused(model, plan, r"was not patched on the meta device(.|\n)*needs spikepatch.patch alone")


@pytest.mark.parametrize("other", [{"seed": 1}, {"recipe": "vanilla"}, {"untie": True}])
def test_another_plan(other: dict[str, Any]) -> None:
    model, _ = prepared("gpt2")
    plan = spikepatch.plan(meta_model("gpt2"), **{"recipe": "scaled-embed", "reinit": "all", **other})
    refused(model, plan, "not the one that the model was patched with")


def test_a_plan_of_another_model() -> None:
    model, _ = prepared("gpt2")
    refused(model, prepared("llama")[1], "for GPT2LMHeadModel; this is .* for LlamaForCausalLM")


def test_no_memory_yet() -> None:
    model = meta_model("gpt2")
    plan = spikepatch.plan(model, "scaled-embed", reinit="all")
    spikepatch.patch(model, plan)
    refused(model, plan, r"wte\.weight: it is on the meta device(.|\n)*to_empty")


def test_meta_as_the_default_device() -> None:
    model, plan = prepared("gpt2")
    with torch.device("meta"):
        refused(model, plan, "leave the block before the call")
        for call in (
            lambda: spikepatch.inspect(model),
            lambda: spikepatch.plan(model, reinit="all"),
            lambda: spikepatch.patch(meta_model("gpt2"), plan),
        ):
            with pytest.raises(Refused, match="meta as the default device"):
                call()


def remove(model: Any) -> None:
    del model.transformer.h[1].ln_1.bias


def add(model: Any) -> None:
    model.transformer.h[1].adapter = nn.Linear(64, 2, device="cpu")
    spoil(model)


def reshape(model: Any) -> None:
    model.transformer.h[1].mlp.c_fc.weight = nn.Parameter(torch.full((64, 100), float("nan")))


def quantise(model: Any) -> None:
    model.transformer.wpe.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)


def pack(model: Any) -> None:
    class Packed(torch.Tensor):
        pass

    layer = model.transformer.h[1].mlp.c_fc
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (remove, r"it has no transformer\.h\.1\.ln_1\.bias"),
        (add, r"adapter\.weight was added after the patch"),
        (reshape, r"c_fc\.weight is \(64, 100\), and was \(64, 256\) when patched"),
        (quantise, r"wpe\.weight is torch\.int8, and was torch\.float32 when patched: quantised"),
        (pack, "it is a Packed, no plain tensor"),
    ],
)
def test_changed_after_the_patch(change: Callable[[Any], None], match: str) -> None:
    model, plan = prepared("gpt2")
    change(model)
    refused(model, plan, match)


def test_ties_that_were_taken_apart_before_the_patch() -> None:
    model = meta_model("gpt2")
    plan = spikepatch.plan(model, "scaled-embed", reinit="all")
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    patch_refused(model, plan, r"are to be one parameter; call its tie_weights\(\)")
    model.tie_weights()
    spikepatch.patch(model, plan)


class Shared(Model):
    """A module, with its buffer, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.second = self.first


def test_a_module_under_two_names() -> None:
    model: Any = filled_module(Shared)
    assert model.first is model.second
    assert int(model.state_dict()["second.num_batches_tracked"]) == 0


class Buffered(Model):
    def __init__(self, table: Callable[[], torch.Tensor] = lambda: torch.arange(3.0)) -> None:
        super().__init__()
        self.register_buffer("table", table(), persistent=False)


def test_buffers_of_a_plain_module() -> None:
    """They come from its constructor, where it can be run again."""

    class Known(Buffered):
        def __init__(self) -> None:
            super().__init__()

    with torch.device("meta"):
        model: Any = Known()
    plan = spikepatch.plan(Known(), "scaled-embed", reinit="all", example_inputs=EXAMPLE)
    spikepatch.patch(model, plan)
    spikepatch.initialize(model.to_empty(device="cpu"), plan)
    assert torch.equal(model.table, torch.arange(3.0))


def test_a_plain_module_whose_buffers_are_lost() -> None:
    with torch.device("meta"):
        model = Buffered(lambda: torch.ones(4))
    plan = spikepatch.plan(Buffered(lambda: torch.ones(4)), "scaled-embed", reinit="all", example_inputs=EXAMPLE)
    patch_refused(model, plan, r"only the constructor knows the values of table(.|\n)*include_buffers=False")


def test_a_tensor_that_is_no_buffer() -> None:
    model = meta_model("gpt2")
    model.transformer.drop.mask = torch.ones(3, device="meta")
    plan = spikepatch.plan(meta_model("gpt2"), "scaled-embed", reinit="all")
    patch_refused(model, plan, r"transformer\.drop\.mask is neither a parameter nor a buffer")


# Two and four ranks.


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Case -> rank -> what failed there, empty if nothing did."""
    out = tmp_path_factory.mktemp("ranks") / "reports.json"
    subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.apply.live.ranks", str(out)], check=True, cwd=ROOT)
    reports: dict[str, dict[str, str]] = json.loads(out.read_text())
    return reports


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_ranks(name: str, reports: dict[str, dict[str, str]]) -> None:
    assert len(reports[name]) == (2 if name in TWO else 4)
    assert not any(reports[name].values()), "\n".join(f"{rank}: {error}" for rank, error in reports[name].items())
