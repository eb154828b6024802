"""Replay: in parallel, in part, in order, and with no more memory than needed."""

from __future__ import annotations

import threading
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fabric_init import deferred_init
from fabric_init.recording.replay.replay import _Execution, real_execution, replay, view
from fabric_init.recording.tape.liveness import live_ops
from fabric_init.recording.tape.tape import Op, Tape
from fabric_init.recording.tensor.recorded_tensor import recorded
from fabric_init.recording.tensor.storage_tags import ref_of


def build(seed: int = 0) -> tuple[nn.Module, Tape, dict[str, int]]:
    torch.manual_seed(seed)
    with deferred_init():
        model = nn.TransformerEncoderLayer(8, 2, 16)
        model.table = nn.Parameter(model.linear1.weight.detach() * 2)
        model.picked = torch.randperm(6)
        nn.init.sparse_(model.linear2.weight, 0.5)
    tensors = {**dict(model.named_parameters()), "picked": model.picked}
    recordings = {name: recorded(tensor) for name, tensor in tensors.items()}
    tape = next(iter(recordings.values())).tape  # type: ignore[union-attr]
    return model, tape, {name: value.storage for name, value in recordings.items() if value is not None}


def values(tape: Tape, storages: list[int], threads: int | None = None, exact: bool = False) -> dict[int, bytes]:
    contents: dict[int, bytes] = {}
    for memories in replay(tape, storages, exact=exact, threads=threads):
        for storage, memory in memories.items():
            assert storage not in contents
            contents[storage] = bytes(memory.tolist())
    return contents


@pytest.mark.parametrize("exact", [False, True])
def test_values_do_not_depend_on_threads_order_or_on_what_else_is_asked_for(exact: bool) -> None:
    _, tape, storages = build()
    numbers = list(storages.values())
    expected = values(tape, numbers, threads=1, exact=exact)
    assert set(expected) == set(numbers)
    for threads in (2, 4):
        assert values(tape, numbers, threads=threads, exact=exact) == expected
    assert values(tape, numbers[::-1], threads=2, exact=exact) == expected
    for number in numbers:
        assert values(tape, [number], threads=1, exact=exact) == {number: expected[number]}


def test_dead_work_is_not_run() -> None:
    class Spy(TorchDispatchMode):
        """A mode of the user's, which replay must neither call nor remove."""

        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with deferred_init():
        layer = nn.Linear(64, 64)
        nn.init.zeros_(layer.weight)
    recording = recorded(layer.weight)
    assert recording is not None
    live = live_ops(recording.tape, [recording.storage], exact=False)
    assert [recording.tape.ops[index].func.__name__ for index in live] == ["zeros_"]
    with Spy() as spy:
        memories = list(replay(recording.tape, [recording.storage], exact=False, threads=1))
        assert spy.seen == []
        torch.ones(1)
    assert len(spy.seen) == 1
    assert not any(memories[0][recording.storage].tolist())


def test_values_that_are_needed_along_the_way_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    with deferred_init():
        total = torch.zeros(10)
        for _ in range(40):
            total = total + torch.ones(10)
    recording = recorded(total)
    assert recording is not None
    held: list[int] = []
    run = _Execution._run

    def run_and_count(self: _Execution, op: Op) -> None:
        run(self, op)
        held.append(len(self._memory))

    monkeypatch.setattr(_Execution, "_run", run_and_count)
    memories = list(replay(recording.tape, [recording.storage], exact=False, threads=1))
    assert view(memories[0][recording.storage], ref_of(total, recording.storage)).tolist() == [40.0] * 10
    assert len(held) == 81
    assert max(held) <= 3


def test_storages_of_one_op_come_together() -> None:
    with deferred_init():
        order, index = torch.sort(torch.randn(5))
    a, b = recorded(order), recorded(index)
    assert a is not None
    assert b is not None
    groups = list(replay(a.tape, [a.storage, b.storage], exact=False, threads=2))
    assert [set(group) for group in groups] == [{a.storage, b.storage}]


def test_an_error_in_one_thread_reaches_the_caller() -> None:
    with deferred_init():
        made = [torch.ones(3) for _ in range(8)]
    recordings = [recorded(tensor) for tensor in made]
    tape = recordings[0].tape  # type: ignore[union-attr]
    numbers = [value.storage for value in recordings if value is not None]

    def fail(device: torch.device) -> torch.device:
        raise LookupError("no such device")

    with pytest.raises(LookupError, match="no such device"):
        list(replay(tape, numbers, exact=False, to=fail, threads=2))
    assert not [t for t in threading.enumerate() if t.name.startswith("fabric-init-replay")]


def test_real_execution_switches_every_mode_off_and_on_again() -> None:
    with deferred_init():
        with real_execution():
            inside = torch.ones(3)
        after = torch.ones(3)
    assert recorded(inside) is None
    assert not inside.is_meta
    assert recorded(after) is not None
