"""How a patched model is stored, so that it loads again with what was planned.

    plain   values alone have changed: the same architecture
    native  a setting of the architecture's own config multiplies the embedding by the planned factor
    host    another architecture with the same tensors has such a setting; on request
    code    a generated subclass beside the weights

A setting is not believed by its name, nor because the config takes it: whisper reads ``scale_embedding`` and never
applies it, and unknown keys are accepted without a word. It is found by trying, and proven by comparing the recorded
forward pass of the model with that setting, at full width and with all layers, with the patched model's: the same
operations on the same tensors give the same bits; see ``residual/identity.py``. A forward pass is recorded only where
it can decide: not for a setting that the model never reads, and not where the tensors are others already.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from spikepatch.apply.folder.hosts import HOSTS
from spikepatch.errors import Refused, did_you_mean
from spikepatch.plans.plan import EmbeddingEdit, Plan, ScaleEmbedding
from spikepatch.residual.identity import Values, forward_of
from spikepatch.source.meta import as_read, build_meta
from spikepatch.source.private import classes_for

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from spikepatch.source.open import Source

RouteKind = Literal["plain", "native", "host", "code"]
Storage = Literal["auto", "plain", "native", "host", "code"]


@dataclass(frozen=True)
class Route:
    """A way to store one plan.

    Attributes:
        kind: see the top of this module.
        why: the reason, as half a sentence.
        model_class, config: of the model that the folder is loaded as; for ``code``, of the class that is derived from.
        original: entries of the source's config.json that the output's replaces; None: the source has no such entry.
    """

    kind: RouteKind
    why: str
    model_class: type[PreTrainedModel]
    config: Any
    original: Mapping[str, Any] = field(default_factory=dict)


def check_storage(storage: str) -> None:
    """Refuse a name that is none of the routes."""
    if storage not in get_args(Storage):
        raise Refused(
            what=f"there is no storage route {storage!r}",
            where="--storage",
            why="the routes are " + ", ".join(get_args(Storage)),
            remedy=did_you_mean(storage, get_args(Storage), "leave it out for auto"),
        )


def choose(source: Source, plan: Plan, patched: PreTrainedModel, storage: Storage, *, read: Collection[str]) -> Route:
    """The route asked for, or with ``auto`` the first possible one of plain, native and code.

    Args:
        patched: the source's architecture with the plan's changes of structure; on meta, with real buffers.
        read: the settings that the source's model reads; see ``meta.settings_read``. No other is tried.

    Raises:
        Refused: the route asked for cannot hold the plan; why is said.
    """
    model_class, config = source.model_class, source.config
    if not plan.structural:
        if storage in ("auto", "plain"):
            return Route("plain", f"{plan.recipe} changes values alone", model_class, config)
        if storage != "code":
            raise Refused(
                what=f"--storage {storage} has nothing to hold",
                where=plan.source,
                why=f"{plan.recipe} changes values alone, and multiplies no embedding",
                remedy="use --storage plain (or auto)",
            )
    elif storage == "plain":
        raise Refused(
            what="--storage plain cannot hold this recipe",
            where=plan.source,
            why=f"{plan.recipe} changes the forward pass, which the plain {plan.architecture} would leave out silently",
            remedy="use --storage auto, or the recipe vanilla",
        )
    if storage == "code":
        return Route("code", "as asked", model_class, config)
    factor = _factor(plan)
    if isinstance(factor, str):
        found: Route | str = factor
    elif storage == "host":
        found = _hosted(source, plan, patched, factor)
    else:
        found = _native(source, plan, patched, factor, read)
    if isinstance(found, Route):
        return found
    if storage == "auto":
        return Route("code", found, model_class, config)
    raise Refused(
        what=f"--storage {storage} cannot hold this recipe",
        where=plan.source,
        why=found,
        remedy="use --storage auto, which writes a subclass beside the weights where nothing else is exact",
    )


def _factor(plan: Plan) -> float | str:
    """The one factor by which embeddings are multiplied, or why there is none."""
    edits = plan.select(EmbeddingEdit)
    if not all(isinstance(edit, ScaleEmbedding) for edit in edits):
        return f"{plan.recipe} does more to the embedding than to multiply it, which no setting of a config does"
    factors = {edit.factor for edit in edits}
    return factors.pop() if len(factors) == 1 else "embeddings are multiplied by different factors"


def _native(source: Source, plan: Plan, patched: PreTrainedModel, factor: float, read: Collection[str]) -> Route | str:
    """The setting of the config with which the plain model is the patched one."""
    values = Values()
    wanted = None
    head = _own_head(patched)
    for name, value in _candidates(source.config, factor):
        try:
            now, config = (as_read(source.config, changes | head) for changes in ({}, {name: value}))
        except Exception:  # whatever a config's own checks raise: this value is none for it
            continue
        if {name, *_changed(now, config)}.isdisjoint(read):
            continue
        if (plain := _with_tensors_of(patched, source.model_class, config)) is None:
            continue
        wanted = wanted if wanted is not None else _output(values, patched)
        if wanted is None:
            return f"the forward pass of {plan.architecture} cannot be recorded, so no setting can be checked"
        if _output(values, plain) == wanted:
            why = f"{name} = {value!r} makes the plain {plan.architecture} the patched model, operation by operation"
            return Route("native", why, source.model_class, config, {name: getattr(source.config, name)})
    return f"no setting of its config makes the plain {plan.architecture} multiply its embedding by {factor:.6g}"


def _changed(before: PreTrainedConfig, after: PreTrainedConfig) -> set[str]:
    """The settings that differ: constructors compute some from others."""
    one, other = vars(before), vars(after)
    return {n for n in one.keys() | other.keys() if n not in one or n not in other or one[n] != other[n]}


def _candidates(config: Any, factor: float) -> Iterator[tuple[str, Any]]:
    """Settings that the architecture has to itself, and that do nothing now: a flag that is off, a number that is one
    or absent.
    """
    from transformers import PreTrainedConfig

    common = {*PreTrainedConfig().to_dict(), "tie_word_embeddings"}  # the plan says which head there is
    for name, value in config.to_dict().items():
        if name in common:
            continue
        if value is False:
            yield name, True
        elif value is None or (value == 1 and not isinstance(value, bool)):
            yield name, factor


def _hosted(source: Source, plan: Plan, patched: PreTrainedModel, factor: float) -> Route | str:
    """The other architecture whose model is the patched one."""
    import transformers

    own = source.model_class.__module__.startswith("transformers.")
    host = HOSTS.get(source.config.model_type) if own else None
    if host is None:
        known = ", ".join(sorted(HOSTS))
        return f"no architecture is known to compute what {plan.architecture} does; there is one for {known}"
    config_class = transformers.CONFIG_MAPPING[host.model_type]
    data = {k: v for k, v in source.config.to_dict().items() if k not in ("model_type", "architectures")}
    # Keys that the source's own class does not know are read by neither.
    lacking = type(source.config)().to_dict().keys() - config_class().to_dict().keys() - host.ignored
    foreign = sorted(name for name in lacking if data.get(name) is not None)
    if foreign:
        return f"{host.model_type} has no {', '.join(foreign)}, which the source's config sets"
    settings = {host.factor: factor, **host.constants}
    settings |= {name: data[other] ** exponent for name, (other, exponent) in host.powers.items()}
    try:
        config = as_read(config_class(), data | settings | _own_head(patched))
    except Exception as error:  # whatever a config's own checks raise
        return f"{host.model_type} does not take the source's settings: {' '.join(str(error).split())[:200]}"
    config.dtype = source.config.dtype
    model_class: Any = next(iter(classes_for(getattr(transformers, source.auto_class), config_class)), None)
    plain = None if model_class is None else _with_tensors_of(patched, model_class, config)
    values = Values()
    wanted = None if plain is None else _output(values, patched)
    if plain is None or wanted is None or _output(values, plain) != wanted:
        return f"{host.model_type} does not compute the same for this config, operation by operation"
    why = f"as asked: {model_class.__name__} has the same tensors and computes the same, operation by operation"
    replaced = {"model_type": source.config.model_type, "architectures": [source.model_class.__name__]}
    return Route("host", why, model_class, config, replaced | dict.fromkeys(settings))


def _own_head(patched: Any) -> dict[str, bool]:
    """A plan that unties the head has written so into the config of the patched model."""
    return {} if getattr(patched.config, "tie_word_embeddings", True) else {"tie_word_embeddings": False}


def _with_tensors_of(
    patched: PreTrainedModel, model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> PreTrainedModel | None:
    """The plain model, if it can be built and stores what ``patched`` does."""
    try:
        plain = build_meta(model_class, config, where=model_class.__name__)
    except Refused:
        return None
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (plain, patched)]
    return plain if shapes[0] == shapes[1] else None


def _output(values: Values, model: PreTrainedModel) -> int | None:
    """The number of the model's output; None where its forward pass does not run, or cannot be recorded."""
    try:
        return values.output(forward_of(model))
    except Refused:
        return None
