"""A user's own transform and recipes, in a module of the current directory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

MODULE = """
from collections.abc import Iterator
from dataclasses import dataclass

from spikepatch import Recipe
from spikepatch.plans.plan import Context, Edit, Fill, Skip
from spikepatch.residual.map import ResidualMap


@dataclass(frozen=True)
class Ramp:
    step: float

    def __call__(self, residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        for p in residual.residual_projections:
            yield Fill(p.parameter, self.step * (1 + p.sublayer))


RECIPE = Recipe("ramp", (Ramp(0.01),))
TAKEN = Recipe("vanilla", (Ramp(0.01),))
BAD = Recipe("no name: this", (Ramp(0.01),))
NUMBER = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_ramp.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_ramp", raising=False)
    return "own_ramp"
