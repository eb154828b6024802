"""A recording as text: every op, where it was asked for, and the names of the tensors."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import fabric_init
from fabric_init.tools import dump_tape


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.body.weight
        nn.init.normal_(self.body.weight, std=0.02)
        self.register_buffer("scale", torch.ones(2) * 3)


def recorded() -> Model:
    with fabric_init.deferred_init():
        return Model()


def line_with(text: str, *parts: str) -> str:
    (line,) = [line for line in text.splitlines() if all(part in line for part in parts)]
    return line


def test_storages_have_the_names_of_the_tensors_on_them_ties_included() -> None:
    dump = dump_tape(recorded())
    assert re.search(r"^  s\d+ +64 bytes  cpu +body.weight = head.weight$", dump, re.MULTILINE)
    assert re.search(r"^  s\d+ +8 bytes  cpu +scale$", dump, re.MULTILINE)
    assert re.search(r"^  s\d+ +8 bytes  cpu +\(intermediate\)$", dump, re.MULTILINE)


def test_every_op_has_its_arguments_and_its_line_and_dead_ones_are_marked() -> None:
    dump = dump_tape(recorded())
    normal = line_with(dump, "normal_(")
    assert re.fullmatch(
        r" {7}#\d+ normal_\(s\d+:body.weight = head.weight\[4, 4\] float32, mean=0, std=0.02\)"
        r"  ← test_dump_tape.py:\d+",
        normal,
    )
    assert line_with(dump, "kaiming_uniform_(", ":body.weight").startswith("  dead #")
    assert not line_with(dump, "uniform_(", ":body.bias").startswith("  dead")
    assert re.search(r"mul\(s\d+\[2\] float32, 3\) → s\d+:scale\[2\] float32", dump)


def test_tensors_that_share_a_storage_without_being_tied_are_listed_side_by_side() -> None:
    with fabric_init.deferred_init():
        model = nn.Module()
        both = torch.zeros(4, 2)
        model.first, model.second = nn.Parameter(both[:2]), nn.Parameter(both[2:])
    assert line_with(dump_tape(model), "32 bytes", "cpu").endswith("first, second")


def test_parts_built_in_blocks_of_their_own_have_a_tape_each() -> None:
    model = nn.ModuleList([recorded(), recorded()])
    first, second = dump_tape(model).split("\n\n")
    assert "0.scale" in first
    assert "0.scale" not in second
    assert "1.scale" in second


def test_a_filled_model_and_one_that_waits_for_values_can_still_be_looked_at() -> None:
    model = recorded()
    before = dump_tape(model)
    fabric_init.materialize(model)
    assert dump_tape(model) == before
    fabric = fabric_init.Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(empty_init=True):
        waiting = Model()
    assert "body.weight = head.weight" in dump_tape(waiting)
    assert "body.weight = head.weight" in dump_tape(fabric.setup(waiting))


def test_a_model_without_a_recording_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(fabric_init.RecordingError, match=r"this Model has no recording.*deferred_init"):
        dump_tape(Model())
