"""Places in a file, found without building anything: ends of functions, imports, names."""

from __future__ import annotations

import pytest

from spikepatch.apply.own_file.build import Built
from spikepatch.apply.own_file.placement import at_end_of_init
from spikepatch.apply.own_file.syntax import bound_at, parse, spelled, splice, with_imports
from spikepatch.errors import Refused

HEAD = "class M(Base):\n"
FUTURE = "from __future__ import annotations\n"


def built(init_line: int, class_name: str = "M") -> Built:
    return Built(class_name, "m.py", init_line, {}, {}, {}, {}, {}, None)  # type: ignore[arg-type]  # no map is needed


def called(text: str, init_line: int, class_name: str = "M") -> str:
    parsed = parse("m.py", text)
    return splice(text, [at_end_of_init(parsed, built(init_line, class_name), "fill")])


@pytest.mark.parametrize(
    ("body", "end"),
    [
        ("        super().__init__()\n", ""),
        ("        super().__init__()  # a remark\n", "\n    x = 1\n"),
        ("        super().__init__()", None),  # the file ends without a newline
        (
            "        for i in range(3):\n            f(i)\n            # of the loop\n        # of the function\n",
            "\n\nx = 1\n",
        ),
        ('        """Said\n    over lines."""\n        f(\n            1,\n        )\n', "    def other(self): ...\n"),
        ("        def inner():\n            return 1\n\n        self.f = lambda: inner()\n", ""),
    ],
)
def test_the_call_ends_the_function(body: str, end: str | None) -> None:
    text = f"{HEAD}    def __init__(self):\n{body}{end or ''}"
    line = "        fill(self)\n"
    expected = f"{text}\n{line[:-1]}" if end is None else f"{HEAD}    def __init__(self):\n{body}{line}{end}"
    assert called(text, 2) == expected
    compile(expected, "m.py", "exec")


def test_the_name_of_self_and_decorators() -> None:
    text = "class A:\n    class M:\n\n        @wraps\n        def __init__(me, /, x):\n            me.x = x\n"
    assert called(text, 4, "A.M") == f"{text}            fill(me)\n"


def test_a_class_that_inherits_its_init() -> None:
    text = "def make():\n\tclass M(Base):\n\t\tpass\n\treturn M\n"
    added = "\n\t\tdef __init__(self, *args, **kwargs):\n\t\t\tsuper().__init__(*args, **kwargs)\n\t\t\tfill(self)\n"
    assert called(text, 0, "make.<locals>.M") == text.replace("\treturn", f"{added}\treturn")


@pytest.mark.parametrize(
    ("text", "init_line", "why", "line"),
    [
        ("class M(Base): pass\n", 0, "written on one line", 1),
        (f"{HEAD}    __init__ = other\n", -1, "defined elsewhere", 1),
        (f"{HEAD}    def __init__(self): self.x = 1\n", 2, "not a plain function", 2),
        (
            f"{HEAD}    def __init__(self):\n        if self:\n            return\n        f()\n",
            2,
            "would not always run",
            4,
        ),
        (f"if x:\n    {HEAD}        pass\nelse:\n    {HEAD}        pass\n", 0, "which of them", 0),
        ("M = type('M', (Base,), {})\n", 0, "other means", 0),
    ],
)
def test_what_has_no_end_to_write_at(text: str, init_line: int, why: str, line: int) -> None:
    with pytest.raises(Refused) as refused:
        called(text, init_line)
    assert why in refused.value.why
    assert refused.value.where == (f"m.py, line {line}" if line else "m.py")


@pytest.mark.parametrize(
    ("imports", "name"),
    [
        ("import torch", "torch.nn"),
        ("import torch.optim", "torch.nn"),
        ("import torch as t", "t.nn"),
        ("import torch.nn as layers", "layers"),
        ("import torch\nfrom torch import nn", "nn"),
        ("from torch import nn as n, Tensor", "n"),
        ("from torch.nn import Linear", None),
        ("from .torch import nn", None),
        ("from torch import *", None),
        ("def f():\n    import torch", None),
    ],
)
def test_how_the_file_writes_a_module(imports: str, name: str | None) -> None:
    assert spelled(parse("m.py", f"{imports}\n"), "torch.nn") == name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"""Doc."""\n\nimport os\n\nimport torch\n', '"""Doc."""\n\nimport os\n\nimport torch\nimport re\n'),
        (f"{FUTURE}import torch\n", f"{FUTURE}import torch\nimport re\n"),
        ("import os\r\nimport sys\r\n\r\n\r\nx = 1", "import os\r\nimport sys\r\nimport re\r\n\r\n\r\nx = 1"),
        ("import re\n", "import re\n"),
        ("# own\nx = 1  # kept\n", "# own\nimport re\n\nx = 1  # kept\n"),
    ],
)  # fmt: skip
def test_an_import_goes_behind_the_others(before: str, after: str) -> None:
    assert with_imports(before, ["re"]) == after


def test_names_at_the_top_level() -> None:
    parsed = parse("m.py", "import a\n\n\nclass B:\n    c = 1\n\n\nd = 1\n")
    assert [bound_at(parsed, name) for name in ("a", "B", "c", "d", "print")] == [1, 4, None, 8, None]
