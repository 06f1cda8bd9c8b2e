"""Untie: the head gets a matrix of its own; a copy where weights are kept, a draw of its own where they are fresh."""

from __future__ import annotations

import pytest

from spikepatch.errors import Refused
from spikepatch.plans.plan import Context, Untie
from spikepatch_transforms.untie import UntieHead
from tests.residual.maps import mapped, plan_of


def test_plan() -> None:
    residual = mapped("gpt2")[0]
    assert list(UntieHead()(residual, Context("all"))) == [Untie("lm_head.weight", "transformer.wte.weight")]


def test_only_where_it_is_tied() -> None:
    residual = mapped("llama")[0]
    assert list(UntieHead(if_tied=True)(residual, Context("all"))) == []


def test_only_the_stream_that_feeds_the_output_has_a_head() -> None:
    assert list(UntieHead()(mapped("gpt2")[0], Context("all", stream=1))) == []


def test_a_head_of_its_own() -> None:
    with pytest.raises(Refused, match=r"no tied head(.|\n)*own matrix already(.|\n)*leave --untie out"):
        plan_of("llama", "vanilla", reinit="all", untie=True)
