"""Which expressions make a model's embeddings, and which assignments tie its parameters, seen while they run.

The construction of every ``nn.Embedding`` is recorded with the position of the call whose value it is, as far out as
the functions return it; so is every assignment of one parameter in the place of another, which is how heads are tied.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

#: Frames from a replacement, by way of ``replaced_here``, to what called the function that is replaced.
_CALLER = 2


@dataclass(frozen=True)
class Span:
    """Where an expression stands. Lines count from 1, columns from 0, in bytes of UTF-8, as Python's compiler has it.

    ``function`` is the name of the function that holds it.
    """

    file: str
    function: str
    line: int
    end_line: int
    end_column: int


class Watch:
    """Follows each ``nn.Embedding`` from its constructor outwards, as long as the functions return it.

    ``calls`` and ``replacements`` are keyed by identity; what they are about is kept alive.
    """

    def __init__(self) -> None:
        self.calls: dict[int, list[Span]] = {}
        self.replacements: dict[tuple[int, str], tuple[object, Span]] = {}
        self._alive: list[object] = []
        self._waiting: dict[FrameType, list[object]] = {}

    def constructed(self, module: object, frame: FrameType | None) -> None:
        """``module`` is an embedding whose ``nn.Embedding.__init__`` is called in ``frame``."""
        self._alive.append(module)
        self.calls[id(module)] = []
        while frame is not None and _is_method_of(frame, module):  # the __init__ of a subclass
            frame = frame.f_back
        self._value_in(module, frame)

    def replaced(self, module: object, name: str, value: object, frame: FrameType) -> None:
        """In ``frame`` the parameter ``module.name`` has been replaced by ``value``."""
        self._alive.append(module)
        self.replacements[id(module), name] = value, _span(frame)

    def _value_in(self, module: object, frame: FrameType | None) -> None:
        if frame is not None:
            self.calls[id(module)].append(_span(frame))
            self._waiting.setdefault(frame, []).append(module)
            sys.setprofile(self._profile)

    def _profile(self, frame: FrameType, event: str, value: object) -> None:
        if event == "return" and frame in self._waiting:
            modules = self._waiting.pop(frame)
            # What a generator yields goes to whatever drives it, which need not be the value of a call.
            if not frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
                for module in modules:
                    if value is module:
                        self._value_in(module, frame.f_back)
        if not self._waiting:
            sys.setprofile(None)


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Watch what the block builds, in this thread; torch's classes are as before at its end."""
    from torch import nn

    from spikepatch.source.private import own_parameters, replaced_here

    watch = Watch()

    def constructing(construct: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        watch.constructed(self, sys._getframe(_CALLER))
        construct(self, *args, **kwargs)

    def assigning(assign: Any, self: Any, name: str, value: Any) -> None:
        before = own_parameters(self).get(name)
        assign(self, name, value)
        if before is not None and isinstance(value, nn.Parameter) and value is not before:
            watch.replaced(self, name, value, sys._getframe(_CALLER))

    with replaced_here(nn.Embedding, "__init__", constructing), replaced_here(nn.Module, "__setattr__", assigning):
        try:
            yield watch
        finally:
            sys.setprofile(None)


def _is_method_of(frame: FrameType, module: object) -> bool:
    code = frame.f_code
    return code.co_argcount > 0 and frame.f_locals.get(code.co_varnames[0]) is module


def _span(frame: FrameType) -> Span:
    """The expression that ``frame`` is evaluating."""
    positions = frame.f_code.co_positions()
    line, end_line, _, end_column = next(itertools.islice(positions, frame.f_lasti // 2, None))
    return Span(
        os.path.realpath(frame.f_code.co_filename),
        frame.f_code.co_name,
        line or frame.f_lineno,
        end_line or frame.f_lineno,
        -1 if end_column is None else end_column,
    )
