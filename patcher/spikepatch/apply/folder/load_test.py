"""Does what was written load, by the line that is printed, as the model that was meant? Tried before it is published.

A fresh process without spikepatch loads the folder. Its class, the names of tied tensors, all buffers, the bytes of all
parameters, the ids of a text and one forward pass are compared with the live model: the original class, patched, its
buffers as its constructor makes them, its parameters read from the folder by our own reading.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spikepatch.apply.folder.fresh_process import described, digest, outputs
from spikepatch.apply.folder.loader import Loader
from spikepatch.apply.folder.small_twin import UNLIKE
from spikepatch.errors import Refused, on_one_line
from spikepatch.quiet import quiet
from spikepatch.residual.trace import full_example
from spikepatch.source.checkpoint import read_checkpoint, read_tensor
from spikepatch.source.formats import fits_in_memory, some
from spikepatch.source.layout import layout
from spikepatch.source.meta import skeleton
from spikepatch.source.private import own_buffers, own_parameters
from spikepatch.source.tied import first_names
from spikepatch.source.tokenizer import PROBE, SAMPLE, load_tokenizer

#: Differences of summation in float32, relative to the largest output.
_ROUNDING = 2**10 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Wanted:
    """What a folder is to load as.

    Attributes:
        model: patched, on meta, its buffers real.
        class_name: of the class that is loaded.
        auto_class, trust: the line that is printed.
        unsound: the weights may be NaN or infinite, as they are in the source.
    """

    model: nn.Module
    class_name: str
    auto_class: str
    trust: bool
    unsound: bool = False


def fits(model: nn.Module) -> bool:
    """Two copies in float32, and one as it is stored, take less than half of this machine's memory."""
    needed = 12 * sum(parameter.numel() for parameter in model.parameters())
    return fits_in_memory(needed)


Tried = Literal["passed", "passed, with numbers at a small size", "passed without numbers", "left out"]


def outcome(process: Loader | None, wanted: Wanted, small: Callable[[], bool] = lambda: False) -> Tried:
    """What the manifest says of the test, once it has not refused.

    Args:
        small: tries a model that is too large at a small size; see ``small_twin.py``.
    """
    if process is None:
        return "left out"
    if fits(wanted.model):
        return "passed"
    return "passed, with numbers at a small size" if small() else "passed without numbers"


def check_loads(process: Loader, folder: Path, wanted: Wanted, *, tokenizer: bool, out: Path) -> None:
    """Load ``folder`` in the fresh process, and compare; of a model that does not fit, the structure alone.

    Args:
        tokenizer: the folder has one, whose ids are compared with those that are loaded here.
        out: what the folder will be called, for the error.

    Raises:
        Refused: every difference is named.
    """
    found = [*differences(process, folder, wanted, tokenizer=tokenizer)]
    if found:
        raise Refused(
            what=UNLIKE,
            where=str(out),
            why=some(found, 6),
            remedy="please report it; --no-load-test (load_test=False) writes it all the same",
        )


