"""DeepSpeed: ZeRO-1 and 2 keep full parameters on each rank; ZeRO-3 keeps a flat slice of each.

A model for ZeRO-3 is not built under ``deepspeed.zero.Init``, which initializes each full layer and broadcasts it.
It is recorded, partitioned in ``setup`` while it has no values, and each rank then fills its own slices.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.fabric.strategies.deepspeed as lightning_deepspeed
import torch.distributed as dist
from lightning.fabric.accelerators import CUDAAccelerator
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.seed import reset_seed
from torch import nn
from torch.optim import Optimizer

from fabric_init._lightning_internals import get_deepspeed_engines_from_state
from fabric_init.checkpoints.tensor_checksums import tensor_checksum
from fabric_init.distributed.agreement import SingleProcess
from fabric_init.errors import FabricInitError
from fabric_init.filling.in_setup import choose_own_init, is_bound, left_to_loads, shard_and_fill
from fabric_init.filling.init_missing import initialize_missing
from fabric_init.guard.before_forward import guard_forward
from fabric_init.guard.expected_load import ExpectedLoad
from fabric_init.guard.loads import watch_loads
from fabric_init.guard.waiting_tensors import release_filled, unfilled
from fabric_init.planning.placement import Placement, WholeTensors
from fabric_init.reports.registry import filled_by_us
from fabric_init.strategies.init_context import init_context
from fabric_init.strategies.mixin import DeferredInitMixin
from fabric_init.strategies.optimizers import refuse_left_behind
from fabric_init.strategies.registry import register_strategy
from fabric_init.strategies.unwrap import original, register_wrapper
from fabric_init.strategies.zero3 import (
    ZeroPartitions,
    accept_whole_tensors,
    cast_as_configured,
    partition_without_values,
)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class DeepSpeedStrategy(DeferredInitMixin, lightning_deepspeed.DeepSpeedStrategy):
    """Lightning's strategy of the same name, for every device that DeepSpeed itself runs on.

    With ZeRO-3, models built without values are partitioned in ``setup``, where each rank fills its own slices.
    """

    @property
    def fills_in_setup(self) -> bool:  # type: ignore[override]
        return self.zero_stage_3

    def placement(self, model: nn.Module) -> Placement:
        return ZeroPartitions(model, self.root_device) if self.zero_stage_3 else WholeTensors(self.root_device)

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
        else:  # Lightning's own refuses
            DDPStrategy.setup_environment(self)

    def _setup_distributed(self) -> None:
        if self.root_device.type == "cuda":
            super()._setup_distributed()
            return
        reset_seed()  # as Lightning does, but for the indices of devices, which CPUs have not
        self._set_world_ranks()
        self._init_deepspeed_distributed()
        if not self._config_initialized:
            self._format_config()
            self._config_initialized = True

    def _init_deepspeed_distributed(self) -> None:
        from deepspeed.accelerator import get_accelerator
        from deepspeed.utils import groups

        ours, theirs = self.root_device.type, get_accelerator().device_name()
        if ours != theirs:
            raise FabricInitError(
                f"this Fabric runs on {ours}, but DeepSpeed has chosen {theirs}. Set the environment variable "
                f"DS_ACCELERATOR={ours} before DeepSpeed is imported."
            )
        super()._init_deepspeed_distributed()
        if groups._WORLD_GROUP is None:  # else made while the engine is, with half an hour for it (DeepSpeed 0.19.8)
            groups._WORLD_GROUP = dist.new_group(timeout=self._timeout)

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        # Lightning's builds under zero.Init for ZeRO-3: the model's own init finds no weights there and does nothing
        return init_context(self) if empty_init else Strategy.module_init_context(self, empty_init=empty_init)

    def module_to_device(self, module: nn.Module) -> None:
        if not is_bound(module):
            super().module_to_device(module)

    def setup_module(self, module: nn.Module) -> DeepSpeedEngine:
        expected = self._prepare(module)
        engine = super().setup_module(module)
        self._expect_load(module, expected)
        return engine

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[DeepSpeedEngine, list[Optimizer], Any]:
        # DeepSpeed itself would block the other ranks where it raises on one
        self.agreement.run_together("setting the model up", lambda: _require_one_optimizer(optimizers))
        expected = self._prepare(module)  # parameters stay the same objects, so optimizers hold them still
        refuse_left_behind(optimizers[0], [module])
        theirs = lightning_deepspeed.DeepSpeedStrategy.setup_module_and_optimizers
        engine, optimizers, scheduler = theirs(self, module, optimizers, scheduler)
        if not self.zero_stage_3:
            module.register_load_state_dict_post_hook(lambda *_: refresh_masters(engine))
        self._expect_load(module, expected)
        return engine, optimizers, scheduler

    def _expect_load(self, module: nn.Module, names: Mapping[str, set[str]]) -> None:
        """Let a model refuse to run until the load has come that ``empty_init=True`` promises, or something like it."""
        if names:
            # a rank that has the whole model may run it without the others
            agreement = self.agreement if self.zero_stage_3 else SingleProcess()
            load = ExpectedLoad(module, names, lambda tensor: getattr(tensor, "ds_tensor", tensor), agreement)
            watch_loads(module, load)
            guard_forward(module)

    def _initialize_engine(
        self, model: nn.Module, optimizer: Optimizer | None = None, scheduler: Any = None
    ) -> tuple[DeepSpeedEngine, Optimizer, Any]:
        """Make the engine, for any device, and for ZeRO-1 and 2 without an optimizer, too."""
        import deepspeed

        register_wrapper(deepspeed.DeepSpeedEngine)
        config = self.config
        assert isinstance(config, dict)
        if optimizer is None and not self.zero_stage_3 and "optimizer" not in config:
            # They partition what belongs to the optimizer, and refuse to be without one.
            config = {key: value for key, value in config.items() if key != "zero_optimization"}
        engine, made, _, scheduler = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=scheduler,
            dist_init_required=False,
        )
        self._engines.add(engine)
        if self.zero_stage_3:
            accept_whole_tensors(model, lambda: _refresh_when_filled(engine, model))
        return engine, made, scheduler

    @property
    def _engines(self) -> weakref.WeakSet[Any]:
        engines: weakref.WeakSet[Any] = vars(self).setdefault("_engines_made", weakref.WeakSet())
        return engines

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        # Lightning means to, but does not see that an engine can step. It is the engine that counts micro-batches.
        for engine in self._engines:
            if optimizer is engine.optimizer:
                return engine.step(**kwargs)
        return super().optimizer_step(optimizer, **kwargs)

    def save_checkpoint(self, path: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        for engine in _require_checkpointing(state):
            if (refresh := vars(engine).get(_WAITS)) is not None:
                refresh()
        super().save_checkpoint(path, state, *args, **kwargs)

    def load_checkpoint(self, path: Any, state: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        path = self.broadcast(path)  # as Lightning's, of a file: that of rank 0 counts
        if Path(path).is_file() and not _is_part_of_theirs(Path(path)):  # it is one that any other strategy saved
            with self.loading_into(state):
                return Strategy.load_checkpoint(self, path, state, *args, **kwargs)
        _require_checkpointing(state)
        return super().load_checkpoint(path, state, *args, **kwargs)

    def load_module_state_dict(self, module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Load the full tensors of ``state_dict`` into each rank's part, and into the optimizer's masters."""
        original(module).load_state_dict(state_dict, strict=strict)
        refresh_masters(module)

    def _prepare(self, module: nn.Module) -> dict[str, set[str]]:
        """Partition and fill a recorded model; of any other, make sure that it has one shape on all ranks.

        Returns:
            The tensors that had to get their own init, because no load has brought them, and from which others each
            was computed.
        """
        release_filled(module)
        expected = left_to_loads(module)
        if unfilled(module):  # DeepSpeed copies the weights when it is set up: they have to have values
            choose_own_init(module) if is_bound(module) else initialize_missing(module)
        if not is_bound(module):
            self.agreement.run_together("the model to set up", lambda: module, _lines)
            return expected
        assert isinstance(self.config, dict)
        with cast_as_configured(module, self.config):
            shard_and_fill(module, self.shard, self.placement, self.agreement)
        return expected

    def shard(self, model: nn.Module) -> nn.Module:
        assert isinstance(self.config, dict)
        partition_without_values(model, self.config, self.remote_device)
        return model


