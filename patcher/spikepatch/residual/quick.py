"""Tracing without the work that only the debugging and the other users of ``torch.export`` need."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Export without stack traces of the nodes, without walks of the garbage collector, and without Python code for
    graphs that nobody calls.
    """
    config: Any = torch.fx.config
    traces = getattr(config, "do_not_emit_stack_traces", False)
    config.do_not_emit_stack_traces = True
    try:
        with without_collector(), _code_on_demand():
            yield
    finally:
        config.do_not_emit_stack_traces = traces


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """The garbage collector walks over a graph that is growing again and again, and finds nothing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def _code_on_demand() -> Iterator[None]:
    """A ``GraphModule`` that is made or changed meanwhile writes its graph as code and compiles that once it is called.

    By itself it does so after every change, six times for each export: a tenth of the time. For a function of thousands
    of lines, the compiler takes more memory than all of the graph, and torch keeps the text of each for ever.
    """
    compile_now = GraphModule.recompile

    def postpone(module: GraphModule) -> None:
        def forward(self: GraphModule, *args: Any, **kwargs: Any) -> Any:
            compile_now(self)
            return self(*args, **kwargs)

        type(module).forward = forward  # every GraphModule has a class of its own

    GraphModule.recompile = postpone  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        GraphModule.recompile = compile_now  # type: ignore[method-assign]
