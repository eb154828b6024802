"""Constructors that call compiled functions and modules: they run as they are written, and are compiled later."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fabric_init import RanksLostError, deferred_init, materialize
from fabric_init.recording.mode import RecordMode

GRAPHS: list[Any] = []


def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    GRAPHS.append(graph)
    return graph.forward


@torch.compile(backend=backend, fullgraph=True)
def rotary(positions: int) -> Tensor:
    return torch.arange(positions, dtype=torch.float32).outer(1 / 10000 ** (torch.arange(4) / 4)).cos()


@torch.compile(backend=backend)
def doubled(x: Tensor) -> Tensor:
    return x * 2


class Compiled(nn.Module):
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        with torch.no_grad():
            self.linear.weight.copy_(doubled(self.linear.weight))
            self.register_buffer("seen", torch.compile(self.linear, backend=backend)(torch.ones(3)))
        self.register_buffer("table", rotary(8))


@pytest.fixture(autouse=True)
def _no_graphs() -> None:
    torch._dynamo.reset()
    GRAPHS.clear()


def test_compiled_code_in_a_constructor_runs_as_it_is_written_and_is_compiled_after_the_block() -> None:
    torch.manual_seed(0)
    with deferred_init(rng="eager"):
        model = Compiled()
    materialize(model)
    assert GRAPHS == []
    torch.manual_seed(0)
    plain = Compiled()
    assert len(GRAPHS) == 3
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_blocks_that_are_open_in_two_threads_leave_compiling_on() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with deferred_init():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with deferred_init():
        thread.start()
        entered.wait(60)
    doubled(torch.ones(3))
    assert GRAPHS == []
    leave.set()
    thread.join()
    doubled(torch.ones(3))
    assert len(GRAPHS) == 1


def test_a_block_that_cannot_be_entered_leaves_compiling_on() -> None:
    def of_all_ranks(seed: int) -> int:
        raise RanksLostError("rank 1 is gone")

    with pytest.raises(RanksLostError), RecordMode(agree=of_all_ranks):
        pass
    doubled(torch.ones(3))
    assert len(GRAPHS) == 1
