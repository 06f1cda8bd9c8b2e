"""Functions of libraries that are replaced for a while: in the thread that asked, and nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from transformers import GPT2Config, PreTrainedConfig

import spikepatch
from spikepatch.source.meta import build_meta, settings_read
from spikepatch.source.private import is_out_of_memory, replaced_here
from tests.architectures import tiny_config
from tests.residual.configs import model_class


class Thing:
    def name(self) -> str:
        return "own"


def shout(original: Callable[..., str], self: Thing) -> str:
    return original(self).upper()


def twice(original: Callable[..., str], self: Thing) -> str:
    return 2 * original(self)


def elsewhere(function: Callable[[], Any]) -> Any:
    """What the function returns in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_replaced_in_this_thread_alone() -> None:
    before = Thing.name
    with replaced_here(Thing, "name", shout):
        assert Thing().name() == "OWN"
        assert elsewhere(Thing().name) == "own"
        with replaced_here(Thing, "name", twice):
            assert Thing().name() == "OWNOWN"
        assert Thing().name() == "OWN"
    assert Thing.name is before


def test_blocks_of_two_threads_may_end_in_any_order() -> None:
    before = Thing.name
    inside, leave = threading.Event(), threading.Event()

    def other() -> str:
        with replaced_here(Thing, "name", twice):
            inside.set()
            assert leave.wait(60)
            return Thing().name()

    with ThreadPoolExecutor(1) as pool:
        with replaced_here(Thing, "name", shout):
            found = pool.submit(other)
            assert inside.wait(60)
            assert Thing().name() == "OWN"
        assert Thing().name() == "own"  # this one has left, the other has not
        leave.set()
        assert found.result() == "ownown"
    assert Thing.name is before


def test_the_original_is_back_after_an_error() -> None:
    before = Thing.name
    with pytest.raises(KeyError), replaced_here(Thing, "name", shout):
        raise KeyError
    assert Thing.name is before


def test_models_that_other_threads_build_meanwhile_have_memory() -> None:
    """Plans are made in one thread while another one builds; what that one reads of a config is not the plan's."""
    stop = threading.Event()
    replaced = (nn.Module.register_parameter, PreTrainedConfig.__getattribute__, GraphModule.recompile)

    def plans() -> int:
        made = 0
        while not stop.is_set() or not made:
            config = tiny_config("gpt2")
            with settings_read() as read:
                model = build_meta(model_class("gpt2", "causal"), config, where="gpt2")
                spikepatch.plan(model, reinit="all")
            assert "n_layer" in read
            assert "summary_type_of_another_thread" not in read
            made += 1
        return made

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(plans)
        devices = set()
        for _ in range(300):
            layer = nn.Linear(3, 3)
            devices |= {layer.weight.device.type, nn.Embedding(3, 3).weight.device.type}
            assert getattr(GPT2Config(), "summary_type_of_another_thread", None) is None
        stop.set()
        assert found.result() > 0
    assert devices == {"cpu"}
    assert replaced == (nn.Module.register_parameter, PreTrainedConfig.__getattribute__, GraphModule.recompile)


def test_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
