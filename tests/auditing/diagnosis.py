"""A case is a healthy model, broken in one way, with the diagnosis that an audit should come to as data.

    model, extra = case.build()          # extra: keyword arguments for check/inspect (a plain module's inputs)
    findings = audit(model, **extra)     # (severity, names, text) each
    ok, why = judge(case, findings)

``severity`` is the least that is right (note < at-risk < unstable); every pattern of ``must`` has to be matched by a
named parameter; names outside ``must`` and ``may`` are false alarms. A control is healthy: nothing may be at-risk.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn

from tests.auditing.bug_models import V

SEVERITIES = ("note", "at-risk", "unstable")


@dataclass(frozen=True)
class Case:
    name: str
    start: Callable[[], nn.Module]
    breaks: Callable[[nn.Module], None]
    severity: str
    must: tuple[str, ...]
    wrong: str  # what is wrong, in a few words
    words: tuple[str, ...]  # one of them should be in the text of the finding
    source: str
    may: tuple[str, ...] = ()

    def build(self, seed: int = 1234) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(seed)
        model = self.start().eval()
        with torch.no_grad():
            self.breaks(model)
        return model, inputs_of(model)


@dataclass(frozen=True)
class Control:
    name: str
    start: Callable[[], nn.Module]

    def build(self, seed: int = 4321) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(seed)
        model = self.start().eval()
        return model, inputs_of(model)


def inputs_of(model: nn.Module) -> dict[str, Any]:
    if isinstance(model, tf.PreTrainedModel):
        return {}
    return {"example_inputs": {"input_ids": torch.arange(64).view(1, 64) * 7 % V}}


def judge(what: Any, findings: Any) -> tuple[bool, str]:
    """(right?, why not) of findings (severity, names, text), each about named parameters."""
    loud = [f for f in findings if f[0] != "note"]
    if isinstance(what, Control):
        return not loud, "; ".join(f"{f[2]} ({', '.join(f[1][:2])})" for f in loud)
    level = SEVERITIES.index(what.severity)
    named = {n for f in findings if SEVERITIES.index(f[0]) >= level for n in f[1]}
    missing = [m for m in what.must if not any(fnmatch.fnmatch(n, m) for n in named)]
    allowed = what.must + what.may
    wrong = sorted({n for f in loud for n in f[1] if not any(fnmatch.fnmatch(n, m) for m in allowed)})
    text = " ".join(f[2] for f in findings).lower()
    silent = not any(word.lower() in text for word in what.words)
    why = (
        f"not named: {missing}" if missing else "",
        f"false: {wrong[:4]}" if wrong else "",
        "reason not said" if silent else "",
    )
    return not any(why), "; ".join(filter(None, why))
