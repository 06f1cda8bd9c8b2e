"""What is used of torch, transformers, accelerate and the hub that they do not promise to keep: all of it, and no more.

Whoever moves the floors or the newest version reads this file. Generated code, ``runtime/embedding.py``, stands alone
and has one such name of its own: ``_is_hf_initialized``.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: The only child of a module that torch.compile or a checkpoint wrapper has put around another one.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")

#: The children of what ``torch.compile`` makes of a module.
COMPILED = WRAPPED[:1]

#: A number, or a truth value, is taken out of a tensor.
TAKE_NUMBER = torch.ops.aten._local_scalar_dense.default

#: The operation behind ``Tensor.to`` that makes a copy.
TO_COPY = torch.ops.aten._to_copy.default

#: How the names of torch's functions begin that raise where a condition does not hold.
CHECKING = "_check"

#: Methods by which code sets the values of a module and of those below it, if they need no argument.
INITIALISERS = (
    "reset_parameters", "_reset_parameters", "init_weights", "_init_weights", "initialize_weights",
    "init_parameters", "initialize_parameters",
)  # fmt: skip

#: Keys of config.json that may name a repository of compiled kernels to download and import.
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")

#: In it calls run for real, with memory.
without_fakes = unset_fake_temporarily
#: The same, and nothing is recorded.
without_modes = _disable_current_modes


# torch: modules and tensors


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own, not its children's; may be written to. Empty before ``nn.Module.__init__`` has run."""
    found: dict[str, nn.Parameter | None] = module.__dict__.get("_parameters", {})
    return found


def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """As ``own_parameters``."""
    return module._buffers


