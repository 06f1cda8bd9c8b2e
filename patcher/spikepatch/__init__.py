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

Before training, the parameters that were initialised wrongly, and whether it is at risk, measured:

    audit    = spikepatch.audit(model)
    report   = spikepatch.check(model, recipes=["scaled-embed"])

All of a training, several models on the same batches, and a verdict on each:

    verdict  = spikepatch.train(["gpt2", "gpt2@scaled-embed"], "text/*.jsonl.zst", "runs/x", steps=2000, lr=5e-4)
    verdict  = spikepatch.train(out="runs/x", resume=True)

While it trains, loss spikes in any training loop; and in a log of anybody's:

    detector = spikepatch.SpikeDetector()
    report   = spikepatch.judge("log.txt")                           # or of spikepatch.read_log("log.txt", loss="ce")

What cannot be done, or not safely, raises a SpikepatchError: BadSource, BadTarget or Refused. Each says what is wrong,
where, why, and what to do, and nothing has been written or changed. Widths are in elements, stds those of the elements,
losses in nats. Nothing heavy is imported before the first use of a name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spikepatch._version import __version__ as __version__
from spikepatch.errors import check_platform

if TYPE_CHECKING:
    from spikepatch.apply.folder.conversion import Conversion
    from spikepatch.apply.folder.convert import convert
    from spikepatch.apply.folder.fold import Folded, fold
    from spikepatch.apply.folder.verify import verify
    from spikepatch.apply.live.initialize import initialize
    from spikepatch.apply.live.patch import patch
    from spikepatch.apply.live.save import save
    from spikepatch.apply.own_file.codemod import Codemod, codemod
    from spikepatch.auditing.fault import Audit
    from spikepatch.errors import BadSource, BadTarget, Refused, SpikepatchError
    from spikepatch.plans.optimiser import param_groups
    from spikepatch.plans.plan import Plan, Recipe
    from spikepatch.preflight.audit import audit
    from spikepatch.preflight.check import check
    from spikepatch.preflight.result import StabilityReport
    from spikepatch.recipes.plan_of import plan
    from spikepatch.residual.inspect import inspect
    from spikepatch.residual.map import ResidualMap
    from spikepatch.spikes.detector import SpikeDetector
    from spikepatch.spikes.read_log import TrainingLog, read_log
    from spikepatch.spikes.spike_report import SpikeReport, judge
    from spikepatch.training.callback import SpikeMonitor
    from spikepatch.training.harness import train
    from spikepatch.training.verdict import Verdict

_HOME = {
    "inspect": "spikepatch.residual.inspect",
    "ResidualMap": "spikepatch.residual.map",
    "plan": "spikepatch.recipes.plan_of",
    "Plan": "spikepatch.plans.plan",
    "Recipe": "spikepatch.plans.plan",
    "patch": "spikepatch.apply.live.patch",
    "initialize": "spikepatch.apply.live.initialize",
    "save": "spikepatch.apply.live.save",
    "codemod": "spikepatch.apply.own_file.codemod",
    "Codemod": "spikepatch.apply.own_file.codemod",
    "param_groups": "spikepatch.plans.optimiser",
    "convert": "spikepatch.apply.folder.convert",
    "Conversion": "spikepatch.apply.folder.conversion",
    "audit": "spikepatch.preflight.audit",
    "Audit": "spikepatch.auditing.fault",
    "check": "spikepatch.preflight.check",
    "StabilityReport": "spikepatch.preflight.result",
    "fold": "spikepatch.apply.folder.fold",
    "Folded": "spikepatch.apply.folder.fold",
    "verify": "spikepatch.apply.folder.verify",
    "SpikeDetector": "spikepatch.spikes.detector",
    "read_log": "spikepatch.spikes.read_log",
    "TrainingLog": "spikepatch.spikes.read_log",
    "judge": "spikepatch.spikes.spike_report",
    "SpikeReport": "spikepatch.spikes.spike_report",
    "SpikeMonitor": "spikepatch.training.callback",
    "train": "spikepatch.training.harness",
    "Verdict": "spikepatch.training.verdict",
    "SpikepatchError": "spikepatch.errors",
    "BadSource": "spikepatch.errors",
    "BadTarget": "spikepatch.errors",
    "Refused": "spikepatch.errors",
}

__all__ = [
    "Audit",
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
    "SpikeReport",
    "SpikepatchError",
    "StabilityReport",
    "TrainingLog",
    "Verdict",
    "audit",
    "check",
    "codemod",
    "convert",
    "fold",
    "initialize",
    "inspect",
    "judge",
    "param_groups",
    "patch",
    "plan",
    "read_log",
    "save",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spikepatch' has no attribute {name!r}")
    import importlib

    if _HOME[name] != "spikepatch.errors":
        check_platform()
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