def differences(process: Loader, folder: Path, wanted: Wanted, *, tokenizer: bool) -> Iterator[str]:
    """What the fresh process gets that is not what was wanted, one sentence each."""
    whole = fits(wanted.model)
    inputs = example_inputs(wanted.model) if whole else {}
    files = {name: str(process.scratch / f"{name}.safetensors") for name in ("inputs", "tensors")}
    if inputs:
        save_file(inputs, files["inputs"])
    answer = process.ask(
        {
            "folder": str(folder),
            "auto_class": wanted.auto_class,
            "trust": wanted.trust,
            "whole": whole,
            "inputs": files["inputs"] if inputs else None,
            "tensors": files["tensors"],
            "texts": [PROBE, SAMPLE] if tokenizer else None,
        }
    )
    if "error" in answer:
        yield f"it does not load: {answer['error']}"
        return
    yield from _structure(answer, wanted)
    if not whole:
        return
    live = read_into(wanted.model, folder, answer["dtypes"])
    yield from _parameters(answer["hashes"], live)
    tensors = load_file(files["tensors"])
    yield from _buffers(
        {n.removeprefix("buffer."): t for n, t in tensors.items() if n.startswith("buffer.")}, live, wanted.model
    )
    if tokenizer:
        yield from _tokens(answer["ids"], folder, wanted.trust)
    if inputs:
        given = {n.removeprefix("output."): t for n, t in tensors.items() if n.startswith("output.")}
        yield from _outputs(given, answer.get("forward"), live, inputs, wanted.unsound)


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the forward pass is run on; empty where it is not known."""
    try:
        example = full_example(model)
    except Exception:  # whatever a forward pass raises
        return {}
    return {name: t.float().contiguous() if t.is_floating_point() else t.contiguous() for name, t in example.items()}


def read_into(model: nn.Module, folder: Path, dtypes: Mapping[str, str]) -> nn.Module:
    """A copy of ``model`` with memory, its parameters and saved buffers read from ``folder``, in ``dtypes``."""
    twin = skeleton(model)
    targets = layout(twin)
    live = copy.deepcopy(model)
    real = {
        name: nn.Parameter(torch.zeros(p.shape, dtype=getattr(torch, dtypes.get(name, "float32"))), requires_grad=False)
        for name, p in live.named_parameters()
    }
    for name, first in first_names(live).items():
        owner, _, own = name.rpartition(".")
        own_parameters(live.get_submodule(owner))[own] = real[first]
    for name, buffer in list(live.named_buffers()):
        owner, _, own = name.rpartition(".")
        own_buffers(live.get_submodule(owner))[own] = torch.zeros_like(buffer, device="cpu").copy_(
            buffer if not buffer.is_meta else torch.zeros(())
        )
    tensors = dict(live.named_parameters(remove_duplicate=False)) | dict(live.named_buffers())
    entries = read_checkpoint(folder).tensors
    with torch.no_grad():
        for target in targets:
            target.view(tensors[target.owner].data).copy_(read_tensor(entries[target.name]))
    return live.eval()


def _structure(answer: Mapping[str, Any], wanted: Wanted) -> Iterator[str]:
    if answer["class"] != wanted.class_name:
        yield f"its class is {answer['class']}, not {wanted.class_name}"
    for kind, found in answer["problems"].items():
        yield f"{kind.replace('_', ' ')}: {some(found)}"
    here = described(wanted.model)
    if answer["tied"] != here["tied"]:
        yield f"tied are {_groups(answer['tied'])}, and not {_groups(here['tied'])}"
    shapes = here["shapes"]
    odd = sorted(n for n in shapes.keys() | answer["shapes"].keys() if shapes.get(n) != answer["shapes"].get(n))
    if odd and answer["tied"] == here["tied"]:
        yield f"parameters are missing, new or of another shape: {some(odd)}"


def _groups(tied: Sequence[Sequence[str]]) -> str:
    return "; ".join(" and ".join(group) for group in tied) or "none"


def _parameters(hashes: Mapping[str, int], live: nn.Module) -> Iterator[str]:
    other = [name for name, p in live.named_parameters() if name in hashes and digest(p) != hashes[name]]
    if other:
        yield f"parameters have other values: {some(other)}"


def _buffers(given: Mapping[str, torch.Tensor], live: nn.Module, model: nn.Module) -> Iterator[str]:
    wanted = dict(live.named_buffers())
    unknown = {name for name, buffer in model.named_buffers() if buffer.is_meta} - set(live.state_dict())
    odd = sorted(wanted.keys() ^ given.keys())
    if odd:
        yield f"buffers are missing or new: {some(odd)}"
    other = [
        name
        for name, buffer in wanted.items()
        if name in given and name not in unknown and not _same(given[name], buffer)
    ]
    if other:
        yield (
            f"buffers have other values: {some(other)}; where only a constructor fills them, as in code from before"
            " transformers 5, nobody does when it loads, but for spikepatch's own classes (--storage code)"
        )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not (one.is_floating_point() and other.is_floating_point()):
        return torch.equal(one, other.to(one.dtype))
    eps = max(torch.finfo(one.dtype).eps, torch.finfo(other.dtype).eps)
    return torch.allclose(one.double(), other.double(), rtol=8 * eps, atol=0.0, equal_nan=True)


def _tokens(given: Iterable[list[int]], folder: Path, trust: bool) -> Iterator[str]:
    """``refit`` has compared the folder's tokenizer with the source's; this is what a fresh process gets."""
    here = load_tokenizer(folder, trusted=trust)
    if isinstance(here, str) or [here(text).input_ids for text in (PROBE, SAMPLE)] != list(given):
        yield "its tokenizer gives other ids than here"


@torch.no_grad()
def _outputs(
    given: Mapping[str, torch.Tensor],
    raised: str | None,
    live: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    unsound: bool,
) -> Iterator[str]:
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            wanted = outputs(live.float()(**inputs))
    except Exception as error:  # whatever its forward pass raises
        if raised is None:
            yield f"the live model does not run ({on_one_line(error, 200)}), the loaded one does"
        return
    if raised is not None:
        yield f"its forward pass raises {raised}"
        return
    for name, tensor in wanted.items():
        if name not in given or given[name].shape != tensor.shape:
            yield f"its forward pass does not return {name} of the same shape"
        elif not unsound and not torch.isfinite(tensor).all():
            yield f"the forward pass of the live model gives NaN or infinite {name}"
        elif not unsound and not torch.isfinite(given[name]).all():
            yield f"its forward pass gives NaN or infinite {name}"
        elif torch.isfinite(tensor).all() and tensor.numel():
            apart = float((given[name] - tensor).abs().max())
            if not apart <= _ROUNDING * max(float(tensor.abs().max()), torch.finfo(torch.float32).tiny):
                yield f"its {name} differ by up to {apart:.3g}, of {float(tensor.abs().max()):.3g}"
