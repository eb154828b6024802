"""Seconds are measured, with a random stream of their own, and grow with the tensor."""

from __future__ import annotations

import torch
from torch import nn

from fabric_init.api import deferred_init
from fabric_init.recording.tape.tape import Op
from fabric_init.recording.tensor.recorded_tensor import recorded
from fabric_init.tools.audit.measure.write_cost import WriteTimer


def ops_of(weight: torch.Tensor) -> list[Op]:
    """What was recorded for a tensor."""
    found = recorded(weight)
    assert found is not None
    return [found.tape.ops[number] for number in found.tape.writers[found.storage]]


def test_a_large_tensor_is_reckoned_from_a_sample_and_costs_in_proportion() -> None:
    with deferred_init():
        one, hundredfold = torch.empty(1 << 18).normal_(), torch.empty(100 << 18).normal_()
    stopwatch = WriteTimer()
    small, large = stopwatch.seconds(ops_of(one)[0]), stopwatch.seconds(ops_of(hundredfold)[0])
    assert small > 0
    assert 10 * small < large < 1000 * small  # two measurements, on a machine with other work


def test_a_measurement_takes_no_random_numbers_from_torch() -> None:
    with deferred_init():
        weight = nn.init.orthogonal_(torch.empty(64, 64))
        nn.init.sparse_(weight, 0.5)
        nn.init.trunc_normal_(weight)
    before = torch.get_rng_state()
    stopwatch = WriteTimer()
    assert all(stopwatch.seconds(op) > 0 for op in ops_of(weight))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_op_that_cannot_be_run_on_a_sample_still_has_a_cost() -> None:
    with deferred_init():
        joined = torch.cat([torch.ones(1 << 18, 3), torch.ones(1, 3)])
        joined.index_fill_(0, torch.tensor([1 << 18]), 2.0)
    assert all(WriteTimer().seconds(op) > 0 for op in ops_of(joined))
