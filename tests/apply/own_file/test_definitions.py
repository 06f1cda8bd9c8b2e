"""The inserted initialiser, run: which parameters it draws and with which std, to the last digits, at any depth."""

from __future__ import annotations

import dataclasses
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from spikepatch.apply.own_file.definitions import INITIALISER, Names, class_name, embedding_class, initialiser
from spikepatch.errors import Refused
from spikepatch.plans.plan import (
    Constant,
    DetachEmbedding,
    Edit,
    EmbeddingEdit,
    Fill,
    NormEmbedding,
    Plan,
    ScaleEmbedding,
    StreamShape,
    ValueEdit,
    cut_std,
    small_std,
)

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
    edits = [Fill("tokens.weight", small, fan=WIDTH)]
    for name, _ in model.named_parameters():
        if "w1" in name or "w3" in name:
            edits.append(Fill(name, small, fan=WIDTH))
        elif "w2" in name or "out" in name:
            edits.append(Fill(name, small / (multiplier * math.sqrt(2 * depth)), fan=WIDTH, depth=-0.5))
    sublayers = [name for i in range(depth) for name in (f"blocks.{i}.out.weight", f"blocks.{i}.w2.0.weight")]
    replaced = {edit.parameter for edit in more if isinstance(edit, ValueEdit)}
    kept = [edit for edit in edits if edit.parameter not in replaced]
    stream = StreamShape(WIDTH, tuple(sublayers), 0)
    return Plan("vanilla", "model", "Model", "", (stream,), "all", 0, (*kept, *more), ())


#: How far a std may be off: of c in sqrt(c / d) fourteen digits are written.
DIGITS = 5e-14


def drawn(plan: Plan, made_from: nn.Module, model: nn.Module) -> dict[str, tuple[float, ...]]:
    """Parameter -> what the initialiser made from one model calls torch with in another: a std, a bound, a constant."""
    found: dict[int, tuple[float, ...]] = {}

    def note(parameter: nn.Parameter, *numbers: float, **named: float) -> None:
        found[id(parameter)] = (*numbers, *named.values())

    calls = ("normal_", "trunc_normal_", "uniform_", "constant_")
    spy = SimpleNamespace(init=SimpleNamespace(**dict.fromkeys(calls, note)))
    shapes = {name: tuple(tensor.shape) for name, tensor in made_from.state_dict().items()}
    namespace: dict[str, Any] = {"math": math, "re": re, "nn": spy}
    exec("\n".join(initialiser(plan, shapes, Names("nn", "math", "re"))), namespace)
    namespace[INITIALISER](model)
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


@pytest.mark.parametrize("multiplier", [1.0, 0.22])
@pytest.mark.parametrize(("planned", "depth", "width", "experts"), [(2, 2, WIDTH, 3), (2, 5, 20, 4), (1, 4, 7, 1)])
def test_stds_at_any_size(planned: int, depth: int, width: int, experts: int, multiplier: float) -> None:
    first, model = Model(planned), Model(depth, width, experts)
    found = drawn(plan_of(first, planned, multiplier=multiplier), first, model)
    small = math.sqrt(2 / (5 * width))
    assert set(found) == {name for name, _ in model.named_parameters() if "conv1" not in name}
    for name, (std,) in found.items():
        residual = "w2" in name or "out" in name
        expected = small / (multiplier * math.sqrt(2 * depth)) if residual else small
        assert std == pytest.approx(expected, rel=DIGITS), name


def test_a_parameter_that_differs_from_its_like() -> None:
    """What it is in a deeper model nobody said."""
    model = Model(3)
    plan = plan_of(model, 3, Fill("blocks.1.out.weight", 0.5))
    found = drawn(plan, model, model)
    assert found["blocks.1.out.weight"] == (0.5,)
    assert found["blocks.0.out.weight"] == found["blocks.2.out.weight"]
    assert found["blocks.0.out.weight"] == pytest.approx((small_std(WIDTH) / 6**0.5,), rel=DIGITS)
    with pytest.raises(ValueError, match="for S = 6, not 8"):
        drawn(plan, model, Model(4))


