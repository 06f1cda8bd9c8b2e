"""A plan applied to a live model, in place."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from spikepatch._version import __version__
from spikepatch.apply.generated.structure import restructure, untie_head
from spikepatch.apply.live.initialize import Blueprint, unfillable
from spikepatch.apply.values.assign import values
from spikepatch.apply.values.construction import broken_ties
from spikepatch.apply.values.initialiser import own_values
from spikepatch.apply.values.loading import stable_settings
from spikepatch.apply.values.numbers import absolute_maximum, check_numbers
from spikepatch.errors import Refused
from spikepatch.plans.in_words import parts
from spikepatch.plans.plan import EmbeddingEdit, ModelPart, Plan, Recipe, Reinit, Untie, ValueEdit
from spikepatch.recipes.plan_of import check_learned, plan_model
from spikepatch.recipes.request import parse_request
from spikepatch.residual.example import Given
from spikepatch.runtime.embedding import check_patchable, install, patched_embeddings
from spikepatch.source.formats import some
from spikepatch.source.layout import check_covered, layout, persistent, tensor_shapes
from spikepatch.source.meta import build_meta, check_default_device, on_meta, skeleton, unwrapped
from spikepatch.source.pieces import loaded_pieces
from spikepatch.source.private import is_transformers_model

_log = logging.getLogger(__name__)


def patch(
    model: nn.Module,
    plan: Plan | Recipe | str,
    *,
    reinit: Reinit | None = None,
    seed: int = 0,
    factor: float | None = None,
    positions: bool = False,
    replace: bool = False,
    untie: bool = False,
    part: ModelPart | None = None,
    example_inputs: Given = None,
) -> nn.Module:
    """Apply a plan, or a recipe, to ``model``, in place; the same bits as on disk.

    Parameters keep their identity (an untied head gets a new one); ``model.config`` is a copy from then on, and the
    config that the model was built from stays as it is. A patched transformers model is an instance of a
    generated class, so its own ``save_pretrained``, as a Trainer calls it, writes a folder that loads patched.

    Of a model on the meta device the structure is patched; once it is sharded and has memory,
    ``spikepatch.initialize(model, plan)`` writes the values.

    Args:
        model: weights on any device, in any float dtype; not quantised and not sharded yet.
        plan: from ``spikepatch.plan``, made for this very model; or a recipe, as ``spikepatch.plan`` takes it.
        reinit: with a recipe, which weights to draw afresh. No default: learned weights are not lost by omission.
        seed, factor, positions, replace, untie, part, example_inputs: as in ``spikepatch.plan``; only with a recipe.

    Returns:
        ``model``.

    Raises:
        Refused: the plan does not fit, or the model cannot be written. The model is then as it was.
    """
    check_default_device()
    given, model = model, unwrapped(model)
    _check_unpatched(model)
    if not isinstance(plan, Plan):
        if reinit is None:
            raise Refused(
                what="patch(model, recipe) needs reinit=",
                where=type(model).__name__,
                why="whether learned weights are to be replaced is not guessed",
                remedy='reinit="all": a fresh model; "residual" or "none": learned weights are kept',
            )
        request = parse_request(
            plan, reinit=reinit, seed=seed, factor=factor, positions=positions, replace=replace, untie=untie, part=part
        )
        plan = plan_model(model, request, example_inputs)
    _check(model, plan)
    tables = dict(model.named_parameters(remove_duplicate=False))
    check_numbers(
        plan,
        {name: parameter.dtype for name, parameter in tables.items()},
        lambda name: absolute_maximum(loaded_pieces(tables[name])),
    )
    twin = skeleton(model)
    restructure(twin, plan)
    targets = layout(twin)
    check_covered(plan.written, twin, targets, every=plan.reinit == "all")
    buffers, unexplained = _constructed_buffers(model, plan)
    blueprint = Blueprint(plan, twin, skeleton(model), targets, buffers) if on_meta(model) else None
    if blueprint is not None and (problems := [*unfillable(blueprint)]):
        raise Refused(
            what="the model cannot be filled once it is sharded",
            where=type(model).__name__,
            why="; ".join(problems),
            remedy="build it with real buffers: `with accelerate.init_empty_weights(include_buffers=False)`, and tie "
            "its weights; or patch it where it has memory",
        )
    value = values(plan, twin, model, persistent(twin, buffers))
    # It may refuse, which later is too late.
    left = plan.written | {*plan.kept}
    kept = [t.owner for t in targets if t.owner not in left and value(t) is None]

    settings = {} if plan.structural else stable_settings(model, plan)

    if plan.reinit != "none":
        for line in parts(plan):
            _log.warning("%s", line)
    _own_configs(model)
    _record(model, plan)
    for name, setting in settings.items():
        setattr(model.config, name, setting)
    for edit in plan.select(Untie):
        untie_head(model, edit)
    model._spikepatch_plan = plan  # type: ignore[assignment]
    if blueprint is not None:
        model._spikepatch_blueprint = blueprint  # type: ignore[assignment]
        return given
    state = model.state_dict(keep_vars=True) | dict(model.named_parameters(remove_duplicate=False))
    written: set[str] = set()
    with torch.no_grad():
        for target in targets:
            fresh = value(target)
            if fresh is not None:
                target.view(state[target.owner].detach()).copy_(fresh)
                written.add(target.owner)
        if plan.reinit == "all":
            for name, buffer in model.named_buffers():  # those that no checkpoint has
                if name not in written | {*plan.kept} and name in buffers and buffers[name].shape == buffer.shape:
                    buffer.copy_(buffers[name])
    _count(model, plan, written)
    if plan.reinit == "all":
        kept += [name for name, _ in model.named_buffers() if name in unexplained and name not in kept]
        _say_what_stays(model, plan, kept)
    return given


def _say_what_stays(model: nn.Module, plan: Plan, kept: list[str]) -> None:
    """With fresh weights: what could not be made as it began."""
    if kept:
        _log.warning(
            "kept as they are, since no code of %s that can be run again tells how they began: %s",
            type(model).__name__,
            some(kept, 20),
        )
    untied = {edit.head for edit in plan.select(Untie)}
    apart = [f"{name} and {other}" for name, other in broken_ties(model) if not {name, other} & untied]
    if apart:
        _log.warning(
            "the code of %s makes one parameter of each of these pairs, which are two in this model and stay two: %s;"
            " to have one, tie them before the patch (tie_weights() of a transformers model)",
            type(model).__name__,
            some(apart, 5),
        )


def _count(model: nn.Module, plan: Plan, written: Collection[str]) -> None:
    """Each edit of the plan was carried out, once; anything else is a bug of ours."""
    left = {edit.parameter for edit in plan.select(ValueEdit)} - set(written)
    changed = patched_embeddings(model)
    left |= {edit.module for edit in plan.select(EmbeddingEdit)} - set(changed)
    tied = dict(model.named_parameters(remove_duplicate=False))
    left |= {edit.head for edit in plan.select(Untie) if tied[edit.head] is tied[edit.embedding]}
    if left:
        raise RuntimeError(f"edits were not carried out: {', '.join(sorted(left)[:5])}")


def _own_configs(model: nn.Module) -> None:
    """Give the modules copies of their configs, shared as before: the caller may build other models from the config."""
    from transformers import PreTrainedConfig

    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                setattr(module, name, copy.deepcopy(value, memo))


def _record(model: Any, plan: Plan) -> None:
    """Change the embeddings, and leave the record of the plan in the config; a refusal changes nothing."""
    record = plan.record(__version__)
    if not hasattr(model, "save_pretrained"):
        install(model, record)
    elif plan.structural:
        from spikepatch.apply.generated.adopt import adopt

        adopt(model, record)
    else:
        model.config.spikepatch = {**record, "original": {}}


def _check_unpatched(model: nn.Module) -> None:
    patched = patched_embeddings(model)
    if patched:
        raise Refused(
            what="the model is patched already",
            where=type(model).__name__,
            why=f"what {', '.join(patched)} does already would be applied twice",
            remedy="start from the model that it was made from",
        )


def _check(model: nn.Module, plan: Plan) -> None:
    check_learned(model, plan.reinit)
    problems = [*_read_only(model), *_misfits(model, plan)]
    if plan.kept and on_meta(model):
        problems.append("it keeps learned weights of towers, and on the meta device there are none")
    if problems:
        raise Refused(
            what="the plan cannot be applied to this model",
            where=type(model).__name__,
            why="; ".join(problems),
            remedy="make the plan from this very model with spikepatch.plan, before it is sharded or quantised",
        )


def _read_only(model: nn.Module) -> Iterator[str]:
    """Why the model's tensors cannot be written in place, one sentence per reason."""
    parameters = list(model.parameters())
    kinds = {type(p.data).__name__ for p in parameters} - {"Tensor"}
    if kinds:
        yield f"its parameters are {', '.join(sorted(kinds))}, not plain tensors"
    if any(not p.is_floating_point() for p in parameters):
        yield "it holds integer weights: it is quantised"
    if any(p.is_meta for p in parameters) and not on_meta(model):
        yield "some of its parameters are on the meta device, and others are not (`.to('meta')` moves them all)"
    if on_meta(model):
        yield from _untied(model)
    if not all(p.is_contiguous() for p in parameters):
        yield "some parameters are not contiguous in memory"


