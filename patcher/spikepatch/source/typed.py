"""Frozen data and JSON: ``parsed`` is the inverse of ``dataclasses.asdict`` and ``json.dumps``."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

AnyData = TypeVar("AnyData")
_Reader = Callable[[Any], Any]


def finite(value: Any) -> Any:
    """``value``, for strict JSON: with None for every number that is not finite, and lists for tuples."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {name: finite(inner) for name, inner in value.items()}
        case list() | tuple():
            return [finite(inner) for inner in value]
    return value


def parsed(kind: type[AnyData], data: Any) -> AnyData:
    """An instance of the dataclass ``kind`` from the object that JSON makes of it.

    By the annotations of its fields: a list becomes a tuple and an object a dataclass, also inside of each other, of
    ``X | None`` and of mappings. All else stays as it is.

    Raises:
        TypeError: a field is missing or unknown, or a value is of another shape than the annotation says.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"{kind.__name__} is not read from a {type(data).__name__}")
    readers: dict[str, _Reader] = _readers(kind)  # type: ignore[arg-type]  # mypy: a type is hashable
    return kind(**{name: readers[name](value) if name in readers else value for name, value in data.items()})


@functools.cache
def _readers(kind: type) -> dict[str, _Reader]:
    """Of the fields whose values are not as JSON has them."""
    return {name: reader for name, hint in get_type_hints(kind).items() if (reader := _reader(hint)) is not None}


def _reader(hint: Any) -> _Reader | None:
    """What makes a ``hint`` of a value of JSON; None where it is one."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return functools.partial(parsed, hint)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple:
        return functools.partial(_tuple, [_reader(one) for one in inner if one is not Ellipsis], inner[-1] is Ellipsis)
    if origin in (Union, types.UnionType):
        readers = [reader for one in inner if (reader := _reader(one)) is not None]
        return functools.partial(_optional, readers) if readers else None
    if isinstance(origin, type) and issubclass(origin, Mapping):
        reader = _reader(inner[1])
        return functools.partial(_mapping, reader) if reader is not None else None
    return None


def _tuple(readers: list[_Reader | None], any_length: bool, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    if not any_length and len(readers) != len(value):
        raise TypeError(f"{value!r} has {len(value)} entries, not {len(readers)}")
    each = readers * len(value) if any_length else readers
    return tuple(one if reader is None else reader(one) for reader, one in zip(each, value, strict=True))


def _optional(readers: list[_Reader], value: Any) -> Any:
    if value is None:
        return None
    (reader,) = readers  # of several classes it would be a guess
    return reader(value)


def _mapping(reader: _Reader, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r} is no object")
    return {name: reader(one) for name, one in value.items()}
