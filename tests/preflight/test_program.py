"""The traced graph run on numbers, against the model itself and its own gradients."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn import functional
from transformers import PreTrainedModel

import spikepatch
from spikepatch.errors import Refused
from spikepatch.preflight.forward import Measurement, measure
from spikepatch.preflight.program import NodeValues, Program, Weights, compile_program, run_piece
from spikepatch.preflight.values import live
from spikepatch.residual.inspect import followed
from spikepatch.residual.stream import find
from spikepatch.residual.trace import trace
from tests.architectures import tiny_model
from tests.residual import configs
from tests.residual.maps import TYPES

CPU = torch.device("cpu")

#: Of different structure, in the default suite; the others are slow.
DEFAULT = ("gpt2", "falcon", "mamba", "mixtral", "bloom")


def program_of(model: PreTrainedModel, ids: torch.Tensor) -> Program:
    streams = find(trace(model, {"input_ids": ids}))
    assert not isinstance(streams, str)
    try:
        return compile_program(streams[0], CPU)
    except Refused as refused:
        if Version(transformers.__version__) >= Version("5.24"):
            raise
        pytest.skip(f"transformers {transformers.__version__}: {refused.why}")


def random_ids(model: PreTrainedModel, batch: int = 2, tokens: int = 13) -> torch.Tensor:
    return torch.randint(5, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))


def value_at(program: Program, point: Any, weights: Weights) -> torch.Tensor:
    """Run piece by piece up to ``point``, with nothing held but what later pieces need."""
    values: NodeValues = {}
    with torch.no_grad():
        for i, piece in enumerate(program.pieces):
            parameters = {p: program.parameter(p, weights) for p in piece.parameters}
            values |= run_piece(program, piece, values, parameters, {*program.alive[i], piece.point})
            if piece.point is point:
                result: torch.Tensor = values[point]
                return result
            values = {n: v for n, v in values.items() if n in program.alive[i]}
    raise AssertionError("no such point")


def measured(model: PreTrainedModel, ids: torch.Tensor, *, deep: bool = False) -> tuple[Program, Measurement]:
    program = program_of(model, ids)
    residual = followed(model, program.stream.facts.trace, "model").residual
    found = measure(
        program, residual, live(model), deep=deep, vocabulary=model.config.vocab_size, progress=lambda *_: None
    )
    return program, found


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=() if t in DEFAULT else pytest.mark.slow) for t in TYPES])
def test_the_same_logits_as_the_model(model_type: str) -> None:
    model = tiny_model(model_type)
    ids = random_ids(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    program = program_of(model, ids)
    logits = value_at(program, program.pieces[-1].point, live(model))
    with torch.no_grad():
        expected = model(ids).logits
    # The model's own kernels may sum in another order (fused attention, experts): a few eps per operation.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        ("gpt2", torch.float32),
        ("gpt2", torch.float64),
        ("llama", torch.float64),
        ("gpt_neox", torch.float64),
        ("olmo2", torch.float32),
    ],
)
def test_gradients_and_sizes_along_the_stream(model_type: str, dtype: torch.dtype) -> None:
    """Against autograd through the model's own hidden states: the input of every layer."""
    model: Any = tiny_model(model_type).to(dtype)
    ids = random_ids(model)
    program, found = measured(model, ids)
    output = model(ids, output_hidden_states=True, use_cache=False)
    loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    states = output.hidden_states[:-1]
    expected = torch.autograd.grad(loss, states, retain_graph=True)
    weights = torch.autograd.grad(loss, list(model.parameters()))

    per_layer = len(program.sublayers) // len(states)
    stats = found.sublayers[::per_layer]
    tolerance = 100 * torch.finfo(dtype).eps * len(program.pieces)
    assert found.loss == pytest.approx(float(loss.detach()), rel=tolerance)
    assert len(stats) == len(expected) == 3
    for each, gradient, state in zip(stats, expected, states, strict=True):
        assert each.gradient_norm == pytest.approx(float(gradient.norm()), rel=10 * tolerance)
        rms = model_type in {"llama", "olmo2"}
        x = state.detach()
        sigma = x.pow(2).mean(-1).sqrt() if rms else x.std(-1, correction=0)
        assert each.sigma_in.mean == pytest.approx(float(sigma.mean()), rel=tolerance)
        assert each.sigma_in.least == pytest.approx(float(sigma.min()), rel=tolerance)
    if not model.config.tie_word_embeddings:  # a tied table's two gradients are two groups
        total = sum(float(w.pow(2).sum()) for w in weights) ** 0.5
        assert sum(g**2 for g in found.gradients.values()) ** 0.5 == pytest.approx(total, rel=10 * tolerance)


