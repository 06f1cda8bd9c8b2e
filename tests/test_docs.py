"""Each page of docs/ works as it stands there: its commands run, and print what is shown (`tests/blocks.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.blocks import Block, blocks, compare, prepared, prose, run

pytestmark = pytest.mark.slow  # processes, trainings, or models at full size

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with prepared() as found:
        yield found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page: Path, environment: dict[str, str], tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert run(text, tmp_path, environment) == sum(block.runs for block in blocks(text))


SAMPLE = """
# Words

<!-- setup
echo one > file
-->
```bash
echo two > other
```
Some prose.

<!-- exits with 3 -->
```bash
cat file
python -c "import sys; print('two', sys.flags.no_site); sys.exit(3)"
```
<!-- prints, among others -->
```text
one
```

| a | table |
<!-- file: under/x.py -->
```python
print("three")
```
```bash
python under/x.py | tee printed
spikepatch recipes --json | head -c 1; echo
```
<!-- prints -->
```text
three
[
```
<!-- not run: it would fail -->
```bash
false
```
```python
from pathlib import Path

assert Path("printed").read_text() == "three\\n"
```
"""


def test_a_page(environment: dict[str, str], tmp_path: Path) -> None:
    """Every kind of block, and each fails where it should."""
    assert run(SAMPLE, tmp_path, environment) == 5
    assert prose(SAMPLE).split() == ["#", "Words", "Some", "prose."]
    for right, wrong in (("three\n[", "four\n["), ("exits with 3", "exits with 4"), ("one\n```", "two\n```"),
                         ('"three', '"four')):  # fmt: skip
        assert right in SAMPLE
        with pytest.raises(AssertionError):
            run(SAMPLE.replace(right, wrong), tmp_path, environment)
    with pytest.raises(AssertionError):
        compare(Block("text", "a\n", "prints, at the end"), "a\nb\n")
