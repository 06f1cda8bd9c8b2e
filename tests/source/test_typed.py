"""Frozen data that comes back from JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikepatch.source.typed import finite, parsed


@dataclass(frozen=True)
class Leaf:
    name: str
    pair: tuple[int, float] | None = None
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...] = ()
    best: Leaf | None = None
    numbers: tuple[float | None, ...] = ()
    table: Mapping[str, tuple[Leaf, ...]] = dataclasses.field(default_factory=dict)
    rest: Any = None
    below: tuple[Tree, ...] = ()


leaves = st.builds(
    Leaf, st.text(), st.none() | st.tuples(st.integers(), st.floats(allow_nan=False)), st.sampled_from("ab")
)
plain = st.none() | st.integers() | st.text() | st.lists(st.integers()) | st.dictionaries(st.text(), st.booleans())
trees = st.recursive(
    st.builds(
        Tree,
        st.lists(leaves, max_size=3).map(tuple),
        st.none() | leaves,
        st.lists(st.none() | st.floats(allow_nan=False), max_size=3).map(tuple),
        st.dictionaries(st.text(), st.lists(leaves, max_size=2).map(tuple), max_size=2),
        plain,
    ),
    lambda inner: st.builds(Tree, below=st.lists(inner, max_size=3).map(tuple)),
    max_leaves=5,
)


@given(tree=trees)
def test_what_went_in_comes_back(tree: Tree) -> None:
    assert parsed(Tree, json.loads(json.dumps(dataclasses.asdict(tree)))) == tree


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "Tree is not read from a list"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
        ({"best": {}}, "missing 1 required positional argument: 'name'"),
        ({"best": 3}, "Leaf is not read from a int"),
        ({"leaves": {}}, "{} is no list"),
        ({"best": {"name": "", "pair": [1]}}, r"\[1\] has 1 entries, not 2"),
        ({"table": {"": [[]]}}, "Leaf is not read from a list"),
        ({"table": []}, r"\[\] is no object"),
    ],
)
def test_another_shape_is_refused(data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        parsed(Tree, data)


def test_strict_json_has_null_for_what_is_no_number() -> None:
    assert finite({"a": (1.0, math.nan), "b": [math.inf, True, "x"]}) == {"a": [1.0, None], "b": [None, True, "x"]}
