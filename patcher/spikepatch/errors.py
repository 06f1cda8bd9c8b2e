"""What can go wrong, said to the user: what happened, where, why, and what to do about it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

#: Of each part of a message, so many characters are shown.
SHOWN = 4000


def visible(text: str) -> str:
    """What a terminal may be sent: control characters, and marks that turn the writing's direction, as escapes; but for
    ends of lines and tabs.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def shown(text: object) -> str:
    """A part of a message as a terminal may show it, no longer than ``SHOWN``."""
    told = visible(str(text)[: SHOWN + 1])
    return told if len(told) <= SHOWN else f"{told[:SHOWN]} ..."


class SpikepatchError(Exception):
    """A refusal or a bad input. The command prints it and exits with code 2; nothing has been written.

    Args:
        what: what is wrong, as one clause.
        where: the file, model or parameter that it is about.
        why: the reason, as far as it is known.
        remedy: what the user can do.
    """

    def __init__(self, what: str, *, where: str, why: str, remedy: str) -> None:
        self.what: str = what
        self.where: str = where
        self.why: str = why
        self.remedy: str = remedy
        one_line = shown(where).replace("\n", "\\n")
        super().__init__(f"{one_line}: {shown(what)}\n  why: {shown(why)}\n  remedy: {shown(remedy)}")


class BadSource(SpikepatchError):
    """The source cannot be read: missing, malformed, or of a kind that is never opened (pickles)."""


class Refused(SpikepatchError):
    """The input is fine, and what was asked of it is not possible or not safe."""


class BadTarget(SpikepatchError):
    """The output folder cannot be used."""


def check_platform() -> None:
    """Refuse to work where folders cannot be locked and put in place whole.

    Raises:
        Refused: this is not Linux or macOS.
    """
    try:
        import fcntl as fcntl
    except ImportError as error:
        raise Refused(
            "spikepatch runs on Linux and macOS only",
            where=f"this system ({sys.platform})",
            why="output that appears whole or not at all needs file locks and renames that it does not have",
            remedy="run it on one of these; on Windows, in the Windows Subsystem for Linux",
        ) from error


def unprintable(names: Iterable[str]) -> list[str]:
    """Of ``names``, those that would not show as they are, as Python writes them.

    No model needs one, and one can make a terminal or a page say something else.
    """
    return [ascii(name) for name in names if not name.isprintable()]


def did_you_mean(word: object, known: Iterable[str], otherwise: str) -> str:
    """The remedy for a name that is unknown: the known ones that are near to it, if any are, else ``otherwise``."""
    near = difflib.get_close_matches(str(word), list(known), n=3)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def first_line(error: BaseException) -> str:
    """The first line of what a library's ``error`` says; its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def on_one_line(error: BaseException, limit: int = 300) -> str:
    """A library's ``error`` by its type and what it says, of which at most ``limit`` characters."""
    said = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {said[:limit]}"
