"""The types that the installed transformers knows, read from its source: a shell asks for them at every press of a key,
and importing transformers takes seconds.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

#: Where transformers lists them, and how; older versions have no ``auto_mappings.py``.
_FILES = ("auto_mappings.py", "configuration_auto.py")
_TABLE = re.compile(r"^CONFIG_MAPPING_NAMES\b.*?\n    \]\n", re.DOTALL | re.MULTILINE)
_ENTRY = re.compile(r"^ {8}\(\"([^\"]+)\", \"\w+\"\)", re.MULTILINE)


def model_types() -> tuple[str, ...]:
    """What may stand behind ``arch:``, in the order of the alphabet; nothing where it cannot be read."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return ()
    for name in _FILES:
        file = Path(spec.origin).parent / "models/auto" / name
        table = _TABLE.search(file.read_text(encoding="utf-8")) if file.is_file() else None
        if table is not None:
            return tuple(sorted(set(_ENTRY.findall(table[0]))))
    return ()
