"""A model's construction and its initialisers, run again under a recorder: what its own code makes of its tensors.

A transformers model is built again from its config. Of any other module the arguments of its constructor are looked
for among its attributes, where most code keeps them under their own names; whether that is what it was built from is
seen by comparing the two, module by module. Where the whole cannot be built again its parts are, from the outside in,
and what initialises a part (``reset_parameters``) is run behind them, from the inside out.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from spikepatch.apply.values.recording import Recording
from spikepatch.quiet import quiet
from spikepatch.source.meta import skeleton
from spikepatch.source.private import (
    INITIALISERS,
    from_config,
    initialiser_of,
    is_transformers_model,
    own_buffers,
    own_children,
    own_parameters,
    promised_ties,
)
from spikepatch.source.tied import firsts

#: Sizes that a required argument is tried with, and how many combinations of them.
_SIZES, _TRIES = 6, 36


@dataclass(frozen=True)
class Origin:
    """What is known of the code that has written a tensor.

    Attributes:
        sure: all arguments of that code are known; else they had their defaults, and the outcome is alike.
        alone: no other code can have written it. Else a constructor that could not be run again may have, after what is
            recorded.
    """

    sure: bool
    alone: bool


def constructed(model: nn.Module, seed: int) -> tuple[Recording, Mapping[str, Origin]]:
    """Run what made ``model`` again, without memory, and write down what it writes.

    Args:
        model: on any device; it is not changed.
        seed: of what the code draws.

    Returns:
        The recording; and of every tensor's name where it comes from.
    """
    recording = Recording(seed)
    with quiet():
        if is_transformers_model(model):
            config: Any = copy.deepcopy(model.config)
            config.dtype = torch.float32
            try:
                with recording.active():
                    built: nn.Module = from_config(type(model), config)
                    recording.name(built)
                return recording, {name: Origin(True, True) for name, _ in _tensors(built)}
            except Exception:  # whatever its constructor raises for a config that has been changed since
                recording = Recording(seed)
        with recording.active():
            twin = skeleton(model)
            usual = Counter(n for _, tensor in _tensors(model) for n in tensor.shape).most_common(_SIZES)
            known = {name: Origin(True, False) for name, _ in _tensors(model)}
            known |= dict(_rebuild(twin, model, recording, [n for n, _ in usual]))
            _initialise_as_transformers(twin)
            recording.name(twin)
    return recording, known


def broken_ties(model: nn.Module) -> list[tuple[str, str]]:
    """Names of tensors that are one where the model's own code builds it, and two here."""
    if is_transformers_model(model):
        pairs = [*promised_ties(model).items()]
    else:
        with quiet(), Recording(0).active():
            usual = Counter(n for _, tensor in _tensors(model) for n in tensor.shape).most_common(_SIZES)
            again, _ = _again(model, [n for n, _ in usual])
        pairs = [] if again is None else [(n, first) for n, first in firsts(_tensors(again)).items() if n != first]
    tensors = dict(_tensors(model))
    return [(n, first) for n, first in pairs if tensors.get(n) is not tensors.get(first)]


def _rebuild(
    twin: nn.Module, model: nn.Module, recording: Recording, usual: Sequence[int], path: str = ""
) -> Iterator[tuple[str, Origin]]:
    """Put tensors that ``model``'s code has written in the place of those of ``twin``, a copy without values.

    Yields:
        Names of tensors that are not merely sure, and where they come from.
    """
    again, sure = _again(model, usual)
    if again is not None:
        modules = dict(again.named_modules(remove_duplicate=False))
        for name, module in twin.named_modules(remove_duplicate=False):
            own_parameters(module).update(own_parameters(modules[name]))
            own_buffers(module).update(own_buffers(modules[name]))
        yield from ((path + name, Origin(sure, True)) for name, _ in _tensors(model))
    else:
        adopted: dict[int, Any] = {}
        for own in (own_parameters(twin), own_buffers(twin)):
            for name, value in own.items():
                if value is not None:
                    fake = adopted.setdefault(id(value), recording.adopt(value))
                    own[name] = nn.Parameter(fake, requires_grad=False) if isinstance(value, nn.Parameter) else fake
        silent = not _may_write(type(model))
        for name, child in own_children(model).items():
            copied = own_children(twin)[name]
            if child is not None and copied is not None:
                for inner, origin in _rebuild(copied, child, recording, usual, f"{path}{name}."):
                    yield inner, Origin(origin.sure, origin.alone and silent)
        if silent and callable(getattr(model, "reset_parameters", None)):
            yield from ((path + name, Origin(True, True)) for name in (*own_parameters(model), *own_buffers(model)))
        _apply(twin, recording)
    _initialise(twin, recording)


def _initialise(module: nn.Module, recording: Recording) -> None:
    for name in INITIALISERS:
        method = getattr(module, name, None)
        if callable(method) and not _required(method):
            before = recording.mark()
            try:
                with torch.no_grad():
                    method()
            except Exception:  # it needs what only its own program has
                recording.undo(before)


def _apply(module: nn.Module, recording: Recording) -> None:
    """Run ``_init_weights(module)`` on each module, as constructors do by ``self.apply(self._init_weights)``."""
    for name in INITIALISERS if not is_transformers_model(module) else ():
        method = getattr(module, name, None)
        if callable(method) and _required(method) and not _required(functools.partial(method, module)):
            before = recording.mark()
            try:
                with torch.no_grad():
                    module.apply(method)
            except Exception:  # it is for something else
                recording.undo(before)


