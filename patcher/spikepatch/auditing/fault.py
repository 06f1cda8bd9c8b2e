"""What an audit returns: frozen data with stable JSON keys."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from spikepatch.residual.map import pattern

FaultLevel = Literal["note", "at-risk", "unstable"]
LEVELS: tuple[FaultLevel, ...] = ("note", "at-risk", "unstable")


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, or worth knowing, about named parameters.

    Attributes:
        name: stable, for scripts: ``zero``, ``gain``, ``torch-default``, ``copies`` and so on.
        severity: a ``note`` does not change the verdict.
        parameters: names as in ``named_parameters()`` or ``named_buffers()``.
        what: one sentence.
        expected, measured: in words and numbers.
        remedy: what to do.
    """

    name: str
    severity: FaultLevel
    parameters: tuple[str, ...]
    what: str
    expected: str
    measured: str
    remedy: str

    def __str__(self) -> str:
        names = self.patterns
        return f"{self.severity}: {self.what}: {', '.join(names[:3])}{' ...' if names[3:] else ''}"

    @property
    def patterns(self) -> tuple[str, ...]:
        """The parameters, those of all layers as one."""
        return tuple(dict.fromkeys(map(pattern, self.parameters)))


@dataclass(frozen=True)
class Audit:
    """What the weights themselves say, before anything is run.

    Attributes:
        source: as the user named it.
        architecture: class of the model.
        weights: where they come from, in words.
        learned: the matrices are not as drawn: they have been trained. Then nothing is said of stds.
        scheme: the rule that most matrices follow, in words; empty where none does.
        findings: what is wrong, the worst first.
        not_said: what nothing is said of, and why.
    """

    source: str
    architecture: str
    weights: str
    learned: bool
    scheme: str
    findings: tuple[Fault, ...] = ()
    not_said: tuple[str, ...] = ()

    @property
    def worst(self) -> FaultLevel | None:
        """The worst severity of all findings; None where there are none."""
        return max((f.severity for f in self.findings), key=LEVELS.index, default=None)

    def at_least(self, severity: FaultLevel) -> tuple[Fault, ...]:
        """The findings that are this bad, or worse."""
        return tuple(f for f in self.findings if LEVELS.index(f.severity) >= LEVELS.index(severity))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """``to_dict`` as text, as ``spikepatch audit --json`` prints it."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def sorted_faults(faults: Iterable[Fault]) -> tuple[Fault, ...]:
    """The worst first; else in the order in which they were found."""
    return tuple(sorted(faults, key=lambda f: -LEVELS.index(f.severity)))