@pytest.mark.parametrize(("mapping", "model_type"), [("causal", "git"), ("masked", "funnel")])
def test_values_that_are_made_in_the_shape_of_earlier_ones(mapping: configs.Mapping, model_type: str) -> None:
    """They are made anew in every piece, from values of other pieces."""
    model = configs.model_class(model_type, mapping)(configs.tiny_config_for(model_type, mapping)).eval()
    report = spikepatch.check(model, tokens=16, batch=1)
    assert report.verdict in {"stable", "at-risk", "unstable"}


def test_a_model_whose_output_is_the_end_of_its_stream() -> None:
    """Post-norm and without a head: no piece is left behind the stream's last point."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=60, **sizes)).eval()
    ids = random_ids(model)
    program = program_of(model, ids)
    residual = followed(model, program.stream.facts.trace, "model").residual
    found = measure(program, residual, live(model), deep=False, vocabulary=None, progress=lambda *_: None)
    states = model(ids, output_hidden_states=True).hidden_states
    direction = torch.randn(states[-1].shape, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad((states[-1] * direction).sum() / states[-1].numel() ** 0.5, states[:-1])
    assert len(found.sublayers) == 6
    for each, gradient in zip(found.sublayers[::2], expected, strict=True):
        assert each.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "mamba"])
def test_jacobians_of_sublayers(model_type: str) -> None:
    """Against the dense Jacobian of the model's own block, by autograd; both sub-layers of it together where two."""
    model: Any = tiny_model(model_type).double()
    ids = random_ids(model, batch=1, tokens=5)
    program, found = measured(model, ids, deep=True)
    checked = 0
    for i, (sublayer, stats) in enumerate(zip(program.sublayers, found.sublayers, strict=True)):
        piece = program.pieces[1 + program.points.index(sublayer.point)]  # the one that begins there
        parameters = {p: program.parameter(p, live(model)) for p in piece.parameters}
        at = value_at(program, sublayer.point, live(model))

        def step(x: torch.Tensor, piece: Any = piece, parameters: Any = parameters, point: Any = sublayer.point) -> Any:
            return run_piece(program, piece, {point: x}, parameters, [piece.point])[piece.point]

        dense = torch.autograd.functional.jacobian(step, at).reshape(at.numel(), at.numel())  # type: ignore[no-untyped-call]
        assert stats.jacobian is not None
        assert stats.jacobian.value == pytest.approx(float(torch.linalg.svdvals(dense)[0]), rel=0.01), i
        checked += 1
    assert checked >= 3


def _lower(alive: dict[str, int], elements: int) -> None:
    alive["now"] -= elements


@pytest.mark.slow
def test_the_weights_of_one_piece_at_a_time() -> None:
    """The largest number of weight elements alive at once does not grow with depth."""
    peaks = {}
    for layers in (2, 8):
        model = tiny_model("llama", num_hidden_layers=layers)
        alive, peak = {"now": 0}, 0

        def weight(name: str, model: PreTrainedModel = model, alive: dict[str, int] = alive) -> torch.Tensor:
            nonlocal peak
            value: torch.Tensor = model.get_parameter(name).detach().clone()
            alive["now"] += value.numel()
            peak = max(peak, alive["now"])
            weakref.finalize(value, _lower, alive, value.numel())
            return value

        ids = random_ids(model)
        program = program_of(model, ids)
        residual = followed(model, program.stream.facts.trace, "model").residual
        measure(program, residual, weight, deep=True, vocabulary=500, progress=lambda *_: None)
        peaks[layers] = peak
    assert peaks[2] == peaks[8] > 0
