"""Keeping the chatter of dependencies away from the user."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back warnings, info logs and progress bars of dependencies while they work for us."""
    loggers = [logging.getLogger(name) for name in ("transformers", "torch", "accelerate", "huggingface_hub")]
    levels = {logger: logger.level for logger in loggers if logger.level != logging.ERROR}  # a change costs
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), _no_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    if "transformers" not in sys.modules:  # not worth the import
        yield
        return
    from transformers.utils import logging as bars

    if not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the hub's bars may be off by an environment variable, and stay off
            bars.enable_progress_bar()
