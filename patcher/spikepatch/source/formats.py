"""What a file or a folder of weights is, told from names and first bytes: formats that are never opened, and why."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable
from typing import Any

from spikepatch.errors import BadSource

#: What float weights are stored in, as torch names it.
STORED = ("float32", "bfloat16", "float16", "float64")

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

DOWNLOAD_AGAIN = "download the file again, or save the model again with save_pretrained"
CONVERT = "load the model with transformers and save it with save_pretrained, which writes safetensors"

#: Pattern of top-level file names -> what they hold. Weights, all of them, that are never opened.
_FOREIGN_WEIGHTS = {
    "pytorch_model*.bin": "PyTorch pickles",
    "consolidated*.pth": "PyTorch pickles",
    "*.ckpt*": "a training checkpoint in pickles",
    "*.distcp": "a distributed (DCP) checkpoint",
    "*.gguf": "GGUF",
    "tf_model*.h5": "TensorFlow weights",
    "flax_model*.msgpack": "Flax weights",
    "*.onnx": "an ONNX graph",
    "adapter_model.*": "an adapter without its base model",
    "*.safetensors": "safetensors under a name that transformers does not load",
}

LFS_POINTER = b"version https://git-lfs"
PICKLES = (b"\x80", b"PK\x03\x04")

#: First bytes -> what the file is, and what to do.
_MAGIC = {
    LFS_POINTER: ("a git-lfs pointer, not the file itself", "run `git lfs pull` in the folder"),
    **dict.fromkeys(PICKLES, ("a pickle", CONVERT)),
    b"GGUF": ("a GGUF file", "use the safetensors original of the model"),
    b"<": ("an HTML or XML page, probably an error page that was saved", DOWNLOAD_AGAIN),
}


def recognise(head: bytes) -> tuple[str, str] | None:
    """What a file that is not what its name says is, from its first bytes, and the remedy."""
    return next((meaning for magic, meaning in _MAGIC.items() if head.startswith(magic)), None)


def foreign_weights(names: Iterable[str]) -> dict[str, str]:
    """The weights among top-level file ``names`` that are never opened: name -> what it is."""
    found = {}
    for name in sorted(set(names) - {SINGLE_FILE, INDEX_FILE}):
        kinds = (kind for pattern, kind in _FOREIGN_WEIGHTS.items() if fnmatch.fnmatchcase(name, pattern))
        if (kind := next(kinds, None)) is not None:
            found[name] = kind
    return found


def check_names(names: Iterable[str], where: str) -> None:
    """Can weights be read from a folder or repository with these top-level file ``names``?

    Raises:
        BadSource: no safetensors that transformers would load, or two sets of them.
    """
    present = set(names)
    if {SINGLE_FILE, INDEX_FILE} <= present:
        raise BadSource(
            f"both {SINGLE_FILE} and {INDEX_FILE} are present",
            where=where,
            why="they may hold different weights, and nothing says which are meant",
            remedy="delete the one that is out of date",
        )
    if not {SINGLE_FILE, INDEX_FILE} & present:
        found = [f"{name} ({kind})" for name, kind in foreign_weights(present).items()]
        raise BadSource(
            f"no weights in {SINGLE_FILE} or {INDEX_FILE}",
            where=where,
            why=f"found {some(found) or 'no weights at all'}; only safetensors are read, since opening a pickle "
            "can run code",
            remedy=f"{CONVERT}, or choose a --revision that has them; a fresh model needs no "
            "weights: --reinit all of convert, and for check a folder with the config.json alone",
        )


def parse_json(data: bytes) -> Any:
    """JSON, stricter than ``json.loads``: UTF-8, and duplicate keys are a ValueError, as is nesting without end."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise ValueError("a key occurs twice in one object")
        return result

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def fits_in_memory(needed: float) -> bool:
    """So many bytes are at most half of this machine's memory."""
    return needed <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


def size(count: int) -> str:
    """``count`` bytes as people read them, to three digits: 652 MB."""
    if count < 1000:
        return f"{count} bytes"
    power = next((power for power in (1, 2, 3) if round(count / 1000**power) < 1000), 4)
    number = count / 1000**power
    digits = 2 if round(number, 2) < 10 else 1 if round(number, 1) < 100 else 0
    return f"{number:.{digits}f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def some(items: Iterable[str], limit: int = 3) -> str:
    """The first few of ``items`` and how many more there are."""
    listed = list(items)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
