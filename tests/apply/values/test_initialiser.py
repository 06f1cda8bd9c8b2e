"""What a model's own code makes of its tensors, against transformers itself and by closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from spikepatch.apply.values.initialiser import check_explained, own_values
from spikepatch.errors import Refused
from spikepatch.source.meta import skeleton
from tests.architectures import tiny_model


#: Random draws have these distributions in transformers' source; all other tensors of these types are constants.
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mamba", "mixtral", "opt", "bloom", "gemma2", "jamba"])
def test_as_transformers_initialises(model_type: str) -> None:
    """Constants (norms, biases, A_log, D) are equal; random tensors have the mean, std and range of transformers' own.

    Between two samples of n values means differ by s sqrt(2/n), stds by s sqrt((k - 1) / (2n)) with kurtosis k
    (3 for a normal, less for a uniform distribution), at 6 sigma.
    """
    model = tiny_model(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        other = type(model)._from_config(model.config)
    value = own_values(skeleton(model), 0)
    constants = randoms = 0
    for name, parameter in model.named_parameters():
        theirs, ours = parameter.detach(), value(name)
        assert ours is not None
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        if torch.equal(theirs, other.state_dict()[name]):
            assert torch.equal(ours, theirs), name
            constants += 1
        elif ours.numel() >= 128:
            std, n = float(theirs.std()), ours.numel()
            assert abs(float(ours.mean() - theirs.mean())) < 6 * std * math.sqrt(2 / n), name
            assert abs(float(ours.std()) - std) < 6 * std * math.sqrt(1 / n), name
            randoms += 1
    assert constants
    assert randoms


def test_state_space_parameters_by_closed_form() -> None:
    """A_log = log(1 ... n); softplus(dt bias) lies in [time_step_min, time_step_max]; conv ~ U(+-1/sqrt(kernel))."""
    twin, config = skeleton(tiny_model("mamba")), tiny_model("mamba").config
    value = own_values(twin, 0)
    rows = torch.arange(1, config.state_size + 1, dtype=torch.float32).log()
    decay = value("backbone.layers.1.mixer.A_log")
    assert decay is not None
    assert torch.equal(decay, rows.expand(config.intermediate_size, -1))
    bias = value("backbone.layers.1.mixer.dt_proj.bias")
    assert bias is not None
    step = nn.functional.softplus(bias)
    slack = 8 * torch.finfo(torch.float32).eps
    assert float(step.min()) >= config.time_step_min * (1 - slack) - slack
    assert float(step.max()) <= config.time_step_max * (1 + slack) + slack
    assert float(step.std()) > 0
    conv = value("backbone.layers.1.mixer.conv1d.weight")
    assert conv is not None
    bound = 1 / math.sqrt(config.conv_kernel)
    assert float(conv.abs().max()) <= bound
    assert abs(float(conv.std()) * math.sqrt(3) / bound - 1) < 6 / math.sqrt(conv.numel())


def test_seed_and_name_matter_and_nothing_else() -> None:
    model = tiny_model("gpt2")
    names = [name for name, _ in model.named_parameters()]
    first, again, other = own_values(skeleton(model), 0), own_values(model, 0), own_values(model, 2**32)
    state = torch.get_rng_state()
    before = {name: p.clone() for name, p in model.named_parameters()}
    made: dict[str, Any] = {name: first(name) for name in names}
    for name in reversed(names):
        assert torch.equal(made[name], again(name)), name  # type: ignore[arg-type]
    layers = [f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)]
    assert not torch.equal(made[layers[0]], made[layers[1]])
    assert not torch.equal(made[layers[0]], other(layers[0]))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class ToyConfig(PreTrainedConfig):  # type: ignore[misc]
    model_type = "toy"


class OwnNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))


class Toy(PreTrainedModel):  # type: ignore[misc]
    """transformers' general ``_init_weights`` knows nothing of ``OwnNorm``, as that of most code on the hub."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(4, 4)
        self.norm = OwnNorm(4)
        self.post_init()
        self.late = nn.Parameter(torch.full((4,), 0.5))


def test_what_a_constructor_alone_sets() -> None:
    value = own_values(skeleton(Toy(ToyConfig())), 0)
    assert torch.equal(value("norm.gain"), torch.ones(4))  # type: ignore[arg-type]
    assert torch.equal(value("late"), torch.full((4,), 0.5))  # type: ignore[arg-type]
    assert torch.equal(value("linear.bias"), torch.zeros(4))  # type: ignore[arg-type]


def test_a_tensor_that_was_put_into_a_model_is_not_explained() -> None:
    model = Toy(ToyConfig())
    model.added = nn.Parameter(torch.randn(3))
    model.linear = nn.Linear(4, 5)
    twin = skeleton(model)
    value = own_values(twin, 0)
    assert value("added") is None
    assert value("linear.weight") is None
    assert value("norm.gain") is not None
    with pytest.raises(Refused, match=r"added.*nothing tells"):
        check_explained("added", value("added"), twin)


class Block(nn.Module):
    """Its argument is kept under no name; what it sets behind the constructors of its parts is not known therefore."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.norm, self.inner = OwnNorm(8), make()
        for module in (self.inner,):
            nn.init.zeros_(module.bias)


def test_a_module_that_cannot_be_built_again() -> None:
    """In memory: what is constant is kept, what was learned is drawn again; without memory nothing is guessed."""
    model = Block(lambda: nn.Linear(8, 8))
    with torch.no_grad():
        model.norm.gain.add_(torch.linspace(-0.1, 0.1, 8))
    value = own_values(model, 3)
    assert torch.equal(value("norm.gain"), torch.ones(8))  # type: ignore[arg-type]
    assert value("inner.bias") is None
    weight = value("inner.weight")
    assert weight is not None
    assert float(weight.abs().max()) <= 8**-0.5
    assert not torch.equal(weight, model.inner.weight)
    with torch.no_grad():
        model.inner.weight += 5  # beyond what its constructor draws
    assert own_values(model, 3)("inner.weight") is None
    assert own_values(skeleton(model), 3)("inner.weight") is None
