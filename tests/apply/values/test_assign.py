"""The canonical layout against what ``save_pretrained`` writes, and the views that fills are written through."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import spikepatch
from spikepatch.apply.generated.structure import restructure
from spikepatch.apply.values.assign import values
from spikepatch.apply.values.draw import gaussian
from spikepatch.plans.plan import Fill
from spikepatch.source.layout import layout
from spikepatch.source.meta import skeleton
from tests.architectures import tiny_model
from tests.residual.maps import TYPES

#: Further structures: shared experts, hybrids, other fused experts.
MORE = ("qwen2_moe", "jamba", "deepseek_v3", "olmoe", "phimoe")
FEW_EXPERTS = {"qwen2_moe": {"num_experts": 4}, "jamba": {"num_experts": 4}, "olmoe": {"num_experts": 4}}


def written(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("model_type", [*TYPES, *MORE])
def test_layout_is_what_save_pretrained_writes(model_type: str, tmp_path: Path) -> None:
    """Names, shapes, dtypes, and the values that the views find in memory; every element of memory once."""
    model = tiny_model(model_type, **FEW_EXPERTS.get(model_type, {}))
    targets = layout(skeleton(model))
    assert len({target.name for target in targets}) == len(targets)
    tensors = written(model, tmp_path)
    assert {t.name: (t.shape, t.dtype) for t in targets} == {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
    state = model.state_dict()
    for target in targets:
        assert torch.equal(target.view(state[target.owner]), tensors[target.name]), target.name

    covered: Counter[str] = Counter()
    for target in targets:
        covered[target.owner] += target.elements
        target.view(state[target.owner]).add_(1)
    parameters = dict(model.named_parameters())
    assert covered.keys() >= parameters.keys()
    assert all(covered[name] == parameter.numel() for name, parameter in parameters.items())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_views_of_experts(model_type: str, tmp_path: Path) -> None:
    """What is written through a view is what transformers stores under that name, and what it loads from it."""
    model = tiny_model(model_type, **FEW_EXPERTS.get(model_type, {}))
    targets = layout(skeleton(model))
    owners = Counter(target.owner for target in targets)
    fused = [target for target in targets if owners[target.owner] > 1]
    assert len(fused) >= 3 * 3 * 2  # layers; gate, up, down; experts
    state = model.state_dict()
    with torch.no_grad():
        for i, target in enumerate(fused):
            target.view(state[target.owner]).fill_(float(i + 1))
    tensors = written(model, tmp_path)
    for i, target in enumerate(fused):
        assert bool((tensors[target.name] == i + 1).all()), target.name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name in {target.owner for target in fused}:
        assert torch.equal(loaded.state_dict()[name], state[name]), name


def test_a_view_of_a_tensor_inside_a_larger_storage() -> None:
    """A parameter of a real model may be a slice of a flat buffer; its views are found from where it begins."""
    (target, *_) = [t for t in layout(skeleton(tiny_model("mixtral"))) if "experts.1.w1" in t.name]
    owner = tiny_model("mixtral").state_dict()[target.owner]
    flat = torch.zeros(owner.numel() + 7)
    inside = flat[7:].view(owner.shape).copy_(owner)
    assert torch.equal(target.view(inside), target.view(owner))


def test_tied_parameters_are_stored_once() -> None:
    names = [target.name for target in layout(skeleton(tiny_model("gpt2")))]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_a_plain_module() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
            self.register_buffer("cache", torch.zeros(9), persistent=False)

    targets = layout(skeleton(Tied()))
    assert [(t.name, t.owner, t.shape) for t in targets] == [
        ("steps", "steps", ()),
        ("a.weight", "a.weight", (3, 3)),
        ("a.bias", "a.bias", (3,)),
    ]


@pytest.mark.parametrize("reinit", ["all", "residual", "none"])
def test_values(reinit: str) -> None:
    """Fills come from the canonical name's stream; the rest from its own initialiser, or stays."""
    model = tiny_model("mixtral")
    plan = spikepatch.plan(model, "scaled-embed", reinit=reinit, seed=9)  # type: ignore[arg-type]
    twin = skeleton(model)
    restructure(twin, plan)
    value = values(plan, twin, model, {})
    fills = {fill.parameter: fill for fill in plan.select(Fill)}
    filled = kept = 0
    for target in layout(twin):
        new = value(target)
        if target.owner in fills:
            flat = gaussian(9, target.name, 0, target.elements, fills[target.owner].std)
            assert new is not None
            assert torch.equal(new, flat.view(target.shape))
            filled += 1
        elif reinit == "all":
            assert new is not None
            assert torch.equal(new, torch.ones(64)), target.name  # mixtral's only other tensors are gains
        else:
            assert new is None
            kept += 1
    assert (filled > 0) is (reinit != "none")
    assert (kept > 0) is (reinit != "all")


@pytest.mark.parametrize("reinit", ["residual", "none"])
def test_a_new_norm_is_initialised_beside_kept_weights(reinit: str) -> None:
    model = tiny_model("gpt2")
    plan = spikepatch.plan(model, "embed-ln", reinit=reinit)  # type: ignore[arg-type]
    twin = skeleton(model)
    restructure(twin, plan)
    value = values(plan, twin, model, {})
    fills = {fill.parameter for fill in plan.select(Fill)}
    new = {t.name: value(t) for t in layout(twin) if t.owner not in fills}
    drawn = {name: tensor for name, tensor in new.items() if tensor is not None}
    assert drawn.keys() == {"transformer.wte.norm.weight", "transformer.wte.norm.bias"}
    assert torch.equal(drawn["transformer.wte.norm.weight"], torch.ones(64))
    assert torch.equal(drawn["transformer.wte.norm.bias"], torch.zeros(64))


def test_padding_row_is_a_row_like_the_others() -> None:
    """transformers' own initialiser zeroes it; a fill does not, nor does generated code when it draws fresh weights."""
    model = tiny_model("llama")
    table = model.get_parameter("model.embed_tokens.weight")
    assert model.config.pad_token_id == 0
    assert float(table[0].detach().abs().sum()) == 0
    spikepatch.patch(model, "scaled-embed", reinit="all")
    fresh = type(model)._from_config(model.config).get_parameter("model.embed_tokens.weight")
    for rows in (table.detach(), fresh.detach()):
        assert abs(float(rows[0].std() / rows.std()) - 1) < 6 / (2 * 64) ** 0.5
