"""A plan applied to a live model, in place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikepatch import __version__
from spikepatch.apply.tensors import layout, read_only_reason, values
from spikepatch.errors import Refused
from spikepatch.plans import Fill, NormEmbedding, Plan, Reinit, ScaleEmbedding, Untie
from spikepatch.quiet import quiet
from spikepatch.residual.trace import skeleton


def patch(
    model: nn.Module,
    plan: Plan | str,
    *,
    reinit: Reinit | None = None,
    seed: int = 0,
    factor: float | None = None,
    positions: bool = False,
    untie: bool = False,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Apply a plan, or a recipe by its name, to ``model``, in place; the same bits as on disk.

    Parameters keep their identity (an untied head gets a new one). A patched transformers model is an instance of a
    generated class, so its own ``save_pretrained``, as a Trainer calls it, writes a folder that loads patched.

    Args:
        model: weights on any device, in any float dtype; not quantised and not sharded.
        plan: from ``spikepatch.plan``, made for this very model; or a recipe's name.
        reinit: with a name, which weights to draw afresh. No default: learned weights are not lost by omission.
        seed, factor, positions, untie, example_inputs: as in ``spikepatch.plan``; only with a name.

    Returns:
        ``model``.

    Raises:
        Refused: the plan does not fit, or the model cannot be written. The model is then as it was.
    """
    if isinstance(plan, str):
        if reinit is None:
            raise Refused(
                what="patch(model, recipe) needs reinit=",
                where=type(model).__name__,
                why="whether learned weights are to be replaced is not guessed",
                remedy='reinit="all": a fresh model; "residual" or "none": learned weights are kept',
            )
        from spikepatch.planning import plan as make

        plan = make(
            model,
            plan,
            reinit=reinit,
            seed=seed,
            factor=factor,
            positions=positions,
            untie=untie,
            example_inputs=example_inputs,
        )
    _check(model, plan)
    twin = skeleton(model)
    restructure(twin, plan)
    targets = layout(twin)
    value = values(plan, twin, _constructed_buffers(model, plan))

    for edit in plan.select(Untie):
        _untie(model, edit)
    if plan.structural:
        _embed(model, plan)
    model._spikepatch_plan = plan  # type: ignore[assignment]
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for target in targets:
            fresh = value(target)
            if fresh is not None:
                target.view(state[target.owner].detach()).copy_(fresh)
    return model


def save(model: nn.Module, out: str | os.PathLike[str]) -> Path:
    """``model.save_pretrained(out)``, with the manifest and a model card, in a folder that appears whole.

    Raises:
        Refused: the model was not patched, or is no transformers model.
        BadTarget: ``out`` cannot be used.
    """
    from spikepatch.storage.manifest import MANIFEST, file_hash, manifest, model_card
    from spikepatch.storage.publish import check_target, publishing
    from spikepatch.storage.write import write_text

    plan: Plan | None = getattr(model, "_spikepatch_plan", None)
    write = getattr(model, "save_pretrained", None)
    if plan is None or write is None:
        raise Refused(
            what="only a patched transformers model is saved here",
            where=type(model).__name__,
            why="there is no plan to record" if plan is None else "it has no save_pretrained",
            remedy="call spikepatch.patch first, or use the model's own way of saving",
        )
    folder = Path(out)
    check_target(folder, None, overwrite=False)
    with publishing(folder) as scratch, quiet():
        write(scratch)
        storage = "code" if plan.structural else "plain"
        write_text(
            scratch / "README.md",
            model_card(plan, storage, auto_class=getattr(type(model), "_auto_class", None) or "AutoModelForCausalLM"),
        )
        hashes = {path.name: file_hash(path) for path in sorted(scratch.iterdir())}
        write_text(scratch / MANIFEST, manifest(plan, storage, {"kind": "live"}, "spikepatch.save(model, OUT)", hashes))
    return folder


def restructure(twin: nn.Module, plan: Plan) -> None:
    """The plan's changes of structure on a model of one's own, usually on the meta device."""
    from spikepatch.runtime.embedding import install

    for edit in plan.select(Untie):
        _untie(twin, edit)
    if plan.structural:
        install(twin, plan.record(__version__))


def _embed(model: nn.Module, plan: Plan) -> None:
    record = plan.record(__version__)
    if hasattr(model, "save_pretrained"):
        from spikepatch.apply.generated import adopt

        adopt(model, record)
    else:
        from spikepatch.runtime.embedding import install

        install(model, record)


def _untie(model: Any, edit: Untie) -> None:
    owner, _, name = edit.head.rpartition(".")
    table = model.get_parameter(edit.embedding)
    setattr(model.get_submodule(owner), name, nn.Parameter(table.detach().clone(), requires_grad=table.requires_grad))
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys.pop(edit.head, None)


def _check(model: nn.Module, plan: Plan) -> None:
    problems = list(read_only_reason(model))
    names = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    if plan.architecture != type(model).__name__:
        problems.append(f"the plan is for {plan.architecture}, the model is a {type(model).__name__}")
    missing = [f.parameter for f in plan.select(Fill) if f.parameter not in names]
    missing += [
        e.module for e in plan.edits if isinstance(e, (ScaleEmbedding, NormEmbedding)) and e.module not in modules
    ]
    if missing:
        problems.append("it has no " + ", ".join(missing[:3]))
    if any(p.is_meta for p in names.values()):
        problems.append("its parameters are on the meta device: there is nothing to write to")
    if problems:
        raise Refused(
            what="the plan cannot be applied to this model",
            where=type(model).__name__,
            why="; ".join(problems),
            remedy="make the plan from this very model with spikepatch.plan, before it is sharded or quantised",
        )


def _constructed_buffers(model: Any, plan: Plan) -> dict[str, torch.Tensor]:
    """Persistent buffers as the constructor makes them: learned values must not survive a full re-initialisation."""
    persistent = {name for name, _ in model.named_buffers()} & set(model.state_dict())
    if plan.reinit == "all" and persistent and hasattr(model, "_from_config"):
        from spikepatch.meta import build_meta

        model = build_meta(type(model), model.config, where=type(model).__name__)
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}
