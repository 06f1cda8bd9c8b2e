"""Embeddings that are changed in place, and the stds of fresh weights: on the module itself, without generated code."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from spikepatch.plans.plan import ScaleEmbedding, recorded_edit
from spikepatch.residual import map as residual_map
from spikepatch.runtime.embedding import detach_output, install, norm_output, pattern, scale_output
from spikepatch.runtime.fresh import initialise

IDS = torch.tensor([[3, 1, 4, 1, 5]])
WIDTH = 16


def token_embedding() -> nn.Embedding:
    return nn.Embedding(10, WIDTH, padding_idx=1)


def scaled_by_its_own_class() -> nn.Embedding:
    return BartScaledWordEmbedding(10, WIDTH, 1, embed_scale=3.0)  # type: ignore[no-any-return]


def learned_positions() -> nn.Embedding:
    return OPTLearnedPositionalEmbedding(100, WIDTH)  # type: ignore[no-any-return]


PATCHES: list[Callable[[nn.Embedding], None]] = [
    lambda module: scale_output(module, 2.0),
    lambda module: norm_output(module, 1e-5),
    lambda module: norm_output(module, 1e-5, "rmsnorm", affine=False),
    lambda module: detach_output(module, 0.1),
]

KINDS = pytest.mark.parametrize("build", [token_embedding, scaled_by_its_own_class, learned_positions])


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scale_multiplies_the_output_in_place(build: Callable[[], nn.Embedding], dtype: torch.dtype) -> None:
    module = build().to(dtype)
    original, weight, before = type(module), module.weight, module(IDS)
    seen: list[Any] = []
    module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))

    scale_output(module, math.sqrt(WIDTH))

    assert torch.equal(module(IDS), before * 4.0)  # a power of two: exact in every dtype
    assert module.weight is weight
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert isinstance(module, original)
    assert len(seen) == 1


@KINDS
def test_norm_normalises_every_token(build: Callable[[], nn.Embedding]) -> None:
    module = build().double()
    before = module(IDS)
    norm_output(module, eps=1e-5)
    after = module(IDS)
    assert torch.equal(after, nn.functional.layer_norm(before, (WIDTH,), eps=1e-5))
    assert [(n, tuple(p.shape), p.dtype) for n, p in module.named_parameters()] == [
        ("weight", tuple(module.weight.shape), torch.float64),
        ("norm.weight", (WIDTH,), torch.float64),
        ("norm.bias", (WIDTH,), torch.float64),
    ]


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_detach_keeps_the_output_and_a_quarter_of_the_gradient(
    build: Callable[[], nn.Embedding], dtype: torch.dtype
) -> None:
    module = build().to(dtype)
    before = module(IDS)
    (whole,) = torch.autograd.grad(before.sum(), module.weight)
    detach_output(module, 0.25)
    after = module(IDS)
    assert torch.equal(after, before)
    (part,) = torch.autograd.grad(after.sum(), module.weight)
    assert float(whole.abs().sum()) > 0
    assert torch.equal(part, 0.25 * whole)  # a power of two: exact in every dtype
    assert [name for name, _ in module.named_parameters()] == ["weight"]


@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm(affine: bool) -> None:
    module = token_embedding().double()
    before = module(IDS)
    norm_output(module, eps=1e-3, kind="rmsnorm", affine=affine)
    assert torch.equal(module(IDS), nn.functional.rms_norm(before, (WIDTH,), eps=1e-3))
    assert [name for name, _ in module.named_parameters()] == ["weight", *(["norm.weight"] if affine else [])]


def test_the_factor_is_where_peft_looks_for_it() -> None:
    module = token_embedding()
    scale_output(module, 7.35)
    assert module.embed_scale == 7.35
    assert isinstance(module.embed_scale, float)


@KINDS
@pytest.mark.parametrize("second", PATCHES)
@pytest.mark.parametrize("first", PATCHES)
def test_a_second_patch_is_refused(
    build: Callable[[], nn.Embedding], first: Callable[[nn.Embedding], None], second: Callable[[nn.Embedding], None]
) -> None:
    module = build()
    first(module)
    with pytest.raises(ValueError, match="patched already"):
        second(module)


def test_a_patch_that_would_have_no_effect_is_refused() -> None:
    module = token_embedding()
    module.forward = module.forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="before the model is dispatched"):
        scale_output(module, 2.0)


def test_only_embeddings_can_be_patched() -> None:
    with pytest.raises(ValueError, match=r"not an nn\.Embedding"):
        scale_output(nn.Linear(2, 2), 2.0)  # type: ignore[arg-type]


@KINDS
@pytest.mark.parametrize("patch", PATCHES)
def test_a_patched_module_copies_and_exports(
    build: Callable[[], nn.Embedding], patch: Callable[[nn.Module], None]
) -> None:
    module = build()
    patch(module)
    expected = module(IDS)
    twin = copy.deepcopy(module)
    assert twin.weight is not module.weight
    assert torch.equal(twin(IDS), expected)
    assert torch.equal(torch.export.export(module, (IDS,), strict=False).module()(IDS), expected)


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patched_plain_embedding_pickles(patch: Callable[[nn.Module], None]) -> None:
    module = token_embedding()
    patch(module)
    assert torch.equal(pickle.loads(pickle.dumps(module))(IDS), module(IDS))


def tiny(layers: int = 2, width: int = WIDTH) -> GPT2Config:
    return GPT2Config(n_layer=layers, n_embd=width, n_head=2, vocab_size=50, n_positions=8)


def record(**embeddings: Any) -> dict[str, Any]:
    return {
        "version": "0.1.0",
        "recipe": "test",
        "reinit": "all",
        "seed": 0,
        "no_decay": [],
        "embeddings": {f"transformer.{name}": edit for name, edit in embeddings.items()},
        "init": None,
    }


def fill(parameter: str, std: float, **changes: Any) -> dict[str, Any]:
    """As ``Plan.record`` writes it, for a std that falls with the width."""
    general = {"distribution": "normal", "size": std, "cut": 0.0, "fan": 64, "axes": [], "depth": 0.0, "stream": 0}
    return {"parameter": parameter, "std": std, **general, **changes}


FILLS: dict[str, Any] = {
    "streams": [
        {
            "width": 64,
            "axis": 1,
            "sublayers": ["transformer.h.*.attn.c_proj.weight", "transformer.h.*.mlp.c_proj.weight"],
            "count": 4,
        }
    ],
    "fills": [
        fill("transformer.wte.weight", 0.5),
        fill("transformer.h.*.mlp.c_fc.weight", 0.5),
        fill("transformer.h.*.mlp.c_proj.weight", 0.25, depth=-0.5),
    ],
    "constants": [],
}


def test_install_names_modules_as_the_full_model_does() -> None:
    edits = record(wte={"factor": "sqrt(width)"}, wpe={"norm": "layernorm", "eps": 1e-5, "affine": True})
    full, base = GPT2LMHeadModel(tiny()), GPT2Model(tiny())
    install(full, edits)
    install(base, edits)
    planned = recorded_edit("transformer.wte", edits["embeddings"]["transformer.wte"], 16)
    assert isinstance(planned, ScaleEmbedding)
    for transformer in (full.transformer, base):
        assert transformer.wte.embed_scale == planned.factor == 4.0
        assert transformer.wpe.norm.eps == 1e-5


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"wte": {"factor": 2.0}, "nowhere": {"factor": 2.0}}, "no module transformer.nowhere"),
        ({"wte": {"factor": 2.0}, "ln_f": {"factor": 2.0}}, r"not an nn\.Embedding"),
        ({"wte": {"factor": 2.0}, "wpe": {"norm": "batchnorm", "eps": 1e-5, "affine": True}}, "does not know"),
        ({"wte": {"factor": 2.0}, "wpe": {"norm": "rmsnorm", "eps": 1e-5}}, "does not know"),
        ({"wte": {"factor": 2.0}, "wpe": {"gain": 1.0}}, "does not know"),
    ],
)
def test_install_checks_everything_before_it_changes_anything(edits: dict[str, Any], message: str) -> None:
    model = GPT2LMHeadModel(tiny())
    with pytest.raises(ValueError, match=message):
        install(model, record(**edits))
    assert type(model.transformer.wte) is nn.Embedding


def test_a_model_without_a_record_is_refused() -> None:
    with pytest.raises(ValueError, match=r"config\.spikepatch"):
        install(GPT2LMHeadModel(tiny()), None)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "patch", [{"factor": 4.0}, {"norm": "layernorm", "eps": 1e-5, "affine": True}, {"gradient": 0.1}]
)
def test_resizing_and_checkpointing_keep_the_patch(patch: dict[str, Any]) -> None:
    model = GPT2LMHeadModel(tiny())
    plain = copy.deepcopy(model)
    install(model, record(wte=patch))
    for each in (model, plain):
        torch.manual_seed(0)
        each.resize_token_embeddings(60)
    rows = plain.transformer.wte(IDS)
    expected = rows * patch.get("factor", 1.0)
    if "norm" in patch:
        expected = nn.functional.layer_norm(rows, (WIDTH,), eps=1e-5)
    assert torch.equal(model.transformer.wte(IDS), expected)
    assert model.lm_head.weight is model.transformer.wte.weight

    model.train()
    gradients = []
    for switch in (lambda: None, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        torch.manual_seed(0)
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(gradients[0]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("cls", [GPT2LMHeadModel, GPT2Model])
@pytest.mark.parametrize(("layers", "width"), [(2, 64), (8, 64), (8, 256)])
def test_initialise_follows_depth_and_width(cls: type, layers: int, width: int) -> None:
    model = cls(tiny(layers, width))
    attention = {name: p.clone() for name, p in model.named_parameters() if "attn" in name}
    initialise(model, record() | {"init": FILLS})
    wide, deep = math.sqrt(64 / width), math.sqrt(4 / (2 * layers))
    transformer = model.base_model
    expected = {transformer.wte.weight: 0.5 * wide}
    expected |= {block.mlp.c_fc.weight: 0.5 * wide for block in transformer.h}
    expected |= {block.mlp.c_proj.weight: 0.25 * wide * deep for block in transformer.h}
    for parameter, std in expected.items():  # the standard error of a std is std / sqrt(2 n); 5 of them
        assert parameter.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * parameter.numel()))
    untouched = {name: p for name, p in model.named_parameters() if name in attention}
    assert len(untouched) == 4 * layers
    assert all(torch.equal(p, attention[name]) for name, p in untouched.items())


def test_initialise_respects_loaded_tensors_and_draws_once() -> None:
    model = GPT2LMHeadModel(tiny())
    loaded = model.transformer.h[0].mlp.c_fc.weight
    loaded._is_hf_initialized = True
    before = {name: p.clone() for name, p in model.named_parameters()}
    initialise(model, record() | {"init": FILLS})
    once = {name: p.clone() for name, p in model.named_parameters()}
    initialise(model, record() | {"init": FILLS})
    assert torch.equal(loaded, before["transformer.h.0.mlp.c_fc.weight"])
    changed = {name for name in once if not torch.equal(once[name], before[name])}
    assert changed == {"transformer.wte.weight"} | {
        f"transformer.h.{n}" for n in ("0.mlp.c_proj.weight", "1.mlp.c_fc.weight", "1.mlp.c_proj.weight")
    }
    assert all(torch.equal(p, once[name]) for name, p in model.named_parameters())


def test_initialise_refuses_patterns_that_match_nothing() -> None:
    stale = FILLS | {"fills": [fill("model.layers.*.mlp.down_proj.weight", 0.5)]}
    with pytest.raises(ValueError, match="matches the patterns"):
        initialise(GPT2LMHeadModel(tiny()), record() | {"init": stale})


def test_the_fill_of_one_parameter_wins_over_that_of_its_pattern() -> None:
    model = GPT2LMHeadModel(tiny(layers=2, width=64))
    first = fill("transformer.h.0.mlp.c_fc.weight", 2.0)
    initialise(model, record() | {"init": FILLS | {"fills": [first, *FILLS["fills"]]}})
    stds = [block.mlp.c_fc.weight.std().item() for block in model.transformer.h]
    assert stds == pytest.approx([2.0, 0.5], rel=0.05)


def test_a_std_for_every_layer_does_not_follow_the_depth() -> None:
    """As mitchell's: a deeper config is refused, not half initialised; a shallower one has all that it needs."""
    fills = [fill(f"transformer.h.{i}.mlp.c_fc.weight", 0.5 / (1 + i)) for i in range(2)]
    by_layer = record() | {"init": FILLS | {"fills": [*fills, FILLS["fills"][2]]}}
    with pytest.raises(ValueError, match=r"h\.2\.mlp\.c_fc\.weight: the recipe has a std for every layer by itself"):
        initialise(GPT2LMHeadModel(tiny(layers=3, width=64)), by_layer)
    for layers in (1, 2):
        model = GPT2LMHeadModel(tiny(layers=layers, width=64))
        initialise(model, by_layer)
        for i, block in enumerate(model.transformer.h):
            weight = block.mlp.c_fc.weight
            assert weight.std().item() == pytest.approx(0.5 / (1 + i), rel=5 / math.sqrt(2 * weight.numel()))


