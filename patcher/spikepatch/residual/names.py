"""What the module tree says: which layer a parameter belongs to, and under which names it goes."""

from __future__ import annotations

from torch import nn


def layers(model: nn.Module, parameters: list[str]) -> dict[str, int]:
    """Path of each block that holds one of ``parameters`` -> its layer.

    A block is an entry of the outermost list of modules on the parameter's path. Where one layer is spread over several
    lists (all attentions in one, all MLPs in another), equal indices are one layer.
    """
    blocks = list(dict.fromkeys(block for name in parameters if (block := _block(model, name)) is not None))
    indices = [block.rpartition(".")[2] for block in blocks]
    lists = {block.rpartition(".")[0] for block in blocks}
    if len(lists) > 1 and all(i.isdecimal() for i in indices):
        numbers = [int(i) for i in indices]
        if numbers == sorted(numbers):
            return dict(zip(blocks, numbers, strict=True))
    return {block: i for i, block in enumerate(blocks)}


def _block(model: nn.Module, parameter: str) -> str | None:
    parts = parameter.split(".")
    holders = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) - 1)]
    # A dict of modules often holds the whole model by name: it is a list of blocks only where no list is inside it.
    for kinds in ((nn.ModuleList, nn.Sequential), (nn.ModuleDict,)):
        for i, holder in enumerate(holders):
            if isinstance(holder, kinds):
                return ".".join(parts[: i + 1])
    return None


def own_name(model: nn.Module, parameter: str, module: str) -> str:
    """The name that a tied parameter has on the module that uses it, such as ``lm_head.weight``."""
    owner = dict(model.named_modules()).get(module)
    target = model.get_parameter(parameter)
    for name, value in owner.named_parameters(recurse=False) if owner is not None else ():
        if value is target:
            return f"{module}.{name}"
    return parameter
