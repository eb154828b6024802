"""What ``fabric_init.audit`` takes, and what it says of models whose init is wrong in one known way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fabric_init
from fabric_init import audit, deferred_init
from fabric_init.errors import RecordingError
from fabric_init.tools.audit.findings import AuditRow, Finding, Level
from fabric_init.tools.audit.report import AuditReport
from tests.tools.audit import models


def only(report: AuditReport, check: str) -> Finding:
    """The one finding of a check."""
    found = [finding for finding in report.findings if finding.check == check]
    assert len(found) == 1, f"{len(found)} of {check}:\n{report}"
    return found[0]


def row(report: AuditReport, name: str) -> AuditRow:
    return next(one for one in report.rows if one.name == name)


def serious(report: AuditReport) -> list[Finding]:
    return [finding for finding in report.findings if finding.level > Level.NOTE]


def test_a_recorded_model_and_a_callable_give_the_same_report() -> None:
    with deferred_init():
        model = models.Plain()
    one, other = audit(model), audit(models.Plain)
    assert [(one.name, one.rule, one.std) for one in one.rows] == [(r.name, r.rule, r.std) for r in other.rows]
    assert one.model == "Plain"


def test_an_audit_leaves_the_model_and_torchs_random_numbers_alone() -> None:
    with deferred_init():
        model = models.ThreeLevels()
    before = torch.get_rng_state()
    audit(model)
    assert torch.equal(torch.get_rng_state(), before)
    fabric_init.materialize(model)
    assert float(model.get_parameter("body.blocks.0.up.weight").detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("filled", ["materialize", "Fabric"])
def test_a_model_that_was_recorded_and_then_filled_can_still_be_audited(filled: str) -> None:
    if filled == "materialize":
        with deferred_init():
            model = models.Undone()
        fabric_init.materialize(model)
    else:
        fabric = fabric_init.Fabric(accelerator="cpu", devices=1)
        with fabric.init_module(empty_init=True):
            model = models.Undone()
        fabric.init_missing(model)
    assert only(audit(model), "two-rules").tensors == ("project.weight",)


def test_with_a_batch_the_model_is_run_unless_it_has_no_values(tmp_path: Path) -> None:
    batch = torch.ones(2, models.WIDTH)
    report = audit(lambda: nn.Sequential(nn.Linear(models.WIDTH, 8), nn.Linear(8, 4)), batch)
    assert [layer.name for layer in report.layers]
    assert audit(models.Unwritten, batch).layers == ()


def test_a_model_without_a_recording_is_refused_with_the_way_to_record_it() -> None:
    with pytest.raises(RecordingError, match=r"Linear was built eagerly(.|\n)*with fabric_init\.deferred_init\(\):"):
        audit(nn.Linear(2, 2))


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="got int"):
        audit(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the callable returned int"):
        audit(lambda: 3)  # type: ignore[arg-type, return-value]


def test_a_row_tells_the_rule_its_line_and_what_it_gives() -> None:
    up = row(audit(models.Plain), "blocks.1.up.weight")
    assert (up.rule, up.line) == ("normal_(mean=0, std=0.02)", models.line_of("the general rule"))
    assert up.file is not None
    assert Path(up.file).name == "models.py"
    assert (up.mean, up.std, up.module_class, up.dtype) == (0.0, 0.02, "Linear", "float32")
    assert up.shape == (2 * models.WIDTH, models.WIDTH)
    default, own = up.writes
    assert (default.rule.split("(")[0], default.wasted, own.wasted) == ("kaiming_uniform_", True, False)
    assert (up.full_writes, up.wasted_elements) == (2, up.elements)
    assert up.wasted_seconds > 0


def test_a_sound_model_has_nothing_worse_than_notes() -> None:
    report = audit(models.Plain)
    assert serious(report) == []
    assert {finding.check for finding in report.findings} == {"two-rules", "overwritten-default"}
    assert only(report, "two-rules").tensors == tuple(f"blocks.{i}.down.weight" for i in range(3))


def test_three_levels_that_each_initialize_everything_are_told_and_what_they_waste() -> None:
    report = audit(models.ThreeLevels)
    found = [finding for finding in report.findings if finding.check == "written-more-than-once"]
    weights = next(finding for finding in found if "body.blocks.0.up.weight" in finding.tensors)
    assert weights.level is Level.WARNING
    assert "initialized 3× by the model's own code: 3× normal_(mean=0, std=0.02) at " in weights.evidence
    assert f"models.py:{models.line_of('the general rule')}" in weights.evidence
    dead = 2 * 4 * 2 * models.WIDTH**2  # two of three writes, to four weights
    assert f"Overwritten before being read: {dead:,} elements, " in weights.evidence
    assert row(report, "body.blocks.0.up.weight").full_writes == 4  # torch's own, too


def test_two_rules_that_disagree_are_named_with_both_lines() -> None:
    conflict = only(audit(models.Undone), "two-rules")
    assert conflict.level is Level.WARNING
    assert conflict.tensors == ("project.weight",)
    special, general = (models.line_of(mark) for mark in ("the special rule", "the general rule"))
    assert f"models.py:{special}, and last normal_(mean=0, std=0.02) at " in conflict.evidence
    assert f"models.py:{general}, which wins" in conflict.evidence


def test_a_parameter_that_nobody_writes_is_an_error_and_so_is_one_written_in_part() -> None:
    report = audit(models.Unwritten)
    found = {f.tensors[0]: f for f in report.findings if f.check == "never-written"}
    assert set(found) == {"gate", "table"}
    assert report.worst is Level.ERROR
    assert "no op writes it" in found["gate"].evidence
    assert "leave a part as torch.empty allocated it" in found["table"].evidence
    assert row(report, "gate").std is None
    assert row(report, "fine").std == pytest.approx(0.5)


def test_a_layer_that_was_forgotten_stands_out_from_its_twins() -> None:
    report = audit(models.Forgotten)
    twins = [finding for finding in report.findings if finding.check == "differs-between-twins"]
    assert {finding.level for finding in twins} == {Level.WARNING}
    assert {name for finding in twins for name in finding.tensors} == {
        f"blocks.2.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")
    }
    left = {finding.level: finding.tensors for finding in report.findings if finding.check == "default-init"}
    assert left == {Level.WARNING: ("blocks.2.up.weight", "blocks.2.down.weight"), Level.NOTE: ("conv.weight",)}


@pytest.mark.parametrize(
    "build",
    [
        models.DepthScaled,
        models.ZeroedHead,
        models.Tied,
        models.Block,
        lambda: nn.Transformer(8, 2, 1, 1, 8, batch_first=True),
        lambda: nn.LSTM(4, 4, 2),
    ],
    ids=["depth-scaled", "a zeroed layer", "tied", "torch's own init alone", "torch's transformer", "torch's LSTM"],
)
def test_nothing_is_said_of(build: Callable[[], nn.Module]) -> None:
    assert serious(audit(build)) == []


def test_values_that_are_not_finite_have_no_moments() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
            self.register_buffer("none", torch.full((3,), float("nan")))

    assert [(one.mean, one.std) for one in audit(Masked).rows] == [(None, None), (None, None)]


def test_a_tied_weight_has_one_row_with_both_names() -> None:
    report = audit(models.Tied)
    assert [(one.name, one.ties) for one in report.rows] == [("embed.weight", ("head.weight",))]
    assert report.rows[0].rule == "normal_(mean=0, std=1), then fill_(0) in a part"
    assert report.rows[0].std == pytest.approx((9 / 10) ** 0.5)


def test_a_report_is_saved_as_json_that_holds_all_of_it(tmp_path: Path) -> None:
    report = audit(models.Unwritten)
    report.save(tmp_path / "audit.json")
    loaded = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert loaded["worst"] == "error"
    assert loaded["counts"]["error"] == 2
    assert [one["name"] for one in loaded["rows"]] == [one.name for one in report.rows]
    assert loaded["rows"][0]["std"] is None
    assert "error [never-written] gate" in str(report)


def test_numbers_that_are_not_finite_are_null_in_json() -> None:
    assert AuditReport("Model", (), first_loss=float("nan")).to_dict()["first_loss"] is None
