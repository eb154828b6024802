"""The strategies of the Trainer for two ranks, also those that Lightning keeps from the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.support.zoo import prepare_deepspeed


class FSDPOnCPU(FSDPStrategy):
    """Names the device, which Lightning takes for the number of a GPU."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), sharding_strategy=self.sharding_strategy, **self.kwargs
        )


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """Leaves out the checks for GPUs."""

    def setup_environment(self) -> None:
        prepare_deepspeed(self)  # type: ignore[arg-type]
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> Any:
        import deepspeed

        parameters = [p for p in model.parameters() if p.requires_grad]
        return deepspeed.initialize(
            config=self.config,
            model=model,
            model_parameters=parameters,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )[:2]


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ddp": DDPStrategy,
    "model parallel": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    "model parallel, one file": lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=False),
    "fsdp": FSDPOnCPU,
    "deepspeed 1": lambda: DeepSpeedOnCPU(stage=1),
    "deepspeed 2": lambda: DeepSpeedOnCPU(stage=2),
    "deepspeed 3": lambda: DeepSpeedOnCPU(stage=3),
    "deepspeed 3 with offload": lambda: DeepSpeedOnCPU(stage=3, offload_parameters=True),
}
