"""What a recipe asks of the optimiser: which parameters get weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from spikepatch.errors import Refused
from spikepatch.plans.plan import Plan
from spikepatch.runtime.embedding import pattern
from spikepatch.source.meta import check_module
from spikepatch.source.private import decays


def param_groups(model: nn.Module, weight_decay: float = 0.1, *, plan: Plan | None = None) -> list[dict[str, Any]]:
    """Parameter groups for ``torch.optim.AdamW`` and others: with weight decay, and without.

        optimiser = torch.optim.AdamW(spikepatch.param_groups(model, weight_decay=0.1), lr=1e-3)

    Without it are all vectors and scalars (gains of norms, biases), what the plan knows to be no matrix (a bias for
    each expert, state-space parameters), what carries the mark ``_no_weight_decay`` that state-space libraries use, and
    embeddings where the recipe says so; with it are the matrices. A tied matrix counts once, as an embedding.

    Args:
        model: patched or not; a plain module, a transformers model, or one loaded from a patched folder. As long as it
            has the names of the model that was patched, it may be sharded.
        weight_decay: of the first group.
        plan: by default the one that ``model`` was patched with, or what its config records of it.

    Returns:
        Groups ``{"params": [...], "weight_decay": ...}``, none of them empty; every parameter is in exactly one.

    Raises:
        Refused: the plan names a parameter that the model does not have, as under a wrapper.
    """
    check_module(model)
    bare = _without_decay(model, plan)
    parameters = dict(model.named_parameters())  # a tied one once
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in parameters.values():
        small = parameter.ndim < 2 or not decays(parameter)
        (others if small or id(parameter) in bare else decayed).append(parameter)
    assert sorted(map(id, decayed + others)) == sorted(map(id, model.parameters()))
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _without_decay(model: nn.Module, plan: Plan | None) -> set[int]:
    """Identities of what the plan, or the config's record of it, wants without weight decay."""
    plan = plan or getattr(model, "_spikepatch_plan", None)
    record = getattr(getattr(model, "config", None), "spikepatch", None)
    if plan is not None:
        places = {pattern(name) for name in plan.no_decay}
    else:
        places = set(record["no_decay"] if isinstance(record, Mapping) else ())
    # Names are those of the full model; one without its head is a part of it.
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, set[int]] = {place: set() for place in places}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for place in {pattern(name), pattern(prefix + name)} & places:
            found[place].add(id(parameter))
    missing = sorted(place for place in places if not found[place])
    if missing:
        raise Refused(
            what="the plan's parameters are not in this model",
            where=type(model).__name__,
            why=f"it has no {', '.join(missing[:3])}",
            remedy="pass the model itself, not a wrapper (model.module of DistributedDataParallel), or another plan",
        )
    return set().union(*found.values())