def test_numbers_inside_a_layer_stay() -> None:
    """Of a sequential block, 0 and 1 are no layers."""
    model = nn.ModuleList(nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))) for _ in range(2))
    small, sublayers = small_std(WIDTH), ("0.1.weight", "1.1.weight")
    edits = [Fill(f"{i}.0.weight", small, fan=WIDTH) for i in range(2)]
    edits += [Fill(name, small / math.sqrt(2), fan=WIDTH, depth=-0.5) for name in sublayers]
    plan = Plan("own", "m", "M", "", (StreamShape(WIDTH, sublayers, 0),), "all", 0, tuple(edits), ())
    deeper = nn.ModuleList([*model, *model[:1]])
    deeper[2] = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)))
    found = drawn(plan, model, deeper)
    assert found["2.0.weight"] == pytest.approx((small,), rel=DIGITS)
    assert found["2.1.weight"] == pytest.approx((small / math.sqrt(3),), rel=DIGITS)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (Fill("", 0.02), (0.02,)),
        (Fill("", math.sqrt(2 / 36), fan=36, axes=(1, 0)), (math.sqrt(2 / 60),)),
        (Fill("", 1 / math.sqrt(24), "uniform", fan=24, axes=(1,)), (-math.sqrt(3 / 40), math.sqrt(3 / 40))),
        (Fill("", 0.02 * cut_std(3.0), "truncated", cut=3.0), (0.02, -0.06, 0.06)),
        (Fill("", 2 / (2 * math.sqrt(WIDTH)), fan=WIDTH, depth=-1.0), (2 / (5 * math.sqrt(20)),)),
        (Constant("", 1 / math.sqrt(4), offset=-1.0, depth=-0.5), (1 / math.sqrt(10) - 1,)),
        (Constant("", 0.5), (0.5,)),
    ],
)
def test_every_kind_of_value_at_any_size(edit: ValueEdit, expected: tuple[float, ...]) -> None:
    """``out`` is (12, 24) in the two layers of the plan, and (20, 40) in five; S is 4 and 10, two for each layer."""
    first, model = Model(2), Model(5, 20)
    edits = [dataclasses.replace(edit, parameter=f"blocks.{i}.out.weight") for i in range(2)]
    found = drawn(plan_of(first, 2, *edits), first, model)
    assert len(expected) == len(found["blocks.4.out.weight"])
    for i in range(5):
        assert found[f"blocks.{i}.out.weight"] == pytest.approx(expected, rel=DIGITS)


def test_several_streams() -> None:
    model = Model(2)
    plan = plan_of(model, 2)
    with pytest.raises(Refused, match="several residual streams"):
        drawn(dataclasses.replace(plan, streams=plan.streams * 2), model, model)


def test_sublayers_that_names_cannot_count() -> None:
    """The residual projection is w2 in one block and w3 in the other, and both blocks have both."""
    model = Model(2)
    plan = plan_of(model, 2)
    names = ("blocks.0.w2.0.weight", "blocks.1.w3.0.weight", "blocks.0.out.weight", "blocks.1.out.weight")
    with pytest.raises(Refused, match="cannot be counted"):
        drawn(dataclasses.replace(plan, streams=(StreamShape(WIDTH, names, 0),)), model, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize(
    "edit",
    [
        ScaleEmbedding("e", 3.7),
        ScaleEmbedding("e", math.sqrt(24), per_width=True),
        NormEmbedding("e", 1e-5),
        NormEmbedding("e", 1e-3, "rmsnorm"),
        NormEmbedding("e", 1e-6, "layernorm", affine=False),
        DetachEmbedding("e", 0.1),
    ],
)
def test_embedding_classes(edit: EmbeddingEdit, wraps: bool, dtype: torch.dtype) -> None:
    namespace: dict[str, Any] = {"math": math, "nn": nn}
    exec("\n".join(embedding_class(edit, Names("nn", "math", "re"), wraps=wraps)), namespace)
    cls = namespace[class_name(edit)]
    plain, ids = nn.Embedding(9, 24, dtype=dtype), torch.arange(9)
    made = cls.of(plain) if wraps else cls(9, 24, dtype=dtype)
    assert isinstance(made, nn.Embedding)
    rows, share, learned = made.weight.detach(), 1.0, {"weight"}
    match edit:
        case ScaleEmbedding():
            expected = rows * edit.factor
            share = edit.factor
        case NormEmbedding(kind="layernorm"):
            expected = nn.functional.layer_norm(rows, (24,), eps=edit.eps)
            learned |= {"norm.weight", "norm.bias"} if edit.affine else set()
        case NormEmbedding():
            expected = nn.functional.rms_norm(rows, (24,), eps=edit.eps)
            learned |= {"norm.weight"}
        case DetachEmbedding():
            expected = rows
            share = edit.gradient
    output = made(ids)
    assert set(made.state_dict()) == learned
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    if not isinstance(edit, NormEmbedding):
        output.sum().backward()
        assert made.weight.grad is not None
        assert torch.equal(made.weight.grad, torch.full_like(rows, share))
