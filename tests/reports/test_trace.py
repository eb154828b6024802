"""What a report tells on request: rules, expected and present moments, writes and waste, without a cost before."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from fabric_init import Fabric, FabricInitError, InitReport, deferred_init, materialize
from fabric_init.recording.tensor.recorded_tensor import recorded
from fabric_init.reports.rows import InitRow


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        nn.init.normal_(self.first.weight, std=0.5)
        nn.init.xavier_uniform_(self.first.weight)  # the last word
        self.second = nn.Linear(64, 32)
        self.register_buffer("angles", torch.arange(8.0) / 2)


def recording() -> Model:
    with deferred_init():
        return Model()


def row(report: InitReport, name: str) -> InitRow:
    (found,) = [row for row in report.rows if row.name == name]
    return found


def test_the_rule_its_line_its_promise_and_what_is_there_now() -> None:
    torch.manual_seed(0)
    model = recording()
    found = row(materialize(model).measure(), "first.weight")
    source, start = inspect.getsourcelines(Model)
    line = start + next(i for i, text in enumerate(source) if "# the last word" in text)
    assert found.rule.startswith("xavier_uniform_(")
    assert found.place.endswith(f"test_trace.py:{line}")
    assert (found.mean, found.std) == (0.0, pytest.approx(math.sqrt(2 / 128)))
    assert found.std_now == pytest.approx(model.first.weight.detach().std(correction=0).item(), rel=1e-6)
    assert found.std_now == pytest.approx(found.std, rel=0.1)
    assert found.full_writes == 3
    assert found.wasted_elements == 2 * 64 * 64
    assert [write.wasted for write in found.writes] == [True, True, False]


def test_what_was_loaded_has_no_rule_but_its_writes_are_known(tmp_path: Path) -> None:
    torch.save(Model().state_dict(), tmp_path / "m.pt")
    model = recording()
    found = row(materialize(model, checkpoint=tmp_path / "m.pt").measure(), "first.weight")
    assert (found.status, found.rule, found.place, found.std) == ("loaded", "", "", None)
    assert found.full_writes == 3
    assert found.std_now is not None


def test_nothing_is_worked_out_before_it_is_asked_for() -> None:
    model = recording()
    report = materialize(model)
    assert all(row.full_writes is None and row.std is None and row.std_now is None for row in report.rows)
    report = report.trace()
    assert all(row.full_writes is not None and row.std_now is None for row in report.rows)


def test_measuring_again_sees_what_has_changed() -> None:
    model = recording()
    report = materialize(model).measure()
    with torch.no_grad():
        model.second.bias.fill_(3.0)
        model.second.weight[0, 0] = math.inf
    report = report.measure()
    assert (row(report, "second.bias").mean_now, row(report, "second.bias").std_now) == (3.0, 0.0)
    assert report.not_finite == ["second.weight"]


def test_json_has_it_all_and_no_nan(tmp_path: Path) -> None:
    model = recording()
    with torch.no_grad():
        report = materialize(model)
        model.second.weight[0, 0] = math.nan
    report.measure().save(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    by_name = {one["name"]: one for one in data["tensors"]}
    assert data["not_finite"] == ["second.weight"]
    assert by_name["second.weight"]["std_now"] is None
    assert by_name["first.weight"]["full_writes"] == 3
    assert by_name["first.weight"]["writes"][0]["wasted"] is True


def test_an_unmeasured_report_still_says_in_json_what_its_recording_knows(tmp_path: Path) -> None:
    materialize(_model := recording()).save(tmp_path / "r.json")
    tensors = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["tensors"]
    first = next(one for one in tensors if one["name"] == "first.weight")
    assert first["rule"].startswith("xavier_uniform_(")
    assert first["std_now"] is None


def test_the_rule_is_known_when_a_tensor_waited_for_its_own_init() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(empty_init=True):
        model = Model()
    waiting = fabric.init_report(model).measure()
    assert row(waiting, "first.weight").rule.startswith("xavier_uniform_(")
    assert row(waiting, "first.weight").std_now is None, "what is in memory is no value yet"
    nn.init.ones_(model.second.bias)
    fabric.init_missing(model)
    report = fabric.init_report(fabric.setup(model)).measure()
    assert row(report, "first.weight").std_now == pytest.approx(math.sqrt(2 / 128), rel=0.1)
    assert (row(report, "second.bias").status, row(report, "second.bias").rule) == ("written by the user", "")
    assert row(report, "second.bias").mean_now == 1.0


def test_a_copy_is_plain_data_and_says_that_it_cannot_measure() -> None:
    report = materialize(_model := recording()).trace()
    for other in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert other == report
        assert other.to_dict() == report.to_dict()
        with pytest.raises(FabricInitError, match=r"nothing to measure(.|\n)*init_report\(model\)"):
            other.measure()


def test_a_report_does_not_keep_its_model_alive() -> None:
    model = recording()
    report = materialize(model)
    del model
    gc.collect()
    with pytest.raises(FabricInitError, match="is gone"):
        report.measure()
    assert row(report.trace(), "first.weight").full_writes == 3


def test_values_that_a_constructor_brought_in_are_not_kept_in_memory() -> None:
    table = torch.rand(5 << 20)

    class WithTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.table = nn.Parameter(torch.empty(table.numel()))
            self.table.data = table

    with deferred_init():
        model = WithTable()
    tape = recorded(model.table).tape  # type: ignore[union-attr]
    assert tape.constant_bytes == table.nbytes
    report = materialize(model).measure()
    assert all(one.recording is None for one in report.rows)
    assert row(report, "scale").full_writes is None
    assert row(report, "table").std_now == pytest.approx(1 / math.sqrt(12), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_tensors_of_every_dtype_are_measured_or_left_out(dtype: torch.dtype) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("odd", torch.ones(4, 4).to(dtype).t())
            self.register_buffer("none", torch.ones(0))

    with deferred_init():
        model = Odd()
    found = materialize(model).measure().rows
    assert found[0].mean_now == (None if dtype.is_complex else 1.0)
    assert found[1].mean_now is None


def test_a_large_tensor_is_measured_a_piece_at_a_time_and_as_one() -> None:
    model = nn.Linear(3000, 3000, bias=False)
    with deferred_init():
        again = nn.Linear(3000, 3000, bias=False)
    report = materialize(again)
    with torch.no_grad():
        again.weight.copy_(model.weight).add_(100)
    found = row(report.measure(), "weight")
    assert found.mean_now == pytest.approx(float(again.weight.detach().double().mean()), rel=1e-12)
    assert found.std_now == pytest.approx(float(again.weight.detach().double().std(correction=0)), rel=1e-9)
