"""The stable pre-training initialisation of "Spike No More" for any HuggingFace model or checkpoint.

On a live model:

    residual = spikepatch.inspect(model)                             # find and prove the residual stream
    plan     = spikepatch.plan(model, "scaled-embed", reinit="all")  # every change, as data
    model    = spikepatch.patch(model, plan)                         # in place
    model    = spikepatch.initialize(model, plan)                    # on meta: each rank its own shards
    groups   = spikepatch.param_groups(model, weight_decay=0.1)      # for the optimiser: what is not to decay
    spikepatch.save(model, "out/")

The same from and to a folder, and in source code:

    result   = spikepatch.convert("gpt2", "out/")
    spikepatch.verify("out/")                                        # at any later time: is it still what was written?
    spikepatch.fold("trained/", "plain/")                            # after training: the plain architecture again
    edit     = spikepatch.codemod("model.py", "build:small_model")

Before training, whether it is at risk, measured:

    report   = spikepatch.check(model, recipes=["scaled-embed"])

And while it trains, loss spikes in any training loop:

    detector = spikepatch.SpikeDetector()

What cannot be done, or not safely, raises a SpikepatchError: BadSource, BadTarget or Refused. Each says what is wrong,
where, why, and what to do, and nothing has been written or changed. Widths are in elements, stds those of the elements,
losses in nats. Nothing heavy is imported before the first use of a name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from spikepatch.apply.codemod import Codemod, codemod
    from spikepatch.apply.initialize import initialize
    from spikepatch.apply.module import patch
    from spikepatch.apply.saving import save
    from spikepatch.conversion import Conversion, convert
    from spikepatch.errors import BadSource, BadTarget, Refused, SpikepatchError
    from spikepatch.folding import Folded, fold
    from spikepatch.optimiser import param_groups
    from spikepatch.planning import plan
    from spikepatch.plans import Plan, Recipe
    from spikepatch.preflight.check import check
    from spikepatch.preflight.result import StabilityReport
    from spikepatch.residual.inspect import inspect
    from spikepatch.residual.map import ResidualMap
    from spikepatch.storage.verify import verify
    from spikepatch.training.callback import SpikeMonitor
    from spikepatch.training.spikes import SpikeDetector

_HOME = {
    "inspect": "spikepatch.residual.inspect",
    "ResidualMap": "spikepatch.residual.map",
    "plan": "spikepatch.planning",
    "Plan": "spikepatch.plans",
    "Recipe": "spikepatch.plans",
    "patch": "spikepatch.apply.module",
    "initialize": "spikepatch.apply.initialize",
    "save": "spikepatch.apply.saving",
    "codemod": "spikepatch.apply.codemod",
    "Codemod": "spikepatch.apply.codemod",
    "param_groups": "spikepatch.optimiser",
    "convert": "spikepatch.conversion",
    "Conversion": "spikepatch.conversion",
    "check": "spikepatch.preflight.check",
    "StabilityReport": "spikepatch.preflight.result",
    "fold": "spikepatch.folding",
    "Folded": "spikepatch.folding",
    "verify": "spikepatch.storage.verify",
    "SpikeDetector": "spikepatch.training.spikes",
    "SpikeMonitor": "spikepatch.training.callback",
    "SpikepatchError": "spikepatch.errors",
    "BadSource": "spikepatch.errors",
    "BadTarget": "spikepatch.errors",
    "Refused": "spikepatch.errors",
}

__all__ = [
    "BadSource",
    "BadTarget",
    "Codemod",
    "Conversion",
    "Folded",
    "Plan",
    "Recipe",
    "Refused",
    "ResidualMap",
    "SpikeDetector",
    "SpikeMonitor",
    "SpikepatchError",
    "StabilityReport",
    "check",
    "codemod",
    "convert",
    "fold",
    "initialize",
    "inspect",
    "param_groups",
    "patch",
    "plan",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spikepatch' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