def _untied(model: Any) -> Iterator[str]:
    """What transformers ties on every other device; ``init_empty_weights`` takes ties apart."""
    tied = getattr(model, "all_tied_weights_keys", {})
    apart = [f"{a} and {b}" for a, b in tied.items() if model.get_parameter(a) is not model.get_parameter(b)]
    if apart:
        yield f"{', '.join(apart[:3])} are to be one parameter; call its tie_weights() first"


def _misfits(model: nn.Module, plan: Plan) -> Iterator[str]:
    """Where the plan was made for another model, one sentence per reason."""
    if plan.architecture != type(model).__name__:
        yield f"the plan is for {plan.architecture}, the model is a {type(model).__name__}"
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    tensors = set(tensor_shapes(model))
    heads = {edit.head for edit in plan.select(Untie)}
    embeddings = [edit.module for edit in plan.select(EmbeddingEdit)]
    missing = [*sorted(plan.written - tensors - heads), *(name for name in embeddings if name not in modules)]
    if missing:
        yield f"it has no {', '.join(missing[:3])}"
    unplanned = sorted(tensors - plan.written - {skip.target for skip in plan.skips})
    if unplanned:
        yield f"the plan does not mention {', '.join(unplanned[:3])}"
    for stream in plan.streams:
        for name in stream.sublayers[:1]:
            shape = tuple(parameters[name].shape) if name in parameters else ()
            if shape and shape[stream.axis : stream.axis + 1] != (stream.width,):
                yield f"{name} is {shape}, the plan is for a stream of width {stream.width} on its axis {stream.axis}"
    for edit in plan.select(Untie):
        if edit.head not in parameters or parameters[edit.head] is not parameters.get(edit.embedding):
            yield f"{edit.head} is not tied to {edit.embedding}"
    for name in embeddings:
        if name in modules:
            try:
                check_patchable(modules[name], name)
            except ValueError as error:
                yield str(error)


def _constructed_buffers(model: Any, plan: Plan) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Buffers as the constructor makes them: learned values must not survive a full re-initialisation.

    Of a plain module they are those that it has, where nothing tells what it was built with, with the names of these;
    none that are on meta.
    """
    made: dict[str, torch.Tensor] = {}
    unexplained: set[str] = set()
    if plan.reinit == "all" and any(True for _ in model.buffers()):
        if is_transformers_model(model):
            model = build_meta(type(model), model.config, where=type(model).__name__)
        else:
            own = own_values(model, plan.seed)
            made = {name: value for name, _ in model.named_buffers() if (value := own(name)) is not None}
            unexplained = {name for name, _ in model.named_buffers()} - made.keys()
    real = {name: buffer.detach().clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
    return real | made, unexplained
