"""Lines of text that no trainer of the table writes, and that name their numbers: ``step 1: train loss 7.95, lr 1e-3``,
``nll=7.9 | gnorm=0.5``, a bar of tqdm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

from spikepatch.spikes.line_formats import COLOUR

_WORD = r"(?!(?:nan|inf|infinity)\b)[a-z_][\w./-]*"
_NUMBER = r"[-+]?(?:nan|inf(?:inity)?|\d{1,3}(?:,\d{3})+(?:\.\d+)?|(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)"

#: A name of up to three words; "=", ":" or a space; a number, which is no part of a date, a time or a word.
_PAIR = re.compile(
    rf"(?<![\w./-])({_WORD}(?: {_WORD}){{0,2}})['\"]?(\s*[=:]\s*|\s+)['\"]?(?:tensor\()?({_NUMBER})(?!\w|[:.-]\d)",
    re.IGNORECASE,
)

#: What loggers write before a message.
_LEVEL = re.compile(r"^(?:(?:DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL) )+")

#: What a line is of, from there on.
_PHASE = re.compile(r"(?<![\w./-])(train|val|eval)(?:ing|id|uation|idation)?(?![\w./-])", re.IGNORECASE)

#: Where tqdm writes how far it is.
_BAR = re.compile(r"\| *(\d+)/(?:\d+|\?) \[|(?<!\S)(\d+)it \[")

#: Characters of a line that are looked at.
_LONGEST = 4000


def pairs(line: str) -> dict[str, float]:
    """The numbers of a line by their names. Behind "=" stands the number of the one word before it, where that names
    one number only. What is of an evaluation has "eval" before it."""
    line = COLOUR.sub("", line[:_LONGEST])
    found = list(_PAIR.finditer(line))
    last = Counter(match[1].rpartition(" ")[2] for match in found)
    named: dict[str, float] = {}
    evaluated, end = False, 0
    for match in found:
        for phase in _PHASE.findall(line[end : match.end(1)]):
            evaluated = phase.lower() != "train"
        end = match.end()
        words = _LEVEL.sub("", match[1])
        word = words.rpartition(" ")[2]
        name = word if "=" in match[2] and last[word] == 1 else words
        if evaluated and not _PHASE.search(name):
            name = f"eval {name}"
        named.setdefault(name, float(match[3].replace(",", "")))
    bar = _BAR.search(line)
    if bar is not None and named:
        named.setdefault("step", float((bar[1] or bar[2])[:15]))
    return named


def text_records(lines: Sequence[str]) -> list[dict[str, float]]:
    """The pairs of each line that has some. A name that comes once is a word of a sentence."""
    records = [named for line in lines if (named := pairs(line))]
    counts = Counter(name for named in records for name in named)
    return [kept for named in records if (kept := {name: x for name, x in named.items() if counts[name] > 1})]


def named_by(wanted: str | None, names: Collection[str]) -> str | None:
    """The only name that ends with the words ``wanted``, in any case of letters; else ``wanted``."""
    if wanted is None or wanted in names:
        return wanted
    ending = [name for name in names if f" {name}".lower().endswith(f" {wanted}".lower())]
    ending = [name for name in ending if not name.lower().startswith(("val", "eval"))] or ending
    return ending[0] if len(ending) == 1 else wanted