@pytest.mark.parametrize(("layers", "width"), [(2, 64), (8, 128)])
def test_stds_by_the_parameters_own_lengths(layers: int, width: int) -> None:
    """Recorded at a width of 64 with d_ffn = 256: fan_in of W_2, and fan_in + fan_out of W_1; a constant stays."""
    laws = [
        fill("transformer.wte.weight", 0.3, fan=0),
        fill("transformer.h.*.mlp.c_proj.weight", 0.3, fan=256, axes=[0], depth=-1.0),
        fill("transformer.h.*.mlp.c_fc.weight", 0.3, fan=320, axes=[0, 1]),
    ]
    model = GPT2LMHeadModel(tiny(layers, width))
    initialise(model, record() | {"init": FILLS | {"fills": laws}})
    wide = math.sqrt(64 / width)
    expected = {model.transformer.wte.weight: 0.3}
    expected |= {block.mlp.c_proj.weight: 0.3 * wide * 4 / (2 * layers) for block in model.transformer.h}
    expected |= {block.mlp.c_fc.weight: 0.3 * wide for block in model.transformer.h}
    for parameter, std in expected.items():
        assert parameter.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * parameter.numel()))


@pytest.mark.parametrize(
    ("distribution", "size"), [("uniform", math.sqrt(3) * 0.2), ("truncated", 0.2 / 0.8796256610342398)]
)
def test_other_distributions(distribution: str, size: float) -> None:
    law = fill("transformer.h.*.mlp.c_fc.weight", 0.2, distribution=distribution, size=size, cut=2.0)
    model = GPT2LMHeadModel(tiny(width=64))
    initialise(model, record() | {"init": FILLS | {"fills": [law]}})
    for block in model.transformer.h:
        weight = block.mlp.c_fc.weight.detach().double()
        bound = size if distribution == "uniform" else 2 * size
        assert 0.95 * bound < float(weight.abs().max()) <= bound * (1 + torch.finfo(torch.float32).eps)
        assert float(weight.std()) == pytest.approx(0.2, rel=5 / math.sqrt(2 * weight.numel()))