def _require_one_optimizer(optimizers: list[Optimizer]) -> None:
    if len(optimizers) != 1 or not isinstance(optimizers[0], Optimizer):
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise TypeError(f"DeepSpeed takes one optimizer: fabric.setup(model, optimizer); this call gave {names}")


def _lines(module: nn.Module) -> dict[str, str]:
    """Return what has to be the same on all ranks, by name: DeepSpeed sends parameters to all, and no buffers."""
    lines = {name: f"{tuple(value.shape)} {value.dtype}" for name, value in module.named_parameters()}
    if filled_by_us(module):
        lines.update((name, tensor_checksum(buffer)) for name, buffer in module.named_buffers() if not buffer.is_meta)
    return lines


register_strategy(DeepSpeedStrategy, instead_of=lightning_deepspeed.DeepSpeedStrategy)


# -- after setup -------------------------------------------------------------------------------------------------------


def refresh_masters(engine: Any) -> None:
    """Make the optimizer's fp32 masters equal the weights, after these were written."""
    refresh = getattr(getattr(engine, "optimizer", None), "refresh_fp32_params", None)
    if refresh is not None:  # not so without ZeRO, or without an optimizer
        refresh()


def _refresh_when_filled(engine: Any, model: nn.Module) -> None:
    """Make the masters anew before they are used: DeepSpeed made them from other values than ``model`` has by now."""
    if _WAITS in vars(engine):
        return

    def refresh(*_: Any) -> None:
        handle.remove()
        del vars(engine)[_WAITS]
        parameters: list[Any] = list(model.parameters())
        for parameter in parameters:
            if hasattr(parameter, "ds_tensor") and parameter.ds_status.name == "AVAILABLE":
                parameter.partition()  # it was gathered while it was uninitialized
        refresh_masters(engine)

    handle = engine.register_forward_pre_hook(refresh)
    vars(engine)[_WAITS] = refresh


_WAITS = "_fabric_init_refresh"


def _is_part_of_theirs(file: Path) -> bool:
    """Return whether ``file`` is one of those in DeepSpeed's own checkpoints, which are folders."""
    return file.name.endswith(("_model_states.pt", "_optim_states.pt"))


def _require_checkpointing(state: Any) -> list[Any]:
    engines = get_deepspeed_engines_from_state(state) if isinstance(state, dict) else []
    if any(getattr(engine, "checkpoint_engine", engine) is None for engine in engines):
        raise FabricInitError(
            "DeepSpeed keeps the weights of a ZeRO-3 checkpoint with the optimizer's, and neither saves nor loads one "
            "without an optimizer. Set both up together: fabric.setup(model, optimizer). A single file with a state "
            "dict can be loaded all the same: fabric.load_raw(path, model)."
        )
    return engines
