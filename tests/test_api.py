"""The public API as its user reads it: docstrings that name every argument and every field."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import spikepatch
from tests.architectures import tiny_model

PUBLIC = {name: getattr(spikepatch, name) for name in spikepatch.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}


def section(value: Any, title: str) -> str:
    """The lines of a docstring under ``title``, up to the next title."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)*)", inspect.getdoc(value) or "", re.MULTILINE)
    return found[1] if found else ""


def entries(text: str) -> set[str]:
    """The names that ``a, b: what they are`` lines explain."""
    heads = re.findall(r"^    (\w+(?:, \w+)*):", text, re.MULTILINE)
    return {name for head in heads for name in head.split(", ")}


def test_all_is_of_two_kinds() -> None:
    assert PUBLIC.keys() == FUNCTIONS.keys() | CLASSES.keys()
    assert len(FUNCTIONS) >= 10
    assert len(CLASSES) >= 10


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_a_function_is_explained(name: str) -> None:
    parameters = set(inspect.signature(FUNCTIONS[name]).parameters)
    assert entries(section(FUNCTIONS[name], "Args")) == parameters
    assert section(FUNCTIONS[name], "Raises").strip()


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_and_method_of_a_class_is_explained(name: str) -> None:
    kind = CLASSES[name]
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    assert entries(section(kind, "Attributes")) == fields
    own = [value for key, value in vars(kind).items() if not key.startswith("_") and key not in fields]
    assert all(inspect.getdoc(value) for value in own), [value for value in own if not inspect.getdoc(value)]


def test_a_name_where_a_model_is_meant(tmp_path: Path) -> None:
    plan = spikepatch.plan(tiny_model("gpt2"), reinit="all")
    name: Any = "gpt2"
    calls: list[Callable[[], object]] = [
        lambda: spikepatch.inspect(name),
        lambda: spikepatch.patch(name, plan),
        lambda: spikepatch.initialize(name, plan),
        lambda: spikepatch.save(name, tmp_path / "out"),
        lambda: spikepatch.param_groups(name),
        lambda: spikepatch.plan(cast(Any, None), reinit="none"),
        lambda: spikepatch.check(cast(Any, 3)),
    ]
    for call in calls:
        with pytest.raises(spikepatch.Refused, match="this is no loaded model") as refused:
            call()
        assert "load the model first" in refused.value.remedy
        assert "spikepatch.convert take names" in refused.value.remedy


def test_example_inputs_that_are_no_dict() -> None:
    model, inputs = tiny_model("gpt2"), cast(Any, torch.ones(1, 4, dtype=torch.long))
    calls: list[Callable[[], object]] = [
        lambda: spikepatch.inspect(model, example_inputs=inputs),
        lambda: spikepatch.plan(model, reinit="all", example_inputs=inputs),
        lambda: spikepatch.check(model, example_inputs=[inputs]),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(spikepatch.Refused, match="example_inputs is no dict of arguments") as refused:
            call()
        assert "{'name of the argument': tensor}" in refused.value.remedy


def test_messages_fit_the_command_and_python(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(spikepatch.Refused, match=r"^recipe: there is no recipe 'scaled'"):
        spikepatch.plan(model, "scaled", reinit="all")
    spikepatch.patch(model, "scaled-embed", reinit="all")
    spikepatch.save(model, tmp_path / "out")
    with pytest.raises(spikepatch.BadTarget, match=r"give --overwrite \(in Python, overwrite=True\)"):
        spikepatch.save(model, tmp_path / "out")


def test_help_is_readable() -> None:
    """``help(spikepatch)`` says first how the names are used, then has each of them."""
    text = pydoc.plain(pydoc.render_doc(spikepatch))
    head, _, rest = text.partition("PACKAGE CONTENTS")
    assert all(f"spikepatch.{name}(" in head for name in FUNCTIONS)
    assert all(re.search(rf"^    (class )?{name}\(", rest, re.MULTILINE) for name in PUBLIC)
