"""All that loading would raise, and what it would do, is in one answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_init import CheckpointMismatchError, deferred_init, forecast, materialize
from fabric_init.tools.forecast import Amount, Cast

Build = Callable[[], nn.Module]
Save = Callable[..., Path]


def line_of(build: Build, text: str) -> str:
    import inspect

    lines, first = inspect.getsourcelines(build)
    return str(first + next(number for number, line in enumerate(lines) if text in line))


def test_a_whole_checkpoint_covers_everything(build: Build, save: Save) -> None:
    found = forecast(build, save())
    coverage = found.coverage
    nbytes = 4 * (40 + 2 * (16 + 4) + 8) + 8
    assert found.complete
    assert coverage.wanted == coverage.loaded == Amount(8, nbytes)
    assert coverage.missing == coverage.unexpected == coverage.casts == coverage.wrong_shapes == ()
    assert coverage.proposed == coverage.problems == coverage.without_values == ()


def test_what_is_missing_comes_with_its_rule_and_line(build: Build, save: Save) -> None:
    path = save({"embedding.weight": None, "head.weight": None, "norm.bias": None})
    coverage = forecast(build, path).coverage
    embedding, norm = coverage.missing
    assert (embedding.name, embedding.shape, embedding.bytes) == ("embedding.weight", (10, 4), 160)
    assert embedding.rule.startswith("normal_(mean=0, std=0.02) at ")
    assert embedding.rule.endswith(f"conftest.py:{line_of(build, 'nn.init.normal_')}")
    assert norm.rule.startswith("zeros_() at ")
    assert not coverage.complete
    assert forecast(build, path, strict=False).complete


def test_every_trouble_is_told_at_once(build: Build, save: Save) -> None:
    path = save(
        {
            "norm.weight": None,
            "norm.gamma": torch.ones(4),
            "layers.0.weight": torch.zeros(4, 5),
            "layers.1.bias": torch.zeros(4, dtype=torch.int64),
        }
    )
    coverage = forecast(build, path).coverage
    assert [one.name for one in coverage.missing] == ["norm.weight"]
    assert [one.key for one in coverage.unexpected] == ["norm.gamma"]
    shape, dtype = coverage.wrong_shapes
    assert (shape.name, shape.model_shape, shape.checkpoint_shape) == ("layers.0.weight", (4, 4), (4, 5))
    assert "no cast keeps its meaning" in dtype.problem
    assert any("gamma" in proposed for proposed in coverage.proposed)
    assert coverage.loaded.tensors == 5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm.weight": None},
        {"more": torch.zeros(1)},
        {"norm.weight": None, "norm.gamma": torch.ones(4)},
        {"layers.0.weight": torch.zeros(4, 5)},
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"strict": False}, {"reinit": ["layers.0.*"]}, {"rename": {"gamma$": "weight"}}]
)
def test_complete_means_that_loading_goes_through(
    changes: dict[str, Any], options: dict[str, Any], build: Build, save: Save
) -> None:
    path = save(changes)
    with deferred_init():
        model = build()
    try:
        report = materialize(model, checkpoint=path, **options)
    except CheckpointMismatchError:
        assert not forecast(build, path, **options).complete
    else:
        found = forecast(build, path, **options)
        assert found.complete
        assert found.coverage.loaded.tensors == report.count("loaded")


def test_another_models_checkpoint_is_not_complete_however_lenient(build: Build, save: Save) -> None:
    path = save()
    assert not forecast(lambda: nn.LSTM(2, 2), path, strict=False).complete


def test_proposed_renames_are_those_of_the_error(build: Build, save: Save) -> None:
    path = save()
    rename = {"^": "model."}
    with deferred_init():
        model = build()
    with pytest.raises(CheckpointMismatchError) as refused:
        materialize(model, checkpoint=path, rename=rename)
    proposed = forecast(build, path, rename=rename).coverage.proposed
    assert proposed
    for sentence in proposed:
        assert f"Likely: {sentence}" in str(refused.value)


def test_a_transpose_is_proposed_where_a_shape_says_so_and_not_for_squares(build: Build, save: Save) -> None:
    path = save({"layers.0.weight": torch.zeros(4, 5)})
    assert forecast(build, path).coverage.proposed == ()
    turned = save({"embedding.weight": torch.zeros(4, 10), "head.weight": None})
    assert "Transpose" in forecast(build, turned).coverage.proposed[0]


def test_casts_are_counted_by_dtype(build: Build, save: Save) -> None:
    path = save(dtype=torch.float32)
    assert forecast(build, path, precision="bf16-true").coverage.casts == (Cast("float32", "bfloat16", 7, 352),)
    assert forecast(build, save(dtype=torch.bfloat16), precision="bf16-true").coverage.casts == ()


class Garbage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.garbage = nn.Parameter(torch.empty(3))


def test_what_nobody_gives_a_value_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.ModuleDict({"linear": nn.Linear(2, 2)}).state_dict(), path)
    coverage = forecast(Garbage, path, strict=False).coverage
    assert coverage.without_values == ("garbage",)
    assert not coverage.complete


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


def test_what_fsdp2_refuses_is_named_before() -> None:
    assert forecast(Scalar).complete
    found = forecast(Scalar, strategy="fsdp2", devices=2)
    assert not found.complete
    assert "without dimensions: scale" in found.coverage.problems[0]


class Counting(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"steps": 3} if self.bias is None else torch.ones(2)

    def set_extra_state(self, state: Any) -> None:
        pass


def test_extra_state_is_covered_as_tensors_are(tmp_path: Path) -> None:
    def counting() -> nn.Module:
        return nn.Sequential(Counting(2, 2), Counting(2, 2, bias=False), nn.Linear(2, 2))

    state = counting().state_dict()
    torch.save(state | {"2._extra_state": {"a": 1}, "_extra_state": torch.ones(3)}, tmp_path / "more.pt")
    left_over = forecast(counting, tmp_path / "more.pt").coverage.unexpected
    assert [(one.key, one.bytes) for one in left_over] == [("_extra_state", 12), ("2._extra_state", 0)]
    torch.save({f"net.{key}": value for key, value in state.items()}, tmp_path / "renamed.pt")
    proposed = forecast(counting, tmp_path / "renamed.pt").coverage.proposed
    assert proposed == (r'rename={r"^net\.": ""} would match all 7 missing keys',)