def _initialise_as_transformers(model: nn.Module) -> None:
    """Run ``_init_weights`` of the closest owner on each module, innermost first, as ``PreTrainedModel`` does."""

    def apply(module: nn.Module, owner: Callable[[nn.Module], object] | None) -> None:
        found = initialiser_of(module)
        owner = found if found is not None and is_transformers_model(module) else owner
        for child in module.children():
            apply(child, owner)
        if owner is not None:
            owner(module)

    with torch.no_grad():
        apply(model, None)


def _again(module: nn.Module, usual: Sequence[int]) -> tuple[nn.Module | None, bool]:
    """A module like ``module`` from the same constructor, or None; and whether every argument is known: one that has
    been tried, or has its default, is if with another value the module would be another.
    """
    kind = type(module)
    if kind.__module__.startswith("torch.") or kind.__init__ is nn.Module.__init__:
        return None, False
    for arguments, sure in _arguments(module, usual):
        built = _built(module, arguments, sure)
        if built is not None:
            return built, sure or _settled(module, arguments)
    return None, False


def _built(module: nn.Module, arguments: Mapping[str, Any], sure: bool) -> nn.Module | None:
    """A module like ``module``, by these arguments."""
    try:
        built = type(module)(**copy.deepcopy(dict(arguments)))
    except Exception:  # whatever a constructor raises for arguments that are not its own
        return None
    return built if _alike(module, built, sure) else None


def _settled(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """With another value of any argument that ``module`` does not keep, the module would be another."""
    for parameter in inspect.signature(type(module)).parameters.values():
        name = parameter.name
        if name in vars(module) or name in ("device", "dtype"):  # torch's own convention
            continue
        value = arguments.get(name, parameter.default)
        if callable(value) and value is not parameter.empty:  # what it has built has been compared, module by module
            continue
        other = not value if isinstance(value, bool) else value * 2 + 1 if isinstance(value, (int, float)) else None
        if other is None or _built(module, {**arguments, name: other}, False) is not None:
            return False
    return True


def _arguments(module: nn.Module, usual: Sequence[int]) -> Iterator[tuple[dict[str, Any], bool]]:
    """What the constructor may have been called with, likeliest first; and whether every argument was found.

    Args:
        usual: lengths that many tensors of the model have; a missing argument may be one of them.
    """
    parameters = inspect.signature(type(module)).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if any(p.kind is p.POSITIONAL_ONLY for p in named):
        return
    fields = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    known = {p.name: fields[p.name] for p in named if p.name in fields}
    missing = [p.name for p in named if p.name not in known and p.default is p.empty]
    sure = len(known) + len(missing) == len(list(parameters))
    settings = [v for n, v in fields.items() if n not in known and _is_config(v)]
    if len(missing) == 1 and settings:
        yield from (({**known, missing[0]: value}, sure) for value in settings)
    own = [n for _, tensor in _tensors(module) for n in tensor.shape]
    sizes = list(dict.fromkeys((*own, *usual)))[:_SIZES]
    if missing and len(sizes) ** len(missing) > _TRIES:
        return
    for chosen in itertools.product(sizes, repeat=len(missing)):
        yield {**known, **dict(zip(missing, chosen, strict=True))}, sure and not missing


def _is_config(value: object) -> bool:
    plain = (int, float, complex, str, bytes, list, tuple, set, type, type(None), torch.Tensor, torch.dtype, nn.Module)
    return not isinstance(value, plain) and not callable(value)


def _alike(module: nn.Module, built: nn.Module, sure: bool) -> bool:
    """They have the same modules, and tensors of the same names, shapes and ties, but for ties that have been broken
    since; numbers too unless it is ``sure``.
    """
    ours, theirs = (dict(m.named_modules(remove_duplicate=False)) for m in (module, built))
    if [(n, type(m)) for n, m in ours.items()] != [(n, type(m)) for n, m in theirs.items()]:
        return False
    if [(name, t.shape) for name, t in _tensors(module)] != [(name, t.shape) for name, t in _tensors(built)]:
        return False
    first, their_first = firsts(_tensors(module)), firsts(_tensors(built))
    if any(their_first[name] != their_first[other] for name, other in first.items()):
        return False
    return sure or all(_numbers(ours[name]) == _numbers(theirs[name]) for name in ours)


def _numbers(module: nn.Module) -> Mapping[str, object]:
    return {n: v for n, v in vars(module).items() if n != "training" and isinstance(v, (int, float, str))}


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _required(method: Callable[..., object]) -> bool:
    """It cannot be called without arguments."""
    try:
        inspect.signature(method).bind()
    except (TypeError, ValueError):
        return True
    return False


def _may_write(kind: type) -> bool:
    """The code of a class, torch's own left out, names something that writes tensors."""
    functions = (
        value
        for base in kind.__mro__
        if not base.__module__.startswith("torch.")
        for value in vars(base).values()
        if isinstance(value, FunctionType)
    )
    return any(_names_a_write(function.__code__) for function in functions)


def _names_a_write(code: CodeType) -> bool:
    writes = {"init", "data", "apply"}
    if any(name in writes or (name.endswith("_") and hasattr(torch.Tensor, name)) for name in code.co_names):
        return True
    return any(_names_a_write(inner) for inner in code.co_consts if isinstance(inner, CodeType))
