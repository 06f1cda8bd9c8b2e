"""What people read: sizes to three digits."""

from __future__ import annotations

import pytest

from spikepatch.source.formats import size


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (497_759_232, "498 MB"),
        (2_200_000_000, "2.20 GB"),
        (141_000_000_000, "141 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_size(count: int, shown: str) -> None:
    assert size(count) == shown
