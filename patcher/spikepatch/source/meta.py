"""A model on the meta device with real buffers, at any size: only the Python objects take time and memory."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from spikepatch.errors import Refused, on_one_line
from spikepatch.quiet import quiet
from spikepatch.source.private import COMPILED, as_parsed, from_config, is_partitioned, own_children, replaced_here

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Elements. Buffers (rotary frequencies, statistics, masks of usual length) stay below, fused experts are above.
_LARGE = 1 << 24

#: What a default config is refused with.
NOT_BUILT = "the default config cannot be built"

_FACTORIES = frozenset((torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn))


class _TensorsWithoutMemory(TorchFunctionMode):
    """New tensors that are large, or that have no values yet, are made on meta: they are to become parameters. What is
    drawn into them later is not drawn.

    Moved to meta only once they are registered, they would be allocated and filled first: 140 s for a default llama4,
    and out of memory for a layer of 256 experts.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and kwargs.get("device") is None and kwargs.get("generator") is None:
            on_meta = func(*args, **{**kwargs, "device": "meta"})
            if func is torch.empty or on_meta.numel() >= _LARGE:
                return on_meta
        drawn = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") == "normal_" and isinstance(drawn, torch.Tensor) and drawn.is_meta:
            # Of torch.Tensor, of torch.nn.init, or around one of them. On meta it is Python and takes 0.3 ms; a tensor
            # without elements is for its checks.
            empty = drawn.new_empty(0, device="cpu")
            func(empty, *args[1:], **{name: value for name, value in kwargs.items() if name != "tensor"})
            return drawn
        return func(*args, **kwargs)


