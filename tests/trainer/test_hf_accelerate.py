"""What ``FillModel`` makes of an ``Accelerator``, in one process; the stacks on it are in ``tests/stacks``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fabric_init import FillModel, UninitializedTensorError, deferred_init, init_report
from fabric_init.errors import CheckpointMismatchError, OptionError, RecordingError
from tests.stacks.hugging_face import forget
from tests.trainer.models import Net, different, weights

accelerate = pytest.importorskip("accelerate")


@pytest.fixture
def accelerator() -> Iterator[Any]:
    forget()
    yield accelerate.Accelerator(cpu=True)
    forget()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(Net().state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def recorded() -> Any:
    with deferred_init():
        return Net()


def loaded(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    model = Net()
    model.load_state_dict(load_file(path))
    return weights(model)


@pytest.mark.parametrize("prepare", ["prepare", "prepare_model"])
def test_a_recorded_model_has_its_values_when_it_is_prepared(accelerator: Any, path: Path, prepare: str) -> None:
    assert FillModel(path).attach(accelerator) is accelerator
    model = getattr(accelerator, prepare)(recorded())
    assert different(weights(model), loaded(path)) == []


def test_its_class_keeps_its_name_and_what_comes_without_a_model_is_prepared_as_before(accelerator: Any) -> None:
    FillModel().attach(accelerator)
    assert type(accelerator).__name__ == "Accelerator"
    assert isinstance(accelerator, accelerate.Accelerator)
    optimizer = accelerator.prepare(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
    assert type(optimizer).__name__ == "AcceleratedOptimizer"


def test_a_model_that_was_filled_may_be_prepared_again(accelerator: Any, path: Path) -> None:
    FillModel(path).attach(accelerator)
    model = accelerator.prepare(recorded())
    with torch.no_grad():
        model.head.weight.zero_()
    assert not accelerator.prepare(model).head.weight.any()


def test_without_attach_it_has_none_and_says_so(accelerator: Any) -> None:
    with pytest.raises(UninitializedTensorError, match=r"head\.weight"):
        accelerator.prepare(recorded())(torch.ones(1, 4))


def test_a_checkpoint_for_a_model_that_was_built_with_values_is_refused(accelerator: Any, path: Path) -> None:
    FillModel(path).attach(accelerator)
    with pytest.raises(RecordingError, match="built with values"):
        accelerator.prepare(Net())


def test_two_callbacks_are_refused(accelerator: Any, path: Path) -> None:
    FillModel(path).attach(accelerator)
    with pytest.raises(OptionError, match="another FillModel"):
        FillModel().attach(accelerator)


class Adapted(nn.Module):
    """A model of the kind that peft makes, around ``base``: names of its own, and real adapters."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.model = base
        self.prompt = nn.Parameter(torch.ones(2))

    def get_base_model(self) -> Any:
        return self.model


PeftModel = type("PeftModel", (Adapted,), {})


def test_a_checkpoint_is_for_the_base_of_a_model_of_peft(accelerator: Any, path: Path) -> None:
    FillModel(path, reinit=["head.*"]).attach(accelerator)
    model = accelerator.prepare(PeftModel(recorded()))
    rows = {row.name: row.status for row in init_report(model).rows}
    assert {name for name, status in rows.items() if status == "initialized"} >= {"model.head.weight"}
    assert rows["model.body.0.weight"] == "loaded"
    assert torch.equal(model.model.body[0].weight, loaded(path)["body.0.weight"])
    assert torch.equal(model.prompt, torch.ones(2))


def test_a_base_that_is_not_in_the_checkpoint_is_a_mismatch(accelerator: Any, tmp_path: Path) -> None:
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    FillModel(tmp_path / "other.safetensors").attach(accelerator)
    with pytest.raises(CheckpointMismatchError, match=r"model\.body\.0\.weight"):
        accelerator.prepare(PeftModel(recorded()))