def own_children(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """One that stands at two names is here twice, unlike in ``named_children``."""
    return module._modules


def memory(tensor: torch.Tensor) -> int:
    """What a tensor shares with its views, through which it may be written; on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


def is_batched(tensor: torch.Tensor) -> bool:
    """It stands for one of many, inside ``torch.vmap``."""
    return bool(torch._C._functorch.is_batchedtensor(tensor))


def version(tensor: torch.Tensor) -> int:
    """Counted up by every write in place."""
    return int(tensor._version)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """DeepSpeed has emptied it: each process holds a part, beside it."""
    return hasattr(parameter, "ds_shape") and parameter.numel() == 0 and math.prod(parameter.ds_shape) > 0


def is_out_of_memory(error: BaseException) -> bool:
    """Of the machine or the accelerator. torch's CPU allocator raises a RuntimeError, known by its words alone."""
    words = ("allocate memory", "out of memory", "not enough memory", "ALLOC_FAILED")
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or (isinstance(error, RuntimeError) and any(said in str(error) for said in words))


#: (module, name) of all that torch's distributed checkpoints name in their ``.metadata``, beside dtypes.
IN_CHECKPOINTS = frozenset(
    {
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
                "ChunkStorageMetadata", "MetadataIndex",
                "StorageMeta", "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("pathlib", "PosixPath"),
    }
)  # fmt: skip


def schema(operation: object) -> Any:
    """Names, defaults and mutability of an ATen operation's arguments; None of what is none."""
    return getattr(operation, "_schema", None)


def truncated_normals_here(draw: Callable[..., torch.Tensor]) -> contextlib.AbstractContextManager[None]:
    """What is behind ``nn.init.trunc_normal_`` is ``draw(original, tensor, mean, std, low, high, generator)``.

    torch draws again and again until all values are within the bounds, which without values it cannot see.
    """
    return replaced_here(nn.init, "_no_grad_trunc_normal_", draw)


def fsdp_handles(module: Any) -> Iterator[tuple[nn.Module, str, object]]:
    """(module, name of a parameter, FSDP's own handle of it) below one ``fully_shard``; tied ones have one handle.

    After ``to_empty`` nothing public tells whether FSDP gathers two names as one.
    """
    state = vars(module._get_fsdp_state())
    groups = state.get("_fsdp_param_groups", [state.get("_fsdp_param_group")])
    for parameter in (p for group in groups if group is not None for p in group.fsdp_params):
        info = parameter._module_info
        yield info.module, info.param_name, parameter
        for shared, name in zip(info.shared_modules, info.shared_param_names, strict=True):
            yield shared, name, parameter


# transformers: models and configs


def promised_ties(model: nn.Module) -> dict[str, str]:
    """Names that are to be one tensor with another, by the config and the class of a transformers model."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def is_transformers_model(model: object) -> bool:
    """It can be built again from its config."""
    return hasattr(model, "_from_config")


def from_config(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """As ``AutoModel.from_config``, of a class that is known. ``config`` becomes the model's own."""
    model: PreTrainedModel = model_class._from_config(config)
    return model


def classes_for(auto_class: object, config_class: type) -> tuple[type, ...]:
    """What ``auto_class``, such as ``transformers.AutoModel``, has for a config; the preferred class first."""
    mapping = getattr(auto_class, "_model_mapping", None)
    found = () if mapping is None else mapping.get(config_class, ())
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def registered_auto_class(model_class: Any) -> str | None:
    """The auto class that code from a repository was registered for."""
    return None if model_class._auto_class is None else str(model_class._auto_class)


def initialiser_of(module: nn.Module) -> Callable[[nn.Module], object] | None:
    """transformers' hook by which a model initialises each of its modules."""
    found = getattr(module, "_init_weights", None)
    return found if callable(found) else None


def names_not_saved(model: nn.Module) -> set[str]:
    """What ``save_pretrained`` leaves out."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def forget_tied_lists(model: nn.Module) -> None:
    """Code from before transformers 5 lists its tied weights; such a model is built untied, and cannot be saved."""
    for module in model.modules():
        if isinstance(getattr(module, "_tied_weights_keys", None), (list, tuple)):
            module._tied_weights_keys = {}  # type: ignore[assignment]


def mark_initialised(holder: Any) -> None:
    """transformers will not initialise this tensor, or this module, again."""
    holder._is_hf_initialized = True


def unmark_initialised(module: nn.Module) -> None:
    """Undo ``mark_initialised``."""
    module.__dict__.pop("_is_hf_initialized", None)


def as_parsed(data: dict[str, Any]) -> dict[str, Any]:
    """What config.json holds, as transformers reads it: infinite numbers and NaN are objects there."""
    from transformers import PreTrainedConfig

    decode = getattr(PreTrainedConfig, "_decode_special_floats", dict)  # older versions have no such objects
    found: dict[str, Any] = decode(data)
    return found


def name_config(config: PreTrainedConfig, name: str) -> None:
    """Set what the model is called in transformers' messages."""
    config._name_or_path = name


def forget_weights(config: PreTrainedConfig) -> None:
    """Drop the name of the file of weights, which transformers would look for in what is written."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        if part is not None:
            vars(part).pop("transformers_weights", None)


def decays(parameter: nn.Parameter) -> bool:
    """False where the model's own code asks for no weight decay, by the attribute that state-space models set."""
    return not getattr(parameter, "_no_weight_decay", False)


# accelerate and the hub


def forget_accelerators() -> None:
    """accelerate keeps the first accelerator's settings for the whole process, until this is called."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def is_repository(name: object) -> bool:
    """``name`` is of the form of a hub id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)  # type: ignore[arg-type]  # it checks the type too
    except HFValidationError:
        return False
    return True


# replacing a function of a library


class _Switch:
    """One function of a library that is replaced while ``users`` is above 0, and by whom in this thread."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.users = 0
        self.here = threading.local()


_switches: dict[tuple[Any, str], _Switch] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def replaced_here(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """``owner.name`` is ``replacement(original, *args)`` while the block runs, in this thread only.

    Other threads go on to call the original, through one more function. Blocks may be nested, and run in several
    threads at once; behind the last one the original is back.
    """
    key = owner, name
    with _lock:
        switch = _switches.setdefault(key, _Switch(getattr(owner, name)))
        switch.users += 1
        if switch.users == 1:
            setattr(owner, name, _dispatcher(switch))
    stack: list[Callable[..., Any]] = switch.here.__dict__.setdefault("stack", [])
    stack.append(functools.partial(replacement, stack[-1] if stack else switch.original))
    try:
        yield
    finally:
        stack.pop()
        with _lock:
            switch.users -= 1
            if not switch.users:
                setattr(owner, name, switch.original)
                del _switches[key]


def _dispatcher(switch: _Switch) -> Callable[..., Any]:
    @functools.wraps(switch.original)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        stack = getattr(switch.here, "stack", None)
        return stack[-1](*args, **kwargs) if stack else switch.original(*args, **kwargs)

    return dispatch