@pytest.mark.parametrize("layers", [2, 8])
def test_constants_follow_the_depth_but_for_their_offset(layers: int) -> None:
    """A gain of 0.5 at S = 4, stored as w of 1 + w: at S = 16 it is 0.25."""
    constant = {"parameter": "transformer.h.*.ln_2.weight", "value": 0.5, "offset": -1.0, "depth": -0.5, "stream": 0}
    model = GPT2LMHeadModel(tiny(layers))
    initialise(model, record() | {"init": FILLS | {"constants": [constant]}})
    for block in model.transformer.h:
        assert torch.equal(block.ln_2.weight, torch.full((WIDTH,), 0.5 * math.sqrt(2 / layers) - 1))
        assert torch.equal(block.ln_1.weight, torch.ones(WIDTH))


def test_each_fill_goes_by_its_own_stream() -> None:
    """Two streams of one model: here its attention and its MLPs, of which only the first has doubled in number."""
    place = "transformer.h.*.{}.c_proj.weight"
    streams = [
        {"width": 64, "axis": 1, "sublayers": [place.format("attn")], "count": 2},
        {"width": 64, "axis": 1, "sublayers": [place.format("mlp")], "count": 4},
    ]
    laws = [
        fill(place.format("attn"), 0.4, depth=-0.5, stream=0),
        fill(place.format("mlp"), 0.4, depth=-0.5, stream=1),
    ]
    model = GPT2LMHeadModel(tiny(layers=4, width=64))
    initialise(model, record() | {"init": {"streams": streams, "fills": laws, "constants": []}})
    for block in model.transformer.h:
        for part, std in ((block.attn, 0.4 * math.sqrt(2 / 4)), (block.mlp, 0.4)):
            weight = part.c_proj.weight
            assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))


