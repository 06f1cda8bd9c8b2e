"""Numbers that a forward pass takes out of its tensors: Python may choose its way by them, which no graph shows.

Such a number is handed over as a told one: an int or float that says when it is compared, and whose sums and products
are told numbers too. What Python itself makes plain (``int(tensor)``, ``tensor.numpy()``) is noted.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch

#: How questions about values are answered: as the example has it, and where it says nothing, with True; the first one
#: of each line and module the other way; all of them; or as another example has it, that differs in its values, or in
#: which of its values are zero.
Mode = Literal["example", "first", "all", "values", "zeros"]

#: What a number is: computed from weights or embedded tokens, of which a trace has no values; from what the inputs
#: hold; or a length of the inputs.
TakenFrom = Literal["data", "control", "length"]

#: Lengths below the first are those of decoding; beyond the last nothing is tried.
SHORTEST, LONGEST = 2, 4096


@dataclass
class Asked:
    """What Python asked of the values of one pass. The keys are lines of code, as ``file.py, line 3``.

    Attributes:
        mode: how questions are answered.
        branches: it was asked whether something holds of values that the inputs decide.
        values: numbers were taken out of what the inputs hold, or tensors made whose shape it decides.
        plain: of these, the ones that Python made plain -> the inputs' numbers, from 0.
        unknown: a number was taken out of data, and went where its use cannot be followed.
        lengths: of inputs for which a comparison of their length has the other result.
        length: of the inputs of this pass.
    """

    mode: Mode = "example"
    branches: dict[str, None] = field(default_factory=dict)
    values: dict[str, None] = field(default_factory=dict)
    plain: dict[str, frozenset[int]] = field(default_factory=dict)
    unknown: dict[str, None] = field(default_factory=dict)
    lengths: set[int] = field(default_factory=set)
    length: int = 0
    module: str = ""
    _turned: set[tuple[str, str]] = field(default_factory=set)

    def answer(self, holds: bool) -> bool:
        """The answer to a question, which is noted."""
        line = asking_line()
        self.branches[line] = None
        first = (line, self.module) not in self._turned
        self._turned.add((line, self.module))
        return holds != (self.mode == "all" or (self.mode == "first" and first))

    def take(self, origin: TakenFrom, inputs: frozenset[int] = frozenset()) -> None:
        """A number of such an origin, computed from these inputs, goes where it cannot be followed."""
        line = asking_line()
        if origin == "data":
            self.unknown[line] = None
        elif origin == "control":
            self.values[line] = None
            self.plain[line] = self.plain.get(line, frozenset()) | inputs


class Told:
    """A told number's origin, and who is to be told."""

    asked: Asked
    origin: TakenFrom
    inputs: frozenset[int]

    def compared(self, holds: bool, other: object, *, equal: bool) -> bool:
        """The answer to a comparison with ``other``; ``equal``: it asked whether both are the same."""
        if self.origin != "length":
            return self.asked.answer(holds)
        if isinstance(other, (int, float)) and not isinstance(other, Told):
            value, length = float(self), self.asked.length  # type: ignore[arg-type]
            wanted = other if equal else other + 1 if other >= value else other - 1
            beside, scaled = length + wanted - value, length * wanted / value if value else 0
            self.asked.lengths.update(math.ceil(n) for n in (beside, scaled) if SHORTEST <= n <= LONGEST)
        return holds


class ToldInt(int, Told):
    """An int that says when it is compared."""


class ToldFloat(float, Told):
    """A float that says when it is compared."""


def told(number: Any, asked: Asked, origin: TakenFrom, inputs: frozenset[int] = frozenset()) -> Any:
    """``number`` as a told one, computed from these inputs; anything but a plain int or float as it is."""
    if type(number) not in (int, float):
        return number
    result = ToldInt(number) if isinstance(number, int) else ToldFloat(number)
    result.asked, result.origin, result.inputs = asked, origin, inputs
    return result


def _plainly(base: type, name: str, number: Any, *others: Any) -> Any:
    """The result that a plain number has; an int with a float is a float's."""
    if base is int and others and isinstance(others[0], float):
        number, base = base.__float__(number), float
    return getattr(base, name)(number, *others)


def _comparing(base: type, name: str) -> Callable[[Any, Any], Any]:
    def compare(self: Any, other: object) -> Any:
        holds = _plainly(base, name, self, other)
        equal = name in {"__eq__", "__ne__"}
        return holds if holds is NotImplemented else self.compared(holds, other, equal=equal)

    return compare


def _computing(base: type, name: str) -> Callable[..., Any]:
    def compute(self: Any, *others: Any) -> Any:
        result = _plainly(base, name, self, *others)
        parts = result if isinstance(result, tuple) else (result,)
        counted = [told(part, self.asked, self.origin, self.inputs) for part in parts]
        return tuple(counted) if isinstance(result, tuple) else counted[0]

    return compute


def _taking(base: type, name: str) -> Callable[[Any], Any]:
    plain = getattr(base, name)

    def take(self: Any) -> Any:
        self.asked.take(self.origin, self.inputs)
        return plain(self)

    return take


def _asking(self: Any) -> bool:
    holds: bool = self.compared(super(type(self), self).__ne__(0), 0, equal=True)
    return holds


_SUMS = (
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod divmod rdivmod pow rpow neg pos abs round"
    " ceil floor trunc"
).split()
for _kind, _base in ((ToldInt, int), (ToldFloat, float)):
    for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
        setattr(_kind, _name, _comparing(_base, _name))
    for _name in (f"__{each}__" for each in _SUMS):
        setattr(_kind, _name, _computing(_base, _name))
    for _name in ("__int__", "__float__", "__hash__"):
        setattr(_kind, _name, _taking(_base, _name))
    for _name in ("__bool__",):
        setattr(_kind, _name, _asking)


#: Where this package and torch are.
_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def asking_line() -> str:
    """Where the innermost code stands that is no part of torch or of this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}" if frame is not None else "unknown code"


def is_ours(file: str) -> bool:
    """The file is torch's or this package's, and no part of a model."""
    return file.startswith(_OURS)
