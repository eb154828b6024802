"""Which writes a tensor has behind it, through casts and copies, and which of them came to nothing."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fabric_init import deferred_init
from fabric_init.planning.tensors import tensors_and_tapes
from fabric_init.reports.write_history import History, histories


def history_of(model: nn.Module, name: str) -> History:
    slots, _, tapes = tensors_and_tapes(model)
    return next(one for one in histories(slots, tapes) if one.slot.name == name)


def rules(history: History) -> list[tuple[str, bool]]:
    """Names of the ops, and whether they came to nothing."""
    return [(getattr(event.op.func, "__name__", "").split(".")[0], event.dead) for event in history.events]


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        nn.init.normal_(self.layer.weight)


def test_a_default_that_is_written_over_is_dead_and_known_as_one() -> None:
    with deferred_init():
        history = history_of(Linear(), "layer.weight")
    assert rules(history) == [("kaiming_uniform_", True), ("normal_", False)]
    default, own = history.events
    assert (default.by_default, default.is_rule, own.by_default, own.is_rule) == (True, False, False, True)
    assert history.winner == own


def test_a_cast_and_a_copy_keep_the_history_of_what_they_were_made_from() -> None:
    with deferred_init():
        model = Linear().to(torch.bfloat16)
        twin = copy.deepcopy(model)
        both = nn.ModuleList([model, twin])
    for name in ("0.layer.weight", "1.layer.weight"):
        assert rules(history_of(both, name)) == [("kaiming_uniform_", True), ("normal_", False)]


def test_values_that_a_tensor_is_made_with_are_no_rule_of_the_model() -> None:
    with deferred_init():
        model = nn.Module()
        model.token = nn.Parameter(torch.zeros(3))
        nn.init.normal_(model.token)
    made, own = history_of(model, "token").events
    assert (made.created, made.is_rule, made.dead) == (True, False, True)
    assert (own.created, own.is_rule, own.dead) == (False, True, False)


def test_what_a_later_write_reads_is_not_dead() -> None:
    with deferred_init():
        model = Linear()
        with torch.no_grad():
            model.layer.weight.mul_(2)
    history = history_of(model, "layer.weight")
    assert rules(history) == [("kaiming_uniform_", True), ("normal_", False), ("mul_", False)]
    assert history.winner == history.events[1]
    assert history.later == history.events[2:]


def test_a_write_to_another_part_of_a_shared_storage_is_not_the_tensors() -> None:
    with deferred_init():
        flat = torch.empty(10)
        model = nn.Module()
        model.register_buffer("first", flat[:4])
        model.register_buffer("second", flat[4:])
        nn.init.ones_(model.get_buffer("first"))
        nn.init.zeros_(model.get_buffer("second"))
    assert rules(history_of(model, "first")) == [("ones_", False)]
    assert rules(history_of(model, "second")) == [("zeros_", False)]
    assert all(event.whole for event in history_of(model, "first").events)
