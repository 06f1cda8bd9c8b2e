"""The recorder: what code writes without memory, carried out again, is what it writes with memory."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spikepatch.apply.values import calls
from spikepatch.apply.values.draw import BLOCK, entropy, gaussian
from spikepatch.apply.values.recording import Recording

REAL = torch.linspace(0, 1, 30).view(6, 5)


class Weights(nn.Module):
    def __init__(self, write: Callable[[Any], None]) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(6, 5)), nn.Parameter(torch.empty(6, 5))
        with torch.no_grad():
            write(self)


def recorded(write: Callable[[Any], None], seed: int = 0) -> Recording:
    found = Recording(seed)
    with found.active():
        found.name(Weights(write))
    return found


def in_rows(m: Any) -> None:
    for i, row in enumerate(m.a):
        row.fill_(i)
    m.b.copy_(m.a).mul_(2)
    m.a[:, 0] = -1


def by_data(m: Any) -> None:
    m.a.data = torch.arange(30.0).view(6, 5).log1p()
    m.b.data.fill_(3).t()[1:3] += m.a.data.t()[1:3]


def by_numpy(m: Any) -> None:
    steps = torch.linspace(0, 1, 30)
    m.a.data = torch.from_numpy(np.sqrt(steps.numpy()).reshape(6, 5))
    m.b.data.copy_(torch.tensor(steps.view(6, 5).tolist()))


def by_values(m: Any) -> None:
    m.a.copy_(torch.eye(6, 5))
    if float(m.a.sum()) == 5 and (m.a[0] > 0).any():
        m.b.zero_()
        m.b[m.a.nonzero(as_tuple=True)] = 7.0
    m.a.masked_fill_(m.a == 0, 2.0)


def by_deepcopy(m: Any) -> None:
    layer = nn.LayerNorm((6, 5))
    m.a, m.b = layer.weight, copy.deepcopy(layer).bias
    nn.init.ones_(layer.weight)
    nn.init.constant_(m.b, 0.25)


def by_a_real_copy(m: Any) -> None:
    m.a.copy_(copy.deepcopy(REAL))
    m.b.copy_(m.a)


def by_out(m: Any) -> None:
    torch.arange(30.0, out=m.a.view(-1))
    torch._foreach_copy_([m.a, m.b], [m.a + 1, m.a - 1])
    torch._foreach_mul_([m.a, m.b], 3.0)


@pytest.mark.parametrize("write", [in_rows, by_data, by_numpy, by_values, by_deepcopy, by_a_real_copy, by_out])
def test_what_is_computed_has_the_same_bits(write: Callable[[Any], None]) -> None:
    with torch.random.fork_rng(devices=[]):
        real = Weights(write)
    found = recorded(write)
    for name, parameter in real.named_parameters():
        assert torch.equal(found.value(name), parameter.detach()), name  # type: ignore[arg-type]
        assert not found.is_drawn(name)


def test_random_writes_depend_on_seed_and_name() -> None:
    def write(m: Any) -> None:
        nn.init.normal_(m.b, std=3.0)  # overwritten: it has no part in what follows
        nn.init.normal_(m.a, mean=1.0, std=0.5)
        nn.init.uniform_(m.b, -2.0, 4.0)

    found = recorded(write, seed=5)
    assert torch.equal(found.value("a"), gaussian(5, "a", 0, 30, 0.5).add_(1.0).view(6, 5))  # type: ignore[arg-type]
    b = found.value("b")
    assert b is not None
    assert found.is_drawn("b")
    assert float(b.min()) > -2
    assert float(b.max()) < 4
    assert not torch.equal(b, recorded(write, seed=6).value("b"))  # type: ignore[arg-type]
    assert torch.equal(b, recorded(write, seed=5).value("b"))  # type: ignore[arg-type]


def test_copies_of_what_is_drawn_are_equal() -> None:
    """As the layers of ``nn.TransformerEncoder`` are, and a target network beside its own."""

    def write(m: Any) -> None:
        nn.init.normal_(m.a)
        m.b.copy_(m.a).neg_()

    found = recorded(write)
    for names in (("a", "b"), ("b", "a")):
        values = {name: found.value(name) for name in names}
        assert torch.equal(values["a"], -values["b"])  # type: ignore[operator, arg-type]


def test_what_nothing_writes_has_no_value() -> None:
    found = recorded(lambda m: m.a[:5].fill_(1.0))
    assert found.value("a") is None
    assert found.value("b") is None
    assert found.value("c") is None


@pytest.mark.parametrize(("low", "high"), [(-2.0, 2.0), (-0.5, 3.0), (-40.0, 40.0)])
def test_truncated_normals(low: float, high: float) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.empty(200, 300))
            nn.init.trunc_normal_(self.w, 0.0, 1.0, low, high)

    found = Recording(0)
    with found.active():
        found.name(Wide())
    ours = found.value("w")
    assert ours is not None
    theirs = Wide().w.detach()
    assert low <= float(ours.min()) < float(ours.max()) <= high
    assert abs(float(ours.mean() - theirs.mean())) < 6 * math.sqrt(2 / ours.numel())
    assert abs(float(ours.std() - theirs.std())) < 6 / math.sqrt(ours.numel())


def test_code_that_looks_at_what_it_draws() -> None:
    """It draws until all values are small: those that it has seen are those that it gets."""

    def write(m: Any) -> None:
        m.a.normal_()
        while bool((m.a.abs() > 1).any()):
            m.a.copy_(torch.where(m.a.abs() > 1, torch.randn_like(m.a), m.a))

    value = recorded(write).value("a")
    assert value is not None
    assert float(value.abs().max()) <= 1
    assert float(value.std()) > 0.1


def test_a_generator_of_its_own_draws_what_it_draws() -> None:
    def write(m: Any) -> None:
        m.a.normal_(generator=torch.Generator().manual_seed(3))
        m.b.copy_(torch.rand(6, 5, generator=torch.Generator().manual_seed(4)))

    found = recorded(write)
    assert torch.equal(found.value("a"), torch.empty(6, 5).normal_(generator=torch.Generator().manual_seed(3)))  # type: ignore[arg-type]
    assert torch.equal(found.value("b"), torch.rand(6, 5, generator=torch.Generator().manual_seed(4)))  # type: ignore[arg-type]


def test_other_distributions_are_torchs() -> None:
    def write(m: Any) -> None:
        m.a.exponential_()
        nn.init.orthogonal_(m.b)

    found = recorded(write)
    a, b = found.value("a"), found.value("b")
    assert a is not None
    assert b is not None
    assert float(a.min()) >= 0
    assert torch.allclose(b.T @ b, torch.eye(5), atol=32 * torch.finfo(torch.float32).eps)


def test_without_memory() -> None:
    """A tensor of 4 TB, of which nothing is asked; and the generators are as they were."""

    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.big = nn.Linear(BLOCK, BLOCK)
            self.small = nn.Parameter(self.big.weight[:2, :2].detach() * 0 + 1)
            np.random.rand()

    before, ours = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    found = Recording(0)
    with found.active():
        found.name(Huge())
    assert found.shape("big.weight") == (BLOCK, BLOCK)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == ours  # type: ignore[index]


def test_seeded_state_is_full_width() -> None:
    """torch's stream is that of numpy's MT19937 with all 624 words of the key, and is put back afterwards."""
    before = torch.get_rng_state()
    with calls.seeded(5, "a.b"):
        drawn = torch.empty(3000, dtype=torch.int32).random_().numpy()
    reference = np.random.MT19937()
    key = np.random.SeedSequence(entropy(5, "a.b", -1)).generate_state(624).astype(np.uint32)
    reference.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": 624}}
    assert np.array_equal(drawn, reference.random_raw(3000) % 2**31)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_puts_the_state_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with contextlib.suppress(KeyError), calls.seeded(0, "x"):
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
