"""A forecast as a whole: what goes in, what comes out, and that nothing is read or built on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fabric_init import CheckpointNotFoundError, OptionError, deferred_init, forecast, materialize
from fabric_init.checkpoints import open_checkpoint
from fabric_init.checkpoints.formats.safetensors import SafetensorsReader

Build = Callable[[], nn.Module]
Save = Callable[..., Path]


def test_no_weight_is_read(build: Build, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save()

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(SafetensorsReader, "read", refuse)
    assert forecast(build, path, strategy="deepspeed_stage_3", devices=2).complete
    with pytest.raises(AssertionError, match="a weight was read"):
        open_checkpoint(path).read("norm.weight")


def test_its_text_is_the_gist_of_it(build: Build, save: Save) -> None:
    path = save({"norm.weight": None, "other": torch.ones(3)}, dtype=torch.float64)
    lines = str(forecast(build, path, strategy="fsdp2", devices=2)).splitlines()
    assert lines[0] == f"Model from {path} (safetensors): not complete"
    assert lines[1].startswith("covers 7 of 8 tensors, ")
    assert lines[2:5] == ["cast: 6 tensors float64 → float32", "missing: norm.weight", "not in the model: other"]
    assert lines[-1].startswith("fsdp2, ranks: 2, 32-true, adamw: a rank reads ")
    assert str(forecast(build)).startswith("Model from scratch: complete\n")


def test_a_model_of_more_memory_than_any_machine_has_is_no_trouble() -> None:
    found = forecast(lambda: nn.Linear(1 << 22, 1 << 22, bias=False), strategy="fsdp2", devices=8, nodes=128)
    assert found.memory.weights == 4 << 34


def test_a_recorded_model_can_still_be_filled_afterwards(build: Build, save: Save) -> None:
    path = save()
    with deferred_init():
        model = build()
    assert forecast(model, path, precision="bf16-true") == forecast(build, path, precision="bf16-true")
    materialize(model, checkpoint=path)
    assert model.get_parameter("norm.weight").dtype == torch.float32


def test_a_model_with_memory_can_be_asked_about_too(build: Build, save: Save) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert forecast(model, save()).complete
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_constructor_runs_under_the_precision() -> None:
    dtypes = []

    def build() -> nn.Module:
        dtypes.append(torch.get_default_dtype())
        return nn.Linear(2, 2)

    for precision in ("bf16-true", "16-true", "32-true", "64-true", "bf16-mixed"):
        forecast(build, precision=precision)  # type: ignore[arg-type]
    assert dtypes == [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float32]


def test_it_is_plain_data(build: Build, save: Save) -> None:
    path = save({"norm.weight": None, "more": torch.zeros(2)})
    found = forecast(build, path, strategy="fsdp2", devices=2, bandwidth=1e9)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["complete"] is False
    assert data["coverage"]["missing"][0]["name"] == "norm.weight"
    assert data["coverage"]["unexpected"][0] == {"key": "more", "shape": [2], "dtype": "float32", "bytes": 8}
    assert data["memory"]["peak"] == found.memory.peak
    assert len(data["reading"]["by_rank"]) == 2


def test_a_wrong_call_raises(build: Build, save: Save, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        forecast(build, tmp_path / "nothing.safetensors")
    with pytest.raises(OptionError, match="names no tensor of the model"):
        forecast(build, save(), reinit=["body.*"])
    with pytest.raises(ValueError, match="bandwidth must be a positive number of bytes per second, got 0"):
        forecast(build, bandwidth=0)
    with pytest.raises(TypeError, match="a module or a callable that builds one, got int"):
        forecast(lambda: 3)  # type: ignore[arg-type, return-value]
