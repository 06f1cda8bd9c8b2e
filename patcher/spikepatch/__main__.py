"""``python -m spikepatch``."""

from spikepatch.cli import main

main()
