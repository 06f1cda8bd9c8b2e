"""Whatever somebody may have done to a file: one value of it of another kind, missing or renamed; bytes lost or new."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

#: Values of all types of JSON, and what a parser may stumble over.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 40, 0.5, -0.0, 1e300, -1e300, 5e-324, float("inf"), float("nan"), 2**31, 2**53 + 1,
    2**63 - 1, 2**63, 2**64, 10**400, -(10**400), "", " ", "a", "0", "1e3", "nan", "F32", "BF16", "F8_E4M3", "pt", "..",
    ".", "../x", "/etc/passwd", "a\0b", "x\n'\"", "\ud800", "\u202e", "\x1b[2J", "x" * 300, "x/" * 300, "{{x}}", "%s%n",
    [], [[]], [None], ["a", 1], [1, 2, 3], [0.5], list(range(40)), {}, {"a": {}}, {"a": None}, {"": 1}, {"a": [1]},
)  # fmt: skip

#: In place of a whole file, or before or behind what is in it.
BYTES = (
    b"", b" ", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[", b"]", b"{", b"}", b'"', b"1" * 5000, b"[" * 60_000,
    b'{"a":' * 60_000, b"NaN", b"null", b"0", b'"a"', b"[]", b"{}", b"\x80\x04K\x01.", b"version https://git-lfs",
    b"\r", b"\n", b"\xc3\x28", b"<html>", b"PK\x03\x04",
)  # fmt: skip


def changed(chance: random.Random, value: Any) -> Any:
    """A copy of what JSON is, one or two parts of it replaced, removed, renamed or doubled, at any depth."""
    whole = [copy.deepcopy(value)]
    for _ in range(chance.choice((1, 1, 2))):
        places = list(_places(whole))
        parent, key = chance.choice(places)
        how = chance.random()
        if parent is whole or how < 0.6:
            parent[key] = copy.deepcopy(chance.choice(ODD))
        elif how < 0.75:
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(chance.randrange(len(parent)), copy.deepcopy(parent[key]))
        elif how < 0.85:
            parent[chance.choice((*parent, "", "a", "x" * 300, "../x", "a\0b"))] = parent.pop(key)
        else:
            other, at = chance.choice(places)  # the right value in the wrong place
            parent[key] = copy.deepcopy(other[at])
    return whole[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every part of ``value``, as where it is in which part."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def changed_json(chance: random.Random, content: bytes) -> bytes:
    """A JSON file with parts of it changed, or its bytes."""
    if chance.random() < 0.2:
        return changed_bytes(chance, content)
    return json.dumps(changed(chance, json.loads(content))).encode()


def changed_line(chance: random.Random, content: bytes) -> bytes:
    """A file of JSON lines with one of them changed."""
    lines = content.splitlines()
    place = chance.randrange(len(lines))
    lines[place] = changed_json(chance, lines[place])
    return b"\n".join(lines) + b"\n"


def changed_bytes(chance: random.Random, content: bytes) -> bytes:
    """A file that was cut, overwritten in places, or had something put into it; or another one."""
    how, place = chance.randrange(6), chance.randrange(len(content) + 1)
    odd = chance.choice(BYTES)
    if how == 0:
        return odd
    if how == 1:
        return content[:place]
    if how == 2:
        return content[:place] + odd + content[place:]
    if how == 3:
        end = place + chance.randrange(40)
        return content[:place] + content[end:]
    if how == 4:
        begin = chance.randrange(len(content) + 1)
        return content[:place] + content[begin : begin + chance.randrange(60)] + content[place:]
    found = bytearray(content)
    for _ in range(min(len(found), chance.choice((1, 2, 3, 8)))):
        found[chance.randrange(len(found))] = chance.randrange(256)
    return bytes(found)