#: Parameters of a model, at most: a wrong number of layers would be built until memory ends. Mixtures with a matrix for
#: each expert have 70,000.
_MOST = 300_000


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters move to meta as they are registered, buffers stay real, and shared parameters stay shared.

    (``accelerate.init_empty_weights`` makes a new parameter of one that is on meta already, which takes ties apart.)
    """

    count = itertools.count()

    def register_on_meta(
        register: Callable[..., None], module: nn.Module, name: str, param: nn.Parameter | None
    ) -> None:
        if next(count) > _MOST:
            raise ValueError(f"the config asks for more than {_MOST:,} parameters, which no model has")
        parameter = param
        if parameter is not None and not parameter.is_meta:
            moved = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            moved.__dict__.update(parameter.__dict__)
            parameter = moved
        register(module, name, parameter)

    with replaced_here(nn.Module, "register_parameter", register_on_meta):
        yield


def check_module(model: object) -> None:
    """Refuse a name, or whatever else it is, where a loaded model is meant."""
    if not isinstance(model, nn.Module):
        raise Refused(
            "this is no loaded model",
            where=repr(model)[:80],
            why=f"it is of type {type(model).__name__}, and no nn.Module",
            remedy="load the model first (AutoModelForCausalLM.from_pretrained); spikepatch.plan, spikepatch.check and"
            " spikepatch.convert take names",
        )
    if partitioned := [name for name, parameter in model.named_parameters() if is_partitioned(parameter)]:
        raise Refused(
            "the parameters are partitioned by DeepSpeed's ZeRO stage 3",
            where=type(model).__name__,
            why=f"{partitioned[0]} and {len(partitioned) - 1} more are empty here: each process holds a part of them",
            remedy="call spikepatch before deepspeed.initialize, on a model built outside of deepspeed.zero.Init",
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """What is to be looked at and changed: the model that ``torch.compile`` has put a wrapper around.

    Raises:
        Refused: as ``check_module``.
    """
    check_module(model)
    while tuple(own_children(model)) == COMPILED:
        (inner,) = own_children(model).values()
        assert inner is not None
        model = inner
    return model


def check_default_device() -> None:
    """Refuse to work where new tensors have no values; a model is built there, and nothing else."""
    if torch.get_default_device().type == "meta":
        raise Refused(
            "called with meta as the default device",
            where='torch.device("meta")',
            why="what is measured and drawn would have no values",
            remedy='build the model inside `with torch.device("meta"):`, and leave the block before the call',
        )


def on_meta(model: nn.Module) -> bool:
    """The model is structure only: it has parameters, and none has memory."""
    parameters = list(model.parameters())
    return bool(parameters) and all(parameter.is_meta for parameter in parameters)


def build_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig, *, where: str) -> PreTrainedModel:
    """A ``model_class`` in eval mode: parameters on meta in the config's dtype, buffers real, tied weights tied.

    Args:
        config: is not changed.
        where: the source, for the error.

    Raises:
        Refused: the model cannot be built from its config.
    """
    with quiet():
        try:
            model = _build(model_class, config, _TensorsWithoutMemory())
            if any(buffer.is_meta for buffer in model.buffers()):  # a buffer was large: build as transformers does
                model = _build(model_class, config, contextlib.nullcontext())
        except Exception as error:
            raise not_buildable(where, error) from error
    return model.eval()


def _build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, mode: contextlib.AbstractContextManager[Any]
) -> PreTrainedModel:
    # A constructor that draws a buffer draws the same one every time.
    with _parameters_on_meta(), mode, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return from_config(model_class, copy.deepcopy(config))


def as_read(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """The config that its JSON text is read as, once ``changes`` are in it: constructors adjust what they are given.

    Raises:
        Exception: whatever the config's own checks raise for a value of the wrong kind.
    """
    read: PreTrainedConfig = type(config).from_dict(as_parsed(json.loads(config.to_json_string())) | dict(changes))
    read.dtype = config.dtype
    return read


@contextlib.contextmanager
def settings_read() -> Iterator[set[str]]:
    """The settings that are read of any config meanwhile, by the names that they are stored under.

    What a model that is built and run meanwhile computes cannot depend on any other setting; but for what it takes out
    of ``config.to_dict()``, which is not seen.
    """
    from transformers import PreTrainedConfig

    read: set[str] = set()

    def watched(get: Callable[..., Any], config: PreTrainedConfig, name: str) -> Any:
        read.add(get(config, "attribute_map").get(name, name))
        return get(config, name)

    with replaced_here(PreTrainedConfig, "__getattribute__", watched):
        yield read


def not_buildable(where: str, error: Exception) -> Refused:
    """The error for a config, default or given, that transformers does not build a model from."""
    return Refused(
        NOT_BUILT if where.startswith("arch:") else "the model cannot be built",
        where=where,
        why=on_one_line(error),
        remedy="give a real model: a hub id, or a folder with its config.json"
        if where.startswith("arch:")
        else "check the values in config.json, and that this version of transformers has the model",
    )


def skeleton(model: nn.Module, *, keep_buffers: bool = False) -> nn.Module:
    """A copy of ``model`` in eval mode, with its parameters on the meta device, and its buffers too unless they are to
    keep their values. ``model`` itself is not touched.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in () if keep_buffers else model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copied(model, memo).eval()


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy, in which functions that hold modules hold the copied ones: Python copies no function. Tensors that a
    module has computed from parameters lie on the meta device, as these do.
    """
    functions: dict[int, FunctionType] = {}
    modules = {id(module): module for module in model.modules()}
    plainly = {kind for kind in set(map(type, modules.values())) if _copied_by_parts(kind)}
    twins = {number: type(m).__new__(type(m)) for number, m in modules.items() if type(m) in plainly}
    memo.update(twins)
    for module in modules.values():
        for name, value in vars(module).items():
            if name in _OWN and not value:
                continue
            _find_functions(value, modules.keys(), functions)
            if isinstance(value, torch.Tensor) and not value.is_leaf:  # Python copies none
                memo[id(value)] = value.detach().to("meta")
    cells = {number: [CellType() for _ in function.__closure__ or ()] for number, function in functions.items()}
    for number, function in functions.items():
        again = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells[number])
        )
        again.__kwdefaults__ = function.__kwdefaults__
        memo[number] = again
    for number, twin in twins.items():
        state: Mapping[str, Any] = modules[number].__getstate__()  # type: ignore[no-untyped-call]
        twin.__dict__.update({name: _part(name, value, memo) for name, value in state.items()})
    whole: nn.Module = copy.deepcopy(model, memo)
    for number, function in functions.items():
        for new, old in zip(cells[number], function.__closure__ or (), strict=True):
            new.cell_contents = copy.deepcopy(old.cell_contents, memo)
    return whole


#: What every module has of its own: most of it is empty, and no other module's.
_OWN = frozenset(vars(nn.Module()))


def _copied_by_parts(kind: type) -> bool:
    """A deep copy of such a module is a new one with copies of its attributes: Python's own takes four times as long,
    as it asks each empty dictionary how it is to be copied.
    """
    own = any("__slots__" in vars(base) for base in kind.__mro__) or kind in copyreg.dispatch_table
    asked = (
        "__new__", "__deepcopy__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__", "__reduce__",
        "__reduce_ex__",
    )  # fmt: skip
    return not own and all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in asked)


def _part(name: str, value: Any, memo: dict[int, Any]) -> Any:
    if name not in _OWN:
        return copy.deepcopy(value, memo)
    if not value:
        return value if isinstance(value, bool) or value is None else type(value)()
    if type(value) is dict:
        return {key: None if each is None else copy.deepcopy(each, memo) for key, each in value.items()}
    return copy.deepcopy(value, memo)


def _find_functions(value: object, modules: Set[int], found: dict[int, FunctionType]) -> bool:
    """Note the functions in ``value`` that hold one of ``modules``; is there one in it, or is it one?"""
    if value is None or isinstance(value, (str, int, float, torch.Tensor)):
        return False
    if isinstance(value, nn.Module):
        return id(value) in modules
    if isinstance(value, (list, tuple)):
        return bool(sum([_find_functions(item, modules, found) for item in value]))  # every one is looked into
    if isinstance(value, dict):
        return _find_functions(list(value.values()), modules, found)
    if isinstance(value, functools.partial):
        return _find_functions([value.func, value.args, value.keywords], modules, found)
    if not isinstance(value, FunctionType) or id(value) in found:
        return id(value) in found
    contents = []
    for cell in value.__closure__ or ():
        with contextlib.suppress(ValueError):  # it is empty yet
            contents.append(cell.cell_contents)
    if _find_functions(contents, modules, found):
        found[id(value)] = value
        return True
    return False
