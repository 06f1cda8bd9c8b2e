"""What a recipe asks of the optimiser: which parameters get weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from spikepatch.errors import Refused
from spikepatch.plans import Plan


def param_groups(model: nn.Module, weight_decay: float = 0.1, *, plan: Plan | None = None) -> list[dict[str, Any]]:
    """Parameter groups for ``torch.optim.AdamW`` and others: with weight decay, and without.

        optimiser = torch.optim.AdamW(spikepatch.param_groups(model, weight_decay=0.1), lr=1e-3)

    Without it are all vectors and scalars (gains of norms, biases), parameters that their module marks with
    ``_no_weight_decay`` (state-space matrices), and embeddings where the recipe says so; with it are the matrices. A
    tied matrix counts once, as an embedding.

    Args:
        model: patched or not; a plain module, a transformers model, or one loaded from a patched folder. As long as it
            has the names of the model that was patched, it may be sharded.
        weight_decay: of the first group.
        plan: by default the one that ``model`` was patched with, or what its config records of it.

    Returns:
        Groups ``{"params": [...], "weight_decay": ...}``, none of them empty; every parameter is in exactly one.

    Raises:
        Refused: the recipe names an embedding that the model does not have, as under a wrapper.
    """
    bare = _without_decay(model, plan)
    parameters = dict(model.named_parameters())  # a tied one once
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in parameters.values():
        small = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
        (others if small or id(parameter) in bare else decayed).append(parameter)
    assert sorted(map(id, decayed + others)) == sorted(map(id, model.parameters()))
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _without_decay(model: nn.Module, plan: Plan | None) -> set[int]:
    """Identities of the embeddings that the recipe wants without weight decay."""
    plan = plan or getattr(model, "_spikepatch_plan", None)
    record = getattr(getattr(model, "config", None), "spikepatch", None)
    names = plan.no_decay if plan is not None else record.get("no_decay", ()) if isinstance(record, Mapping) else ()
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # Names are those of the full model; one without its head is a part of it.
    found = {name: parameters.get(name, parameters.get(name.removeprefix(prefix))) for name in names}
    missing = [name for name, parameter in found.items() if parameter is None]
    if missing:
        raise Refused(
            what="the recipe's embeddings are not in this model",
            where=type(model).__name__,
            why=f"it has no {', '.join(missing[:3])}",
            remedy="pass the model itself, not a wrapper (model.module of DistributedDataParallel), or another plan",
        )
    return {id(parameter) for parameter in found.values()}
