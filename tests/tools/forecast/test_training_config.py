"""What can be asked for, and in which numbers it is then kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fabric_init import Fabric
from fabric_init.tools.forecast import TrainingConfig


def test_auto_is_one_device_or_ddp() -> None:
    assert TrainingConfig().strategy == "single_device"
    assert TrainingConfig(devices=2).strategy == TrainingConfig(nodes=2).strategy == "ddp"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"strategy": "fsdp3"}, "strategy='fsdp3' is not known here; known are auto, single_device, ddp, fsdp, fsdp2"),
        ({"precision": "bf16"}, "precision='bf16' is not known here; known are bf16-true"),
        ({"optimizer": "Adam"}, "optimizer='Adam' is not known here"),
        ({"devices": 0}, "devices=0, nodes=1: there has to be at least one of each"),
        ({"strategy": "single_device", "devices": 2}, "is for one rank, and there are 2"),
        ({"strategy": "fsdp2", "precision": "64-true"}, "fsdp2' does not do precision='64-true'; it does bf16-true"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**asked)


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_stage_2"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "32-true", "64-true", "bf16-mixed", "16-mixed"])
def test_what_lightning_refuses_is_refused(strategy: Any, precision: Any) -> None:
    def refused(make: Any) -> bool:
        try:
            make()
        except ValueError:
            return True
        return False

    theirs = refused(lambda: Fabric(accelerator="cpu", devices=1, strategy=strategy, precision=precision))
    assert refused(lambda: TrainingConfig(strategy, precision=precision)) == theirs


@pytest.mark.parametrize(
    ("strategy", "precision", "kept", "masters"),
    [
        ("ddp", "bf16-true", torch.bfloat16, None),
        ("ddp", "64-true", torch.float64, None),
        ("fsdp2", "bf16-mixed", None, None),
        ("fsdp", "16-mixed", None, None),
        ("deepspeed_stage_3", "bf16-mixed", torch.bfloat16, torch.float32),
        ("deepspeed_stage_2", "32-true", None, torch.float32),
    ],
)
def test_numbers_are_those_of_lightnings_precision_plugins(
    strategy: Any, precision: Any, kept: torch.dtype | None, masters: torch.dtype | None
) -> None:
    dtypes = TrainingConfig(strategy, devices=2, precision=precision).dtypes
    assert (dtypes.kept, dtypes.masters) == (kept, masters)
