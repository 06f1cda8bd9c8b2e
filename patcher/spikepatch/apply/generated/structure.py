"""A plan's changes of structure, made in a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from spikepatch._version import __version__
from spikepatch.errors import Refused
from spikepatch.plans.plan import Plan, Untie
from spikepatch.runtime.embedding import install
from spikepatch.source.meta import build_meta
from spikepatch.source.private import is_transformers_model
from spikepatch.source.tied import tied


def restructure(twin: nn.Module, plan: Plan) -> None:
    """Make the plan's changes of structure in a model that nobody else uses, usually on the meta device.

    Raises:
        Refused: the model's class ties the head again when it is built from a config, or unties more than the head.
    """
    for edit in plan.select(Untie):
        untie_head(twin, edit)
        _check_untied(twin, edit)
    if plan.structural:
        install(twin, plan.record(__version__))


def untie_head(model: Any, edit: Untie) -> None:
    owner, _, name = edit.head.rpartition(".")
    table = model.get_parameter(edit.embedding)
    setattr(model.get_submodule(owner), name, nn.Parameter(table.detach().clone(), requires_grad=table.requires_grad))
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys.pop(edit.head, None)


def _check_untied(twin: Any, edit: Untie) -> None:
    """What is loaded later is built from a config that says that the head is not tied: is it ``twin``, then?"""
    if not is_transformers_model(twin):
        return
    config = type(twin.config).from_dict(twin.config.to_dict())
    built = build_meta(type(twin), config, where=type(twin).__name__)
    wanted, found = ({frozenset(group) for group in tied(model)} for model in (twin, built))
    if wanted != found:
        names = sorted(set().union(*(wanted ^ found)))
        raise Refused(
            what="this model's class cannot untie its head alone",
            where=type(twin).__name__,
            why=f"built from a config that says so, it ties {edit.head} all the same"
            if any(edit.head in group for group in found)
            else f"with the head it unties {', '.join(names)} from each other",
            remedy="leave --untie out",
        )
