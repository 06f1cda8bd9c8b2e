"""Run as a script by ``load_test.py``: loads folders as somebody does who does not have spikepatch, and says what it
got.

Requests come as lines of JSON on standard input, answers leave as lines of JSON; tensors lie in a file beside. It
imports what loading needs before the first request has come.

    {"folder", "auto_class", "trust", "whole": true, "inputs": file, "tensors": file, "texts": [...]}
    {"class", "problems", "tied", "dtypes", "shapes", "hashes", "ids", "forward": error}    or    {"error"}

Buffers and outputs are in the file ``tensors``, as ``buffer.NAME`` and ``output.NAME``. Without ``whole`` the model is
built from its config on the meta device, and there are no tensors.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Mapping
from typing import Any


def main() -> None:
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # transformers would ask there whether code is trusted
    os.dup2(nothing, 1)
    for absent in ("spikepatch", "spikepatch_transforms"):
        sys.modules[absent] = None  # type: ignore[assignment]
    import torch
    import transformers
    from transformers import AutoModelForCausalLM as AutoModelForCausalLM
    from transformers import AutoTokenizer as AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for line in requests:
        request = json.loads(line)
        try:
            with torch.no_grad():
                answer = loaded(request) if request["whole"] else built(request)
        except Exception as error:  # whatever loading raises
            answer = {"error": said(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def loaded(request: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    options = {"trust_remote_code": True} if request["trust"] else {}
    # What nobody writes to is NaN: in fresh memory, it might be right by chance.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        model, info = getattr(transformers, request["auto_class"]).from_pretrained(
            request["folder"], output_loading_info=True, **options
        )
    finally:
        torch.use_deterministic_algorithms(False)
    answer = described(model)
    answer["problems"] = {key: sorted(map(str, value)) for key, value in info.items() if value}
    answer["hashes"] = {name: digest(p) for name, p in model.named_parameters()}
    tensors = {f"buffer.{name}": b.detach().contiguous().clone() for name, b in model.named_buffers()}
    if request["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(request["folder"], **options)
        answer["ids"] = [tokenizer(text).input_ids for text in request["texts"]]
    if request["inputs"]:
        torch.manual_seed(0)
        try:
            result = model.float().eval()(**load_file(request["inputs"]))
        except Exception as error:  # whatever its own code raises; as the live model's may
            answer["forward"] = said(error)
        else:
            tensors |= {f"output.{name}": tensor for name, tensor in outputs(result).items()}
    save_file(tensors, request["tensors"])
    return answer


def built(request: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    import transformers

    options = {"trust_remote_code": True} if request["trust"] else {}
    config = transformers.AutoConfig.from_pretrained(request["folder"], **options)
    with torch.device("meta"):
        model = getattr(transformers, request["auto_class"]).from_config(config, **options)
    return described(model) | {"problems": {}}


def described(model: Any) -> dict[str, Any]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        "class": type(model).__name__,
        "tied": sorted(sorted(group) for group in names.values() if len(group) > 1),
        "dtypes": {name: str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters()},
        "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
    }


def digest(tensor: Any) -> int:
    """A check sum of the bytes."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def outputs(result: Any) -> dict[str, Any]:
    """The float tensors that a forward pass returns by name or place; no caches."""
    import torch

    items = result.items() if hasattr(result, "items") else enumerate(result if isinstance(result, tuple) else [result])
    floats = {str(key): value for key, value in items if isinstance(value, torch.Tensor) and value.is_floating_point()}
    return {key: value.detach().float().contiguous().clone() for key, value in floats.items()}


if __name__ == "__main__":
    main()
