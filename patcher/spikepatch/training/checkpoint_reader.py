"""Torch's distributed checkpoints, read without running anything: a checkpoint may come with a folder from elsewhere.

torch's own reader unpickles what a checkpoint says of itself, and the values that are no tensors, whatever that calls.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from spikepatch.source.local import opened
from spikepatch.source.private import IN_CHECKPOINTS


class _KnownClasses(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if (module, name) not in IN_CHECKPOINTS:
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):  # type: ignore[misc,name-defined]
    """Raises ``pickle.UnpicklingError`` where ``.metadata`` names anything but the classes that torch writes there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds."""
        with opened(Path(self.path) / ".metadata") as file:
            found = _KnownClasses(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(".metadata is no description of tensors")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class SafeLoadPlanner(dcp.DefaultLoadPlanner):  # type: ignore[misc,name-defined]
    """Raises ``pickle.UnpicklingError`` where a value that is no tensor, such as a learning rate, is more than data."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Puts a value in place."""
        begin = value.tell()
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:  # its message says how to run it all the same
            raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is more than plain values") from error
        value.seek(begin)
        super().load_bytes(read_item, value)
