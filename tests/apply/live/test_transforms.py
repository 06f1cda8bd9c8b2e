"""What each transform does to a real model: by its equation on real tensors, in passes forward and back."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding, layer_norm

import spikepatch
from spikepatch.errors import Refused
from spikepatch.plans.plan import (
    Constant,
    Context,
    Fill,
    Plan,
    Recipe,
    ScaleEmbedding,
    Skip,
    Untie,
)
from spikepatch.source.layout import tensor_shapes
from spikepatch_transforms.embed_detach import EmbedDetach
from spikepatch_transforms.embed_init import EmbedInit
from spikepatch_transforms.embed_norm import EmbedNorm
from spikepatch_transforms.residual_init import ResidualInit
from spikepatch_transforms.small_init import SmallInit
from spikepatch_transforms.untie import UntieHead
from tests.architectures import encoder_decoder, ids, tiny_model
from tests.residual.maps import plan_of


def token_embedding(model: Any, plan: Plan) -> tuple[torch.nn.Embedding, float]:
    (edit,) = plan.select(ScaleEmbedding)
    return model.get_submodule(edit.module), edit.factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mamba", "opt"])
def test_embed_scale_output_is_the_plain_embedding_times_c(model_type: str, dtype: torch.dtype) -> None:
    """One multiplication: the rounding error is at most eps / 2 of the result."""
    model = tiny_model(model_type).to(dtype)
    plan = spikepatch.plan(model, "scaled-embed", reinit="all")
    spikepatch.patch(model, plan)
    table, factor = token_embedding(model, plan)
    assert factor == 8.0
    tokens = ids(model)
    exact = math.sqrt(64) * torch.nn.functional.embedding(tokens, table.weight.detach().double())
    error = (table(tokens).detach().double() - exact).abs()
    assert bool((error <= torch.finfo(dtype).eps / 2 * exact.abs()).all())


def test_embed_scale_stream_starts_at_the_papers_std() -> None:
    """sqrt(2/5) = 0.632 at every width, within 6 standard errors of 500 x 64 values."""
    model = tiny_model("llama")
    spikepatch.patch(model, "scaled-embed", reinit="all")
    with torch.no_grad():
        start = model(torch.arange(500)[None], output_hidden_states=True).hidden_states[0]
    assert abs(float(start.std()) / math.sqrt(2 / 5) - 1) < 6 / math.sqrt(2 * start.numel())


def test_embed_scale_kept_weights_start_at_std_one() -> None:
    model = tiny_model("llama")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    spikepatch.patch(model, "scaled-embed", reinit="none")
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    with torch.no_grad():
        tokens = torch.arange(1, 500)[None]  # the first row is that of the padding token: zero, and no part of the std
        start = model(tokens, output_hidden_states=True).hidden_states[0]
    assert float(start.double().std()) == pytest.approx(1, abs=64 * torch.finfo(torch.float32).eps)


def test_embed_scale_gradient_is_scaled_too() -> None:
    """d(c E)/dE = c: the gradient on a row is c times that of the plain embedding, for the same gradient above."""
    model = tiny_model("llama")
    spikepatch.patch(model, "scaled-embed", reinit="all", factor=3.0)
    table: Any = model.get_input_embeddings()
    above = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(1, 13)  # row 0 is for padding, which torch gives no gradient
    (ours,) = torch.autograd.grad(table(tokens), table.weight, above)
    expected = torch.zeros_like(table.weight).index_put_((tokens,), 3.0 * above)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("model_type", "changes", "own"), [("granite", {"embedding_multiplier": 12.0}, 12.0), ("gemma2", {}, 8.0)]
)
def test_embed_scale_replace_makes_the_total_c(model_type: str, changes: dict[str, Any], own: float) -> None:
    """The architecture's factor is divided out: the stream starts with c std(E), and with no factor twice."""
    model = tiny_model(model_type, **changes)
    plan = spikepatch.plan(model, "scaled-embed", reinit="all", factor=3.0, replace=True)
    assert plan.select(ScaleEmbedding) == [ScaleEmbedding(f"{model.base_model_prefix}.embed_tokens", 3.0 / own)]
    spikepatch.patch(model, plan)
    tokens = torch.arange(500)[None]
    with torch.no_grad():
        start = model(tokens, output_hidden_states=True).hidden_states[0].double()
    expected = 3.0 * torch.nn.functional.embedding(tokens, model.get_input_embeddings().weight.detach().double())
    # Two multiplications more than the exact product, and gemma rounds its factor to the weights' dtype.
    assert float((start / expected - 1).abs().max()) < 4 * torch.finfo(torch.float32).eps


