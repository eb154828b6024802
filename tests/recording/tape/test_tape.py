"""The tape: what it records, which of its ops are live, and how it prints."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import nn

from fabric_init.recording.mode import RecordMode
from fabric_init.recording.tape.liveness import covers, live_ops, never_written
from fabric_init.recording.tape.tape import Tape, TensorRef
from fabric_init.recording.tensor.recorded_tensor import recorded
from fabric_init.recording.tensor.storage_tags import ref_of


def number(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():  # inside the block, is_meta is answered for the user
        recording = recorded(tensor)
    assert recording is not None
    return recording.storage


def names(tape: Tape, *tensors: torch.Tensor, exact: bool = False) -> list[str]:
    live = live_ops(tape, [number(tensor) for tensor in tensors], exact=exact)
    return [tape.ops[index].func.__name__.split(".")[0] for index in sorted(live)]


def test_of_several_full_writes_the_last_one_alone_is_live() -> None:
    with RecordMode() as mode:
        layer = nn.Linear(4, 4)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(layer.weight)
    assert names(mode.tape, layer.weight) == ["normal_"]


def test_a_partial_write_keeps_what_it_does_not_cover_alive() -> None:
    with RecordMode() as mode:
        weight = torch.ones(4, 4)
        weight.zero_()
        weight[:2].normal_()
    assert names(mode.tape, weight) == ["zero_", "normal_"]


def test_arithmetic_in_place_keeps_the_old_value_alive() -> None:
    with RecordMode() as mode:
        weight = torch.ones(4)
        weight.normal_()
        weight.mul_(2)
    assert names(mode.tape, weight) == ["normal_", "mul_"]


def test_a_copy_brings_its_source_as_it_was_then() -> None:
    with RecordMode() as mode:
        source, target = torch.ones(4), torch.zeros(4)
        target.copy_(source)
        source.normal_()
    assert names(mode.tape, target) == ["ones", "copy_"]


def test_a_write_that_reads_its_own_target_is_not_a_full_write() -> None:
    with RecordMode() as mode:
        weight = torch.arange(4.0)
        weight.copy_(weight.flip(0))
    assert names(mode.tape, weight) == ["arange", "flip", "copy_"]


def test_in_exact_mode_dead_draws_stay_live_and_in_per_op_mode_they_do_not() -> None:
    with RecordMode() as mode:
        dead, alive = torch.randn(3), torch.randn(4)
    assert len(dead) == 3
    assert names(mode.tape, alive, exact=True) == ["randn", "randn"]
    assert names(mode.tape, alive, exact=False) == ["randn"]


def test_views_need_no_ops_and_tied_tensors_are_one_storage() -> None:
    with RecordMode() as mode:
        base = torch.ones(4, 6)
        count = len(mode.tape.ops)
        others = [base.t(), base[1:, ::2], base.view(-1), base.detach(), nn.Parameter(base), base.data]
    assert len(mode.tape.ops) == count
    assert {number(tensor) for tensor in others} == {number(base)}
    assert ref_of(base[1:, ::2], number(base)) == TensorRef(number(base), 6, torch.Size([3, 3]), (6, 2), torch.float32)


def test_covers_is_true_of_every_dense_layout_of_the_whole_and_of_nothing_else() -> None:
    with RecordMode() as mode:
        base = torch.ones(2, 3, 4)
    storage = number(base)

    def is_whole(tensor: torch.Tensor) -> bool:
        return covers(mode.tape, ref_of(tensor, storage))

    assert all(map(is_whole, (base, base.permute(2, 0, 1), base.view(-1), base.view(6, 1, 4), base.view(torch.int32))))
    assert not any(map(is_whole, (base[:1], base[..., ::2], base[0].expand(2, 3, 4), base.as_strided((24,), (0,)))))


def test_never_written_sees_each_element() -> None:
    with RecordMode() as mode:
        table = torch.empty(4, 2)
        table[:, 0::2].fill_(1)
        unfinished = never_written(mode.tape, ref_of(table, number(table)))
        first_column = never_written(mode.tape, ref_of(table[:, 0], number(table)))
        table[:, 1::2].fill_(2)
        finished = never_written(mode.tape, ref_of(table, number(table)))
    assert (unfinished, first_column, finished) == (True, False, False)


def test_the_tape_holds_no_live_modules_and_no_parameters() -> None:
    with RecordMode() as mode:
        model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    held = [value for op in mode.tape.ops.values() for value in (*op.args, *op.kwargs.values())]
    assert held
    assert len(model) == 2
    assert not any(isinstance(value, (nn.Module, torch.Tensor)) for value in held)


def test_a_constant_holds_the_value_of_that_moment() -> None:
    real = torch.ones(3)
    with RecordMode() as mode:
        target = torch.zeros(3)
        target.copy_(real)
        real.fill_(9)
        assert target.tolist() == [1, 1, 1]
    assert names(mode.tape, target) == ["copy_"]


def test_a_tape_and_its_ops_can_be_read() -> None:
    with RecordMode() as mode:
        weight = torch.ones(4, 6)
        nn.init.normal_(weight, std=0.02)
        weight[1:, ::2].mul_(2)
        storage = number(weight)
        text = repr(mode.tape)
        assert len(mode.tape.ops) == 3  # a debugger may ask inside the block: nothing of it is recorded
    made, normal, multiplied = [repr(op) for op in mode.tape.ops.values()]
    assert re.fullmatch(r"#\d+ ones\(\[4, 6\], .*\) → s\d+\[4, 6\] float32  ← test_tape.py:\d+", made)
    assert f"normal_(s{storage}[4, 6] float32, mean=0, std=0.02)  ← test_tape.py:" in normal
    assert f"mul_(s{storage}[3, 3] float32 (offset 6, stride [6, 2]), 2)" in multiplied
    assert text.splitlines() == [
        "Tape: 3 ops on 1 storages (96 bytes), 1 random stream, rng='per_op'",
        *(f"  {op}" for op in (made, normal, multiplied)),
    ]
    assert "3 ops on 1 storages" in repr(mode.recorder)


def test_of_a_long_tape_the_ends_are_shown() -> None:
    with RecordMode() as mode:
        weight = torch.zeros(2)
        for value in range(20):
            weight.fill_(value)
    lines = repr(mode.tape).splitlines()
    assert len(lines) == 12
    assert lines[6] == "  … 11 more ops …"
    assert f"fill_(s{number(weight)}[2] float32, 19)" in lines[-1]


def test_a_constant_is_shown_without_its_values() -> None:
    with RecordMode() as mode:
        torch.zeros(3).copy_(torch.from_numpy(np.ones(3)))
    assert "constant[3] float64" in repr(mode.tape)
