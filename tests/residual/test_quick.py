"""Exporting without the extra work: nothing is lost that somebody needs."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.fx import Graph, symbolic_trace

from spikepatch.residual.example import example_of
from spikepatch.residual.trace import exported, quick
from tests.architectures import ids, tiny_model


def test_no_code_is_written_for_a_graph_that_nobody_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write = Graph.python_code

    def counted(graph: Graph, *args: Any, **kwargs: Any) -> Any:
        written.append(graph)
        return write(graph, *args, **kwargs)

    monkeypatch.setattr(Graph, "python_code", counted)
    model = tiny_model("gpt2")
    nodes = len(exported(model, example_of(model)).graph.nodes)
    assert not written
    torch.export.export(model, (), {"input_ids": ids(model), "use_cache": False}, strict=False)
    assert written
    assert nodes > 50


def test_a_graph_that_is_called() -> None:
    x = torch.arange(3.0)
    with quick():
        module = symbolic_trace(torch.nn.ReLU())
        changed = symbolic_trace(lambda x: x + 1)
        assert torch.equal(changed(x), x + 1)
        (add,) = (node for node in changed.graph.nodes if node.op == "call_function")
        add.update_arg(1, 2)
        changed.recompile()
        assert torch.equal(changed(x), x + 2)

    assert torch.equal(module(-x), torch.zeros(3))
    assert torch.equal(changed(x), x + 2)
    assert symbolic_trace(torch.nn.ReLU()).code


@pytest.mark.parametrize("collects", [True, False])
def test_the_garbage_collector_is_as_before(collects: bool) -> None:
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with quick():
            assert not gc.isenabled()
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()
