"""A live model, whole or sharded, as the folder that ``from_pretrained`` loads."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from spikepatch.apply.disk.manifest import MANIFEST, file_hash, manifest, model_card
from spikepatch.apply.disk.publish import check_target, publishing, unwritable
from spikepatch.apply.disk.write import write_text
from spikepatch.errors import Refused
from spikepatch.plans.plan import Plan
from spikepatch.quiet import quiet
from spikepatch.source.classes import is_remote, original_of
from spikepatch.source.local import target_path
from spikepatch.source.meta import unwrapped
from spikepatch.source.private import registered_auto_class
from spikepatch.source.tied import first_names
from spikepatch.source.tokenizer import has_tokenizer, refit


def save(
    model: nn.Module,
    out: str | os.PathLike[str],
    *,
    files: Mapping[str, Path] | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Path:
    """``model.save_pretrained(out)``, with the manifest and a model card, in a folder that appears whole.

    A sharded model (FSDP2, DTensors) is gathered: every rank calls this, and the first one writes.

    Args:
        model: a transformers model that ``patch`` has patched.
        out: absent or empty, or with ``overwrite`` a folder to replace.
        files: name in the folder -> what is copied there, such as a tokenizer's files.
        tokenizer: the one that is loaded from those files where they come from. AutoTokenizer chooses its class by the
            model's type; where it would choose another one for ``out``, the files name this one's.
        overwrite: replace a model that is there.

    Returns:
        ``out``, which ``from_pretrained`` loads patched.

    Raises:
        Refused: the model was not patched, or is no transformers model.
        BadTarget: ``out`` cannot be used, or the disk is full.
    """
    model = unwrapped(model)
    plan: Plan | None = getattr(model, "_spikepatch_plan", None)
    write = getattr(model, "save_pretrained", None)
    if plan is None or write is None:
        raise Refused(
            what="only a patched transformers model is saved here",
            where=type(model).__name__,
            why="there is no plan to record" if plan is None else "it has no save_pretrained",
            remedy="call spikepatch.patch first"
            if plan is None
            else "save its state_dict, as you would without a patch",
        )
    folder = target_path(out)
    check_target(folder, None, overwrite=overwrite)
    storage = "code" if plan.structural else "plain"
    with pretrained(model, folder, files=files, tokenizer=tokenizer, overwrite=overwrite) as scratch:
        if scratch is not None:
            trust = plan.structural or is_remote(type(model))
            found = has_tokenizer(scratch.iterdir())
            card = model_card(plan, trust=trust, auto_class=_auto_class(model), tokenizer=found)
            write_text(scratch / "README.md", card)
            names = sorted(path.relative_to(scratch).as_posix() for path in scratch.rglob("*") if path.is_file())
            hashes = {name: file_hash(scratch / name) for name in names}
            text = manifest(plan, storage, {"kind": "live"}, "spikepatch.save(model, OUT)", hashes)
            write_text(scratch / MANIFEST, text)
    return folder


@contextlib.contextmanager
def pretrained(
    model: Any, out: Path, *, files: Mapping[str, Path] | None = None, tokenizer: Any = None, overwrite: bool = False
) -> Iterator[Path | None]:
    """What ``save_pretrained`` writes, and ``files``, in a folder that becomes ``out`` when the block ends well.

    Of a sharded model every rank calls this; all but the first are given None, and go on when ``out`` is there.
    """
    state = _gathered(model) if sharded(model) else None
    if state is None or dist.get_rank() == 0:
        try:
            with publishing(out, overwrite=overwrite) as scratch, quiet():
                model.save_pretrained(scratch, state_dict=state)
                for name, file in (files or {}).items():
                    (scratch / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, scratch / name)
                if tokenizer is not None:
                    refit(tokenizer, scratch)
                yield scratch
        except (OSError, SafetensorError) as error:  # of a full disk, safetensors has an error of its own
            raise unwritable(out, error) from error
    else:
        yield None
    if state is not None:
        dist.barrier()


def _gathered(model: nn.Module) -> dict[str, Any]:
    """All tensors whole, on the CPU of the first rank; tied ones are one again, which gathering takes apart."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    for name, owner in first_names(model).items():
        if name in state and owner in state:
            state[name] = state[owner]
    return state


def sharded(model: nn.Module) -> bool:
    """Some of its parameters are DTensors."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _auto_class(model: Any) -> str:
    """Name of the class of transformers that loads what ``model`` saves."""
    kind: Any = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))  # fully_shard derives one
    if (registered := registered_auto_class(kind)) is not None:
        return registered
    try:
        return original_of(kind, type(model.config)).auto_class
    except Refused:
        return "AutoModel"