def test_embed_scale_twice() -> None:
    model = tiny_model("gpt2")
    spikepatch.patch(model, "scaled-embed", reinit="none", factor=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(Refused, match=r"patched already(.|\n)*transformer\.wte"):
        spikepatch.patch(model, "scaled-embed", reinit="all")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


SMALL = math.sqrt(2 / (5 * 64))


@pytest.mark.parametrize("reinit", ["all", "residual"])
@pytest.mark.parametrize(("model_type", "sublayers"), [("gpt2", 6), ("mamba", 3), ("mixtral", 6)])
def test_residual_init_equation_on_real_tensors(model_type: str, sublayers: int, reinit: Any) -> None:
    model = tiny_model(model_type)
    plan = spikepatch.plan(model, "vanilla", reinit=reinit)
    spikepatch.patch(model, plan)
    projections = [fill for fill in plan.select(Fill) if fill.depth]
    assert len(projections) == sublayers
    for fill in projections:
        weight = model.get_parameter(fill.parameter).detach().double()
        std = SMALL / math.sqrt(sublayers)
        assert abs(float(weight.std()) / std - 1) < 6 / math.sqrt(2 * weight.numel()), fill.parameter


def test_residual_init_a_multiplier_is_not_applied_twice() -> None:
    """What a block adds to the stream is the same, whatever constant the architecture multiplies it by."""
    added = {}
    for multiplier in (1.0, 0.25):
        model = tiny_model("granite", residual_multiplier=multiplier)
        spikepatch.patch(model, "vanilla", reinit="all")
        with torch.no_grad():
            states = model(ids(model), output_hidden_states=True).hidden_states
        added[multiplier] = states[1] - states[0]
    size = float(added[1.0].abs().max())
    assert size > 0
    # The weights are powers of two apart, so products and sums only differ where the smaller ones round.
    slack = 64 * torch.finfo(torch.float32).eps * max(1.0, float(states[0].abs().max()))
    assert float((added[1.0] - added[0.25]).abs().max()) < slack
    assert slack < size / 100


@pytest.mark.parametrize(("model_type", "offset"), [("olmo2", 0.0), ("gemma2", -1.0)])
def test_residual_init_gain_of_a_branch_norm(model_type: str, offset: float) -> None:
    """olmo2 multiplies by w, gemma2 by 1 + w: either way the branch ends with a size of 1/sqrt(S) on the stream."""
    model = tiny_model(model_type, rms_norm_eps=0.0)
    recipe = Recipe("gains", (SmallInit(), ResidualInit(branch_gain=True)))
    plan = spikepatch.plan(model, recipe, reinit="all")
    constants = plan.select(Constant)
    assert len(constants) == 6
    assert {(c.offset, c.depth) for c in constants} == {(offset, -0.5)}
    assert all(c.value == pytest.approx(1 / math.sqrt(6), rel=1e-15) for c in constants)
    assert len([skip for skip in plan.skips if skip.reason.startswith("scale-invariant")]) == 6
    spikepatch.patch(model, plan)
    outputs = []
    modules = dict(model.named_modules())
    for projection in spikepatch.inspect(model).residual_projections:
        assert projection.branch_norm is not None
        modules[projection.branch_norm].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        model(ids(model))
    assert len(outputs) == 6
    for output in outputs:  # RMSNorm without eps: every token's vector has a root mean square of the gain
        sizes = output.double().square().mean(-1).sqrt()
        slack = 64 * torch.finfo(torch.float32).eps
        assert torch.allclose(sizes, torch.full_like(sizes, 1 / math.sqrt(6)), rtol=slack, atol=0)


def test_residual_init_twice_is_once() -> None:
    """Values only: the same seed draws the same bits, and sets the same gains."""
    model = tiny_model("olmo2")
    recipe = Recipe("gains", (SmallInit(), ResidualInit(branch_gain=True)))
    states = []
    for _ in range(2):
        spikepatch.patch(model, recipe, reinit="residual", seed=2)
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_residual_init_behind_a_branch_norm_the_scale_is_invariant() -> None:
    """The reason that is given holds: without eps in the norm, projections four times smaller give the same bits."""
    model = tiny_model("olmo2", rms_norm_eps=0.0)
    residual = spikepatch.inspect(model)
    items = list(ResidualInit()(residual, Context("all", shapes=tensor_shapes(model))))
    skips = [item for item in items if isinstance(item, Skip)]
    assert len(skips) == 6
    for skip, projection in zip(skips, residual.residual_projections, strict=True):
        assert skip.target.startswith(projection.parameter)
        assert skip.reason.startswith("scale-invariant: ")
        assert projection.branch_norm is not None
        assert projection.branch_norm in skip.reason
    assert all(fill.std == SMALL and not fill.depth for fill in items if isinstance(fill, Fill))

    with torch.no_grad():
        before = model(ids(model)).logits
        for projection in residual.residual_projections:
            model.get_parameter(projection.parameter).div_(4)
        after = model(ids(model)).logits
    assert torch.equal(before, after)


G = 0.1


def pair(model_type: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """A model, and the same one patched."""
    plain = tiny_model(model_type).to(dtype)
    patched = copy.deepcopy(plain)
    spikepatch.patch(patched, "embed-detach", reinit="none", **options)
    return plain, patched


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "bloom", "mamba"])
def test_embed_detach_forward_is_the_same_bits(model_type: str, dtype: torch.dtype) -> None:
    """Also where the model multiplies (gemma2) or normalises (bloom) the embedding afterwards."""
    plain, patched = pair(model_type, dtype)
    table = patched.get_input_embeddings()
    assert table.gradient_share == G
    everything = torch.arange(500)
    assert torch.equal(table(everything), plain.get_input_embeddings()(everything))
    with torch.no_grad():
        assert torch.equal(patched(ids(plain)).logits, plain(ids(plain)).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embed_detach_gradient_of_the_lookup(dtype: torch.dtype) -> None:
    """g times what the plain lookup gets from the same gradient above, to the last bit: one multiplication each."""
    plain, patched = (model.get_input_embeddings() for model in pair("llama", dtype))
    tokens = torch.arange(1, 13)
    above = torch.randn(12, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad(plain(tokens), plain.weight, above)
    (found,) = torch.autograd.grad(patched(tokens), patched.weight, above)
    assert float(expected.abs().sum()) > 0
    assert torch.equal(found, G * expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embed_detach_a_tied_heads_own_gradient_stays(dtype: torch.dtype) -> None:
    """Rows that only the head uses get the whole gradient; the others lose 1 - g of what the lookup gave them."""
    plain, patched = pair("gpt2", dtype)
    tokens = ids(plain)
    gradients = []
    for model in (plain, patched):
        model(tokens, labels=tokens).loss.backward()
        gradients.append(model.lm_head.weight.grad.double())
        assert model.lm_head.weight is model.transformer.wte.weight
    absent = torch.ones(500, dtype=torch.bool)
    absent[tokens.flatten()] = False
    assert int(absent.sum()) > 400
    assert torch.equal(gradients[0][absent], gradients[1][absent])

    # The lookup's part alone, from a plain model whose head has the same values in a matrix of its own.
    apart: Any = copy.deepcopy(plain)
    apart.zero_grad()
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.detach().clone())
    apart(tokens, labels=tokens).loss.backward()
    lookup = apart.transformer.wte.weight.grad.double()
    expected = gradients[0] - (1 - G) * lookup
    slack = 64 * torch.finfo(dtype).eps * float(gradients[0].abs().max())
    assert float((gradients[1] - expected).abs().max()) < slack < float(lookup.abs().max()) / 100


def test_embed_detach_share_of_zero_freezes_the_lookup() -> None:
    model = tiny_model("llama")
    plan = spikepatch.plan(model, spikepatch.Recipe("frozen", (EmbedDetach(0.0),)), reinit="none")
    spikepatch.patch(model, plan)
    model(ids(model), labels=ids(model)).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert float(gradient.abs().max()) == 0


@pytest.mark.parametrize("second", ["embed-detach", "scaled-embed"])
def test_embed_detach_twice(second: str) -> None:
    model = tiny_model("gpt2")
    spikepatch.patch(model, "embed-detach", reinit="none")
    with pytest.raises(Refused, match=r"patched already(.|\n)*transformer\.wte"):
        spikepatch.patch(model, second, reinit="all")


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mamba"])
def test_embed_init_equation_on_real_tensors(model_type: str) -> None:
    """Mean 0 and std 1 within 6 standard errors, and that is where the stream starts."""
    model = tiny_model(model_type)
    spikepatch.patch(model, "unit-embed", reinit="all")
    table = model.get_input_embeddings().weight.detach().double()
    n = table.numel()
    assert abs(float(table.mean())) < 6 / math.sqrt(n)
    assert abs(float(table.std()) - 1) < 6 / math.sqrt(2 * n)
    with torch.no_grad():
        start = model(torch.arange(60)[None], output_hidden_states=True).hidden_states[0]
    positions = 2 / (5 * 64) if model_type == "gpt2" else 0
    assert abs(float(start.std()) / math.sqrt(1 + positions) - 1) < 6 / math.sqrt(2 * start.numel())


def test_embed_init_what_the_refusal_says_of_a_tied_head() -> None:
    """The logits' std is s sqrt(d), within sampling error: a tied head with s = 2.9 / sqrt(d), just below the limit."""
    model = tiny_model("gpt2")
    recipe = Recipe("tied", (SmallInit(token_embedding=False), EmbedInit(2.9 / 8)))
    spikepatch.patch(model, recipe, reinit="all")
    tokens = ids(model, 60)
    with torch.no_grad():
        logits = model(tokens).logits.double().scatter(-1, tokens[..., None], 0.0)  # without the token's own
    assert abs(float(logits.std()) / 2.9 - 1) < 6 / math.sqrt(2 * 60)  # 60 streams, each of which has a norm of 8


def test_embed_init_twice_is_once() -> None:
    """Values only: the same seed draws the same bits again. The head is untied already, and stays as it is."""
    model = tiny_model("gpt2")
    spikepatch.patch(model, "unit-embed", reinit="all", seed=1)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = spikepatch.plan(model, "unit-embed", reinit="all", seed=1)
    assert [type(edit) for edit in plan.edits] == [Fill] * len(plan.edits)
    spikepatch.patch(model, plan)
    assert all(torch.equal(first[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reinit", ["all", "none"])
def test_embed_norm_output_is_the_layer_norm_of_the_plain_embedding(reinit: Any, dtype: torch.dtype) -> None:
    model = tiny_model("gpt2").to(dtype)
    spikepatch.patch(model, "embed-ln", reinit=reinit)
    table: Any = model.get_submodule("transformer.wte")
    assert torch.equal(table.norm.weight, torch.ones(64, dtype=dtype))
    assert torch.equal(table.norm.bias, torch.zeros(64, dtype=dtype))
    tokens = ids(model)
    assert torch.equal(table(tokens), layer_norm(embedding(tokens, table.weight), (64,), eps=1e-5))
    with torch.no_grad():
        table.norm.weight.mul_(3)
        table.norm.bias.add_(1)
    expected = layer_norm(embedding(tokens, table.weight), (64,), table.norm.weight, table.norm.bias, 1e-5)
    assert torch.equal(table(tokens), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_embed_norm_every_norm_by_its_equation(norm: Any, affine: bool, dtype: torch.dtype) -> None:
    """(x - mean) / sqrt(var + eps), or x / sqrt(mean(x^2) + eps), computed in float64; errors of a few roundings."""
    model = tiny_model("llama").to(dtype)
    recipe = Recipe("norm", (SmallInit(), EmbedNorm(norm=norm, affine=affine)))
    spikepatch.patch(model, recipe, reinit="all")
    table: Any = model.get_input_embeddings()
    names = {"weight", "bias"} if norm == "layernorm" else {"weight"}
    assert {name for name, _ in table.norm.named_parameters()} == (names if affine else set())
    rows = table.weight.detach().double()[torch.arange(200)]
    if norm == "layernorm":
        rows = rows - rows.mean(-1, keepdim=True)
    expected = rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    error = (table(torch.arange(200)).detach().double() - expected).abs()
    # A sum of 64 terms, a root and a division; the mean is taken off values of size 1.
    assert float(error.max()) < 64 * torch.finfo(dtype).eps * float(expected.abs().max())


def test_embed_norm_rows_have_std_one() -> None:
    """Up to eps: a row of variance v leaves with variance v / (v + eps)."""
    model = tiny_model("llama").double()
    spikepatch.patch(model, "embed-ln", reinit="all")
    table: Any = model.get_input_embeddings()
    rows = table(torch.arange(500)).detach()
    plain = table.weight.detach().var(dim=1, correction=0)
    slack = 64 * torch.finfo(torch.float64).eps
    assert torch.allclose(rows.var(dim=1, correction=0), plain / (plain + 1e-5), rtol=slack, atol=0)
    assert float(rows.mean(dim=1).abs().max()) < slack


def test_embed_norm_norm_is_trained() -> None:
    model = tiny_model("gpt2").train()
    spikepatch.patch(model, "embed-ln", reinit="all")
    model(ids(model), labels=ids(model)).loss.backward()
    table: Any = model.get_submodule("transformer.wte")
    assert float(table.norm.weight.grad.abs().sum()) > 0
    assert float(table.norm.bias.grad.abs().sum()) > 0


@pytest.mark.parametrize("second", ["embed-ln", "scaled-embed", "vanilla"])
def test_embed_norm_twice(second: str) -> None:
    model = tiny_model("gpt2")
    spikepatch.patch(model, "embed-ln", reinit="none")
    with pytest.raises(Refused, match="patched already"):
        spikepatch.patch(model, second, reinit="all")


STD = math.sqrt(2 / (5 * 64))


def test_small_init_equation_on_real_tensors() -> None:
    """Mean and std of the drawn matrices, within 6 standard errors; nothing else has that std."""
    model = tiny_model("llama")
    plan = spikepatch.plan(model, "vanilla", reinit="all", seed=2)
    spikepatch.patch(model, plan)
    checked = 0
    for fill in plan.select(Fill):
        if not fill.depth:
            weight = model.get_parameter(fill.parameter).detach().double()
            n = weight.numel()
            assert abs(float(weight.mean())) < 6 * STD / math.sqrt(n), fill.parameter
            assert abs(float(weight.std()) / STD - 1) < 6 / math.sqrt(2 * n), fill.parameter
            checked += 1
    assert checked == 2 + 3 * 5  # embedding, head; q, k, v, gate, up per layer


@pytest.mark.parametrize(
    ("config", "distribution", "largest"),
    [
        (SmallInit(cut=2.0), "truncated", 2 / 0.8796256610342398),
        (SmallInit("normal", STD, cut=2.0), "truncated", 2 / 0.8796256610342398),
        (SmallInit(uniform=True), "uniform", math.sqrt(3)),
    ],
)
def test_small_init_other_distributions_have_the_same_std(config: SmallInit, distribution: str, largest: float) -> None:
    """The std that is meant is that of the weights, also where the tails are cut off."""
    model = tiny_model("llama")
    plan = spikepatch.plan(model, Recipe("other", (config,)), reinit="all")
    spikepatch.patch(model, plan)
    checked = 0
    for fill in plan.select(Fill):
        assert (fill.std, fill.distribution) == (STD, distribution)
        weight = model.get_parameter(fill.parameter).detach().double()
        assert abs(float(weight.std()) / STD - 1) < 6 / math.sqrt(2 * weight.numel()), fill.parameter
        assert float(weight.abs().max()) <= largest * STD * (1 + torch.finfo(torch.float32).eps)
        checked += 1
    assert checked == 2 + 3 * 5


def test_small_init_twice_is_once() -> None:
    """Values only: the same seed draws the same bits again."""
    model = tiny_model("gpt2")
    states = []
    for _ in range(2):
        spikepatch.patch(model, "xavier", reinit="all", seed=2)
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


class Multiplies(nn.Module):
    """A model whose head is a product with the table itself: there is no second name for a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        logits: torch.Tensor = x @ self.tokens.weight.T
        return logits


def test_untie_kept_weights_start_as_a_copy() -> None:
    """The head alone changes nothing: logits are the same bits, and then it learns apart from the embedding."""
    model: Any = tiny_model("gpt2")
    with torch.no_grad():
        before = model(ids(model)).logits
    spikepatch.patch(model, "vanilla", reinit="none", untie=True)
    head, table = model.lm_head.weight, model.transformer.wte.weight
    assert head is not table
    assert head.data_ptr() != table.data_ptr()
    assert torch.equal(head, table)
    with torch.no_grad():
        assert torch.equal(model(ids(model)).logits, before)
        head.zero_()
    assert float(table.detach().abs().sum()) > 0
    model.tie_weights()
    assert model.lm_head.weight is head
    assert model.config.tie_word_embeddings is False


def test_untie_fresh_weights_are_independent() -> None:
    model: Any = tiny_model("gpt2")
    spikepatch.patch(model, "scaled-embed", reinit="all", untie=True)
    head, table = model.lm_head.weight.detach().double(), model.transformer.wte.weight.detach().double()
    n, std = head.numel(), math.sqrt(2 / (5 * 64))
    for weight in (head, table):
        assert abs(float(weight.std()) / std - 1) < 6 / math.sqrt(2 * n)
    assert abs(float((head * table).mean())) / std**2 < 6 / math.sqrt(n)


def test_untie_a_tied_head_predicts_the_current_token() -> None:
    """What it is for. Tied, the token's own logit is about sqrt(2/5) 8 / 0.632 = 8 s.d. above the others."""
    own = {}
    for untie in (False, True):
        model = tiny_model("gpt2")
        spikepatch.patch(model, "scaled-embed", reinit="all", untie=untie)
        tokens = torch.randint(5, 500, (8, 60), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            own[untie] = float((model(tokens).logits.argmax(-1) == tokens).float().mean())
    assert own[False] > 0.95
    assert own[True] < 0.05


@pytest.mark.parametrize("reinit", ["none", "residual"])
def test_untie_a_fresh_head_beside_kept_weights(reinit: Any) -> None:
    model: Any = tiny_model("gpt2")
    before = model.transformer.wte.weight.detach().clone()
    recipe = Recipe("own-head", (UntieHead(fresh=True),))
    plan = spikepatch.plan(model, recipe, reinit=reinit)
    assert plan.edits == (
        Untie("lm_head.weight", "transformer.wte.weight"),
        Fill("lm_head.weight", math.sqrt(2 / (5 * 64)), fan=64),
    )
    spikepatch.patch(model, plan)
    assert torch.equal(model.transformer.wte.weight, before)
    head = model.lm_head.weight.detach().double()
    assert abs(float(head.std()) / math.sqrt(2 / (5 * 64)) - 1) < 6 / math.sqrt(2 * head.numel())


def test_untie_a_head_that_is_the_table_itself() -> None:
    example = {"input_ids": torch.arange(5, 16)[None]}
    with pytest.raises(Refused, match=r"head cannot be untied(.|\n)*multiplies by tokens\.weight itself"):
        spikepatch.plan(Multiplies(), "vanilla", reinit="all", untie=True, example_inputs=example)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("t5", r"it ties lm_head\.weight all the same"),
        ("bart", r"with the head it unties (.|\n)*model\.shared\.weight"),
    ],
)
def test_untie_a_class_that_cannot_untie(model_type: str, message: str) -> None:
    """t5 sets its config back, and bart's switch takes the two embeddings apart too. The model is as it was."""
    model = encoder_decoder(model_type)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    with pytest.raises(Refused, match=f"cannot untie its head alone(.|\n)*{message}"):
        spikepatch.patch(model, "vanilla", reinit="all", untie=True)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys()
    assert all(id(after[n]) == identity and torch.equal(after[n], p) for n, (identity, p) in before.items())
    assert model.config.tie_word_embeddings


def test_untie_no_head() -> None:
    from transformers import AutoModel

    model = AutoModel.from_config(tiny_model("gpt2").config)
    with pytest.raises(Refused, match=r"no tied head(.|\n)*no head"):
        spikepatch.plan(model, "vanilla", reinit="all", untie=True)


def test_untie_twice() -> None:
    model = tiny_model("gpt2")
    spikepatch.patch(model, "vanilla", reinit="none", untie=True)
    with pytest.raises(Refused, match="no tied head"):
        spikepatch.patch(model, "vanilla", reinit="none", untie=True)


def test_embed_scale_of_a_table_narrower_than_the_stream() -> None:
    model = tiny_model("opt", word_embed_proj_dim=32)
    plan = spikepatch.plan(model, "scaled-embed", reinit="none", factor=2.0)
    tokens = ids(model)
    with torch.no_grad():
        rows = model.get_input_embeddings()(tokens)
        spikepatch.patch(model, plan)
        assert torch.equal(model.get_input_embeddings()(tokens), 2 * rows)


def test_small_init_leaves_a_mixers_inner_projections() -> None:
    """They keep what transformers' initialiser gives: here a bias that sets the time step."""
    model = tiny_model("mamba")
    names = [f"backbone.layers.{i}.mixer.{x}_proj.weight" for i in range(3) for x in ("x", "dt")]
    before = {name: float(model.get_parameter(name).detach().std()) for name in names}
    spikepatch.patch(model, "vanilla", reinit="all")
    for name, std in before.items():
        weight = model.get_parameter(name).detach()
        assert abs(float(weight.std()) / std - 1) < 6 / math.sqrt(weight.numel()), name


def test_small_init_xavier_is_torchs() -> None:
    found = {fill.parameter: fill for fill in plan_of("gpt2", "xavier").select(Fill)}
    reference = torch.nn.init.xavier_normal_(torch.empty(500, 64), generator=torch.Generator().manual_seed(0))
    assert abs(found["transformer.wte.weight"].std / float(reference.std()) - 1) < 6 / math.sqrt(2 * 500 * 64)
