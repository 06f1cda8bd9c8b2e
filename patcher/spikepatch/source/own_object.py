"""``module:NAME``: an object of the user's own, from a Python module that is imported, so its code runs."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from spikepatch.errors import Refused


def imported(place: str, what: str) -> Any:
    """The object that ``place`` names. ``what`` it is to be: "the recipe".

    Modules are looked for where Python imports from, and after that in the current directory, so that nothing there
    hides an installed package.

    Raises:
        Refused: there is none, or importing its module fails.
    """
    module, _, name = place.partition(":")
    before = list(sys.path)
    sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        raise Refused(
            what=f"{what} cannot be imported",
            where=place,
            why=f"{type(error).__name__}: {error}",
            remedy="module:NAME is looked for where Python imports from, and in the current directory",
        ) from error
    finally:
        sys.path[:] = before
