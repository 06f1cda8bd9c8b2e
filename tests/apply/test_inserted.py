"""The inserted initialiser, run: which parameters it draws and with which std, to the last digits, at any depth."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from spikepatch.apply.inserted import INITIALISER, Names, embedding_class, initialiser
from spikepatch.errors import Refused
from spikepatch.plans import Edit, Fill, NormEmbedding, Plan, ScaleEmbedding, small_std

WIDTH = 12


class Block(nn.Module):
    """Attention, and experts of which w2 is the residual projection; ``conv1`` is not drawn by any recipe."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.out = nn.Linear(2 * width, width, bias=False)
        for name, shape in (("w1", (width, 30)), ("w2", (30, width)), ("w3", (width, 30)), ("conv1", (width, 3))):
            made = [nn.Linear(*shape[::-1], bias=False) for _ in range(experts if name != "conv1" else 1)]
            self.add_module(name, nn.ModuleList(made) if name != "conv1" else made[0])


class Model(nn.Module):
    def __init__(self, depth: int, width: int = WIDTH, experts: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width, experts) for _ in range(depth))


def plan_of(model: nn.Module, depth: int, *more: Edit, multiplier: float = 1.0) -> Plan:
    small = small_std(WIDTH)
    edits = [Fill("tokens.weight", small)]
    for name, _ in model.named_parameters():
        if "w1" in name or "w3" in name:
            edits.append(Fill(name, small))
        elif "w2" in name or "out" in name:
            edits.append(Fill(name, small / (multiplier * math.sqrt(2 * depth)), residual=True))
    sublayers = [name for i in range(depth) for name in (f"blocks.{i}.out.weight", f"blocks.{i}.w2.0.weight")]
    replaced = {edit.parameter for edit in more if isinstance(edit, Fill)}
    kept = [edit for edit in edits if edit.parameter not in replaced]
    return Plan("vanilla", "model", "Model", "", WIDTH, tuple(sublayers), "all", 0, (*kept, *more), ())


def drawn(plan: Plan, made_from: nn.Module, model: nn.Module) -> dict[str, float]:
    """Parameter -> std that the initialiser made from one model draws in another."""
    stds: dict[int, float] = {}
    spy = SimpleNamespace(init=SimpleNamespace(normal_=lambda p, std: stds.__setitem__(id(p), std)))
    shapes = {name: tuple(tensor.shape) for name, tensor in made_from.state_dict().items()}
    namespace: dict[str, Any] = {"math": math, "re": re, "nn": spy}
    exec("\n".join(initialiser(plan, shapes, Names("nn", "math", "re"))), namespace)
    namespace[INITIALISER](model)
    return {name: stds[id(p)] for name, p in model.named_parameters() if id(p) in stds}


@pytest.mark.parametrize("multiplier", [1.0, 0.22])
@pytest.mark.parametrize(("planned", "depth", "width", "experts"), [(2, 2, WIDTH, 3), (2, 5, 20, 4), (1, 4, 7, 1)])
def test_stds_at_any_size(planned: int, depth: int, width: int, experts: int, multiplier: float) -> None:
    first, model = Model(planned), Model(depth, width, experts)
    found = drawn(plan_of(first, planned, multiplier=multiplier), first, model)
    small = math.sqrt(2 / (5 * width))
    assert set(found) == {name for name, _ in model.named_parameters() if "conv1" not in name}
    for name, std in found.items():
        residual = "w2" in name or "out" in name
        expected = small / (multiplier * math.sqrt(2 * depth)) if residual else small
        assert std == pytest.approx(expected, rel=1e-14), name


def test_a_parameter_that_differs_from_its_like() -> None:
    model = Model(3)
    found = drawn(plan_of(model, 3, Fill("blocks.1.out.weight", 0.5)), model, model)
    assert found["blocks.1.out.weight"] == pytest.approx(0.5, rel=1e-14)
    assert found["blocks.0.out.weight"] == found["blocks.2.out.weight"] == pytest.approx(small_std(WIDTH) / 6**0.5)


def test_sublayers_that_names_cannot_count() -> None:
    """The residual projection is w2 in one block and w3 in the other, and both blocks have both."""
    model = Model(2)
    plan = plan_of(model, 2)
    names = ("blocks.0.w2.0.weight", "blocks.1.w3.0.weight", "blocks.0.out.weight", "blocks.1.out.weight")
    with pytest.raises(Refused, match="cannot be counted"):
        drawn(Plan(**{**vars(plan), "sublayers": names}), model, model)


def test_a_width_that_shapes_do_not_tell() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    plan = Plan("vanilla", "m", "M", "", WIDTH, ("0.weight",), "all", 0, (Fill("0.weight", 0.1, residual=True),), ())
    with pytest.raises(Refused, match="no parameter tells the width"):
        drawn(plan, model, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize(
    "edit", [ScaleEmbedding("e", 3.7), ScaleEmbedding("e", math.sqrt(24), per_width=True), NormEmbedding("e", 1e-5)]
)
def test_embedding_classes(edit: ScaleEmbedding | NormEmbedding, wraps: bool, dtype: torch.dtype) -> None:
    namespace: dict[str, Any] = {"math": math, "nn": nn}
    exec("\n".join(embedding_class(edit, Names("nn", "math", "re"), wraps=wraps)), namespace)
    cls = namespace["ScaledEmbedding" if isinstance(edit, ScaleEmbedding) else "NormedEmbedding"]
    plain, ids = nn.Embedding(9, 24, dtype=dtype), torch.arange(9)
    made = cls.of(plain) if wraps else cls(9, 24, dtype=dtype)
    assert isinstance(made, nn.Embedding)
    rows = made.weight.detach()
    expected = (
        rows * edit.factor if isinstance(edit, ScaleEmbedding) else nn.functional.layer_norm(rows, (24,), eps=edit.eps)
    )
    assert made(ids).dtype == dtype
    assert torch.equal(made(ids), expected)