@pytest.mark.parametrize("init", [None, FILLS])
def test_norms_of_embeddings_start_at_one(init: Any) -> None:
    """Whatever the architecture's own initialiser made of them: some set every gain to zero, for they use 1 + w."""
    model = GPT2LMHeadModel(tiny())
    edits = record(wte={"norm": "layernorm", "eps": 1e-5, "affine": True}) | {"init": init}
    install(model, edits)
    norm = model.transformer.wte.norm
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.fill_(3.0)
    initialise(model, edits)
    assert torch.equal(norm.weight, torch.ones(WIDTH))
    assert torch.equal(norm.bias, torch.zeros(WIDTH))


def test_nothing_is_asked_of_a_model_whose_tensors_are_all_loaded() -> None:
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    initialise(model, record() | {"init": FILLS})


@given(name=st.lists(st.text("09a²٣_", max_size=3)).map(".".join))
@example(name="model.layers.10.mlp.experts.3.w2.weight")
def test_pattern_replaces_whole_numbers_only(name: str) -> None:
    """As in the package, which this file is used without."""
    assert pattern(name) == residual_map.pattern(name)
    assert pattern("model.layers.10.mlp.experts.3.w2.weight") == "model.layers.*.mlp.experts.*.w2.weight"
    assert pattern("h.².w") == "h.².w"
