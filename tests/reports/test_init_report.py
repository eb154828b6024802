"""What the report says: each row, its words, and the file and line of the rule that won."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fabric_init import Fabric, FabricInitError, InitReport, OptionError, deferred_init, materialize
from fabric_init.reports.registry import report_of
from fabric_init.reports.rows import InitRow


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(4)
        self.register_buffer("angles", torch.arange(4.0), persistent=False)
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        nn.init.normal_(self.norm.bias, std=0.5)  # the last word on norm.bias


def line_of(text: str) -> str:
    """The line as the report gives it, whatever folder of ``sys.path`` it is told from."""
    source, start = inspect.getsourcelines(Model)
    return f"test_init_report.py:{start + next(i for i, line in enumerate(source) if text in line)}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {**Model().state_dict(), "count": torch.ones(1, dtype=torch.int64)}
    state["norm.weight"] = state["norm.weight"].bfloat16()
    torch.save(state, tmp_path / "m.pt")
    return tmp_path / "m.pt"


def recorded() -> Model:
    with deferred_init():
        return Model()


def rows(report: InitReport) -> dict[str, InitRow]:
    return {row.name: row for row in report.rows}


def test_the_winning_rule_is_given_with_its_arguments_and_the_models_own_line() -> None:
    report = rows(materialize(recorded()))
    assert report["norm.bias"].origin.startswith("normal_(mean=0, std=0.5) at ")
    assert report["norm.bias"].origin.endswith(line_of("# the last word"))
    assert report["embedding.weight"].origin.startswith("normal_(")
    assert report["embedding.weight"].origin.endswith(line_of("nn.Embedding"))
    assert report["norm.weight"].origin.endswith(line_of("nn.LayerNorm"))
    assert report["angles"].origin.startswith("arange(")
    assert report["angles"].origin.endswith(line_of("torch.arange"))
    assert {row.status for row in report.values()} == {"initialized"}


def test_a_loaded_row_has_its_checkpoint_keys_its_cast_and_its_ties(path: Path) -> None:
    report = rows(materialize(recorded(), checkpoint=path))
    assert report["embedding.weight"] == InitRow(
        name="embedding.weight",
        status="loaded",
        shape=(6, 4),
        dtype="float32",
        kind="parameter",
        origin="embedding.weight, head.weight",
        cast_from=None,
        ties=("head.weight",),
    )
    assert report["norm.weight"].cast_from == "bfloat16"
    assert report["norm.weight"].dtype == "float32"
    assert "head.weight" not in report
    assert report["angles"].status == "initialized"
    assert report["angles"].kind == "non-persistent buffer"


@pytest.mark.parametrize("options", [{"empty_init": True}, "checkpoint"], ids=["empty_init", "checkpoint"])
def test_rows_are_in_module_order(options: object, path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(**({"checkpoint": path} if options == "checkpoint" else options)):
        model = Model()
    fabric.init_missing(model)
    expected = [row.name for row in materialize(recorded()).rows]
    assert [row.name for row in fabric.init_report(model).rows] == expected


def test_str_gives_counts_checkpoint_casts_unexpected_keys_and_ties(path: Path) -> None:
    state = {**torch.load(path), "more": torch.ones(1)}
    torch.save({"model": state}, path)
    text = str(materialize(recorded(), checkpoint=path, strict=False, reinit=["norm.bias"]))
    lines = text.splitlines()
    assert lines[0].startswith("5 tensors: 3 loaded (")
    assert "2 initialized (" in lines[0]
    assert f"checkpoint: {path} (state dict found under 'model')" in lines
    assert "cast: 1 tensors bfloat16 → float32" in lines
    assert "ignored: 1 checkpoint key that the model does not have: more" in lines
    assert any("embedding.weight" in line and "= head.weight" in line and "6×4" in line for line in lines)
    assert any(line.split()[:2] == ["norm.bias", "initialized"] for line in lines)


def test_a_long_report_shows_what_was_not_loaded_first() -> None:
    loaded = [InitRow(name=f"w{i}", status="loaded", shape=(1,), dtype="float32") for i in range(100)]
    odd = InitRow(
        name="odd", status="initialized", shape=(), dtype="bfloat16", kind="buffer", origin="zeros() at m.py:1"
    )
    report = InitReport((*loaded, odd))
    lines = str(report).splitlines()
    assert lines[1].split() == ["odd", "initialized", "scalar", "bfloat16", "zeros()", "at", "m.py:1"]
    assert "and 71 more" in lines[-1]
    assert len(lines) < 40


def test_to_dict_is_plain_data_and_save_writes_it_as_json(path: Path, tmp_path: Path) -> None:
    state = {**torch.load(path), "more": torch.ones(1)}
    torch.save(state, path)
    report = materialize(recorded(), checkpoint=path, strict=False)
    data = report.to_dict()
    report.save(tmp_path / "größe.json")
    assert json.loads((tmp_path / "größe.json").read_text(encoding="utf-8")) == data
    with pytest.raises(OptionError, match=r"report.xlsx': a report is saved as .html or .json"):
        report.save(tmp_path / "report.xlsx")
    assert data["checkpoint"] == str(path)
    assert data["complete"] is True
    assert data["counts"] == {"loaded": 4, "initialized": 1}
    assert data["unexpected"] == ["more"]
    by_name = {row["name"]: row for row in data["tensors"]}
    assert by_name["embedding.weight"]["ties"] == ["head.weight"]
    assert by_name["embedding.weight"]["shape"] == [6, 4]
    assert by_name["norm.weight"]["cast_from"] == "bfloat16"


def test_the_size_of_a_row_is_that_of_the_tensor() -> None:
    assert InitRow(name="x", status="loaded", shape=(3, 5), dtype="bfloat16").nbytes == 30
    assert InitRow(name="x", status="loaded", shape=(), dtype="int64", kind="buffer").nbytes == 8


def test_an_incomplete_report_says_so_and_completes_by_and_by() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(empty_init=True):
        model = Model()
    report = fabric.init_report(model)
    assert not report.complete
    assert report.count("unfilled") == 4
    assert "4 unfilled" in str(report)
    nn.init.ones_(model.norm.weight)
    assert rows(fabric.init_report(model))["norm.weight"].status == "written by the user"
    fabric.init_missing(model)
    report = fabric.init_report(model)
    assert report.complete
    assert rows(report)["norm.bias"].origin.endswith(line_of("# the last word"))


def test_the_report_goes_with_the_model_and_not_with_others() -> None:
    model = recorded()
    report = materialize(model)
    assert report_of(model) == report
    with pytest.raises(FabricInitError, match=r"no init report for this LayerNorm(.|\n)*outermost"):
        report_of(model.norm)
