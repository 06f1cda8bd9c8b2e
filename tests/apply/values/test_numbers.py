"""Numbers without a meaning in the dtype of the weights are refused, on disk and live, before anything is changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import spikepatch
from spikepatch.apply.values.numbers import check_numbers
from spikepatch.plans.plan import Constant, Fill
from tests.architectures import tiny_model

REFUSED = "have no meaning in the dtype"


def source_of(folder: Path, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Path:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    model.to(dtype).save_pretrained(folder)
    return folder


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"reinit": "none", "factor": 1e38}),
    ({}, {"reinit": "all", "factor": 1e38}),
    ({}, {"reinit": "all", "factor": 1e38, "dtype": "bfloat16"}),
    ({}, {"reinit": "none", "factor": 1e-40, "dtype": "bfloat16"}),
    ({}, {"reinit": "all", "factor": 1e-7, "dtype": "float16"}),
    ({}, {"reinit": "all", "factor": 1e5, "dtype": "float16"}),
    ({"scale": 3e-5, "dtype": torch.float16}, {"reinit": "none"}),  # 1 / std is above 65504
    ({"scale": 1e-37}, {"reinit": "none"}),
]


@pytest.mark.parametrize(("model", "options"), CASES)
def test_on_disk(model: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", **model)
    with pytest.raises(spikepatch.Refused, match=REFUSED):
        spikepatch.convert(str(source), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("factor", [1e38, 1e-45, 1e30])
@pytest.mark.parametrize("reinit", ["all", "none"])
def test_live(factor: float, reinit: Any) -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(spikepatch.Refused, match=REFUSED):
        spikepatch.patch(model, "scaled-embed", reinit=reinit, factor=factor)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("std", "dtype"), [(1e-8, torch.float16), (4e-7, torch.float16), (1e-42, torch.bfloat16)])
def test_a_std_that_is_rounded_to_0(std: float, dtype: torch.dtype) -> None:
    plan = spikepatch.plan(tiny_model("llama"), "vanilla", reinit="all")
    edits = tuple(dataclasses.replace(e, std=std) if isinstance(e, Fill) else e for e in plan.edits)
    with pytest.raises(spikepatch.Refused, match="are rounded to 0"):
        check_numbers(dataclasses.replace(plan, edits=edits), dict.fromkeys(plan.written, dtype), lambda name: 0.0)


@pytest.mark.parametrize("value", [1e-9, 1e5, float("inf")])
def test_a_constant_that_the_dtype_has_not(value: float) -> None:
    plan = spikepatch.plan(tiny_model("llama"), "vanilla", reinit="all")
    plan = dataclasses.replace(plan, edits=(Constant("model.norm.weight", value),))
    with pytest.raises(spikepatch.Refused, match="is no number of float16"):
        check_numbers(plan, {"model.norm.weight": torch.float16}, lambda name: 0.0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("reinit", ["all", "none"])
def test_usual_numbers_are_written(dtype: str, reinit: Any, tmp_path: Path) -> None:
    source = source_of(tmp_path / "source")
    assert spikepatch.convert(str(source), tmp_path / "out", reinit=reinit, dtype=dtype).out.is_dir()
