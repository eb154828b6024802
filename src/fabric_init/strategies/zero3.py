"""ZeRO-3: each rank keeps a flat slice of every parameter, which DeepSpeed's ``zero.Init`` cuts and we fill."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.checkpoints import Region, Span
from fabric_init.checkpoints.region import take
from fabric_init.errors import FabricInitError, OptionError
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.mode import RecordMode
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, become
from fabric_init.recording.tensor.wrappers import is_wrapper

Config = Mapping[str, Any] | str | os.PathLike[str]
"""DeepSpeed's configuration, or the path of a JSON file with it."""


_BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def stage_3_config(config: Config) -> dict[str, Any] | None:
    """Return DeepSpeed's configuration as a dictionary; ``None`` if it does not partition parameters.

    Sizes of batches are left out. They do not matter for partitions, and Hugging Face's configurations may say
    ``"auto"`` for them until the data is known, which DeepSpeed cannot read.

    Raises:
        OptionError: The file is none, or not one of JSON.
    """
    if isinstance(config, Mapping):
        read = dict(config)
    else:
        try:
            read = dict(json.loads(Path(config).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise OptionError(f"deepspeed={os.fspath(config)!r} is no JSON file with an object: {error}") from error
    if (read.get("zero_optimization") or {}).get("stage") != 3:
        return None
    return {key: value for key, value in read.items() if key not in _BATCHES} | {"train_micro_batch_size_per_gpu": 1}


@contextmanager
def built_whole() -> Iterator[None]:
    """Context in which transformers builds whole models, also when it knows of a configuration with ZeRO-3.

    It would partition each module as soon as that is built, for which rank 0 sends values, and draw anew afterwards.
    A recorded model has no values to send, and is partitioned when it is complete.
    """
    theirs: Any = sys.modules.get("transformers.integrations.deepspeed")
    found = getattr(theirs, "_hf_deepspeed_config_weak_ref", None)
    config = None if found is None else found()
    if config is None or not config.is_zero3():
        yield
        return
    theirs.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if theirs.deepspeed_config() is None:  # else the block has said something new
            theirs.set_hf_deepspeed_config(config)


@contextmanager
def cast_as_configured(module: nn.Module, config: Mapping[str, Any]) -> Iterator[None]:
    """Cast recorded parameters to the dtype that DeepSpeed will cast them to, and that ZeRO-3 expects them to have.

    If the context fails and they are still recorded, they are as they were.

    Raises:
        FabricInitError: Parameters are DTensors, or quantized ones of a class that cannot be partitioned.
        OptionError: The configuration leaves the dtype open.
    """
    if kinds := {type(parameter).__name__ for parameter in module.parameters() if is_wrapper(parameter)}:
        raise FabricInitError(
            f"the model has parameters of {', '.join(sorted(kinds))}, which DeepSpeed cannot partition. Choose another "
            "stage than 3, or fully_shard where that class can be sharded."
        )
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
    if open_ones := [name for name in names if (config.get(name) or {}).get("enabled") == "auto"]:
        raise OptionError(
            f'deepspeed=…: {open_ones[0]} is "auto", so the dtype of the parameters is not known. Pass what Hugging '
            "Face has made of it: accelerator.state.deepspeed_plugin.deepspeed_config of the Accelerator, which a "
            "Trainer has as trainer.accelerator."
        )
    chosen = [dtype for name, dtype in names.items() if (config.get(name) or {}).get("enabled") is True]
    parameters = [p for p in module.parameters() if p.is_floating_point()] if chosen else []
    before = [(parameter, parameter.data) for parameter in parameters]
    with RecordMode():  # the cast belongs to the recording, too
        for parameter in parameters:
            parameter.data = parameter.data.to(chosen[0])
    try:
        yield
    except BaseException:
        for parameter, data in before:
            if isinstance(parameter, RecordedTensor):
                parameter.data = data
        raise


def partitioned(model: nn.Module, config: Mapping[str, Any], device: torch.device | None) -> ZeroPartitions:
    """Partition a recorded model outside any strategy, and return how this rank then keeps it.

    Args:
        model: The model.
        config: DeepSpeed's configuration.
        device: The device for full tensors; ``None`` for that of DeepSpeed's accelerator.

    Raises:
        FabricInitError: ``deepspeed.init_distributed`` was not called.
    """
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator

    if not comm.is_initialized():
        raise FabricInitError("ZeRO-3 partitions over the ranks of DeepSpeed: call deepspeed.init_distributed() first.")
    partition_without_values(model, config)
    return ZeroPartitions(model, device or torch.device(get_accelerator().current_device_name()))


def partition_without_values(module: nn.Module, config: Mapping[str, Any], remote_device: str | None = None) -> None:
    """Turn each parameter of ``module``, which stays the same object, into one that DeepSpeed has partitioned.

    Where it has no memory yet, none is allocated, ``ds_tensor`` is on the meta device, and ranks do not communicate.
    Values are those of rank 0, as DeepSpeed has it: ranks may have drawn different adapters. As ``fabric_init_place``
    each ``ds_tensor`` has its later device, and whether it is to be pinned.

    Raises:
        FabricInitError: The configuration says to keep partitions where they cannot be filled.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    _refuse_unknown_places(config["zero_optimization"], remote_device)

    class Partitions(deepspeed.zero.Init):  # type: ignore[misc]
        local_device: Any
        remote_device: Any
        pin_memory: bool

        def _convert_to_zero_parameters(self, param_list: Iterable[Any]) -> None:
            """Partition recorded parameters from a meta tensor, and those with values as DeepSpeed does."""
            real = (self.local_device, self.remote_device, self.pin_memory)
            for parameter in param_list:
                if is_zero_param(parameter):
                    continue
                recorded = isinstance(parameter, RecordedTensor)
                if recorded:
                    with DisableTorchFunction(), torch.no_grad():
                        become(parameter, parameter._meta.detach(), alone=True)
                    self.local_device = self.remote_device = torch.device("meta")
                    self.pin_memory = False
                try:
                    if recorded:
                        self._convert_to_deepspeed_param(parameter)
                        parameter.partition()
                    else:
                        super()._convert_to_zero_parameters([parameter])
                finally:
                    self.local_device, self.remote_device, self.pin_memory = real
                local, remote, pinned = real
                place = (local, False) if parameter.ds_persist else (torch.device(remote), pinned)
                parameter.ds_tensor.fabric_init_place = place
                parameter.ds_secondary_tensor = None  # hpZeRO's copy within a node: made anew after the next gather
                if recorded:
                    become(parameter, torch.empty(0, dtype=parameter.dtype, device=local))

    Partitions(module=module, config_dict_or_path=config, remote_device=remote_device)


def _refuse_unknown_places(zero: Mapping[str, Any], remote_device: str | None) -> None:
    if zero.get("zero_quantized_nontrainable_weights"):
        raise FabricInitError(
            "fabric_init cannot fill weights that DeepSpeed quantizes when it partitions them. Turn "
            "zero_quantized_nontrainable_weights off, or build with init_module() alone, in no recorded block."
        )
    if "nvme" in ((zero.get("offload_param") or {}).get("device"), remote_device):
        raise FabricInitError(
            "fabric_init cannot fill parameters that DeepSpeed offloads to NVMe: their partitions are in files of "
            "its own. Offload them to the CPU, or build with init_module() alone, in no recorded block."
        )


class ZeroPartitions:
    """A placement for parameters that DeepSpeed has partitioned (ZeRO-3), beside full tensors.

    Args:
        model: The partitioned model.
        device: The device for full tensors, such as buffers.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        named = model.named_parameters(remove_duplicate=False)
        self._parameters: dict[str, Any] = {name: each for name, each in named if hasattr(each, "ds_tensor")}

    def device(self, slot: TensorInfo) -> torch.device:
        parameter = self._parameters.get(slot.name)
        if parameter is not None:
            place: tuple[torch.device, bool] = parameter.ds_tensor.fabric_init_place
            return place[0]
        return slot.device if slot.real else self._device

    def region(self, slot: TensorInfo) -> Region | None:
        parameter = self._parameters.get(slot.name)
        return None if parameter is None else _span(parameter)

    def put(self, slot: TensorInfo, tensor: Tensor, value: Tensor) -> Tensor:
        parameter = self._parameters.get(slot.name)
        if parameter is None:
            assert not hasattr(tensor, "ds_tensor"), f"{slot.name} was partitioned under another name"
            become(tensor, value)
            return tensor
        part, padding = parameter.ds_tensor, parameter.partition_numel() - value.numel()
        if padding:
            value = nn.functional.pad(value, (0, padding))
        become(part, _pinned(value) if part.fabric_init_place[1] else value)
        return tensor


def _span(parameter: Any) -> Span:
    """Return this rank's slice of a partitioned parameter."""
    return _slice(parameter.ds_numel, parameter.partition_numel(), parameter.ds_zero_partition_rank)


def _slice(numel: int, partition: int, rank: int) -> Span:
    """Return slice number ``rank`` of ``partition`` elements; the last ones may be shorter."""
    start = rank * partition
    return Span(min(start, numel), min(start + partition, numel))


def region_on(shape: torch.Size, rank: int, world_size: int) -> Span:
    """Return the slice of a parameter on ``rank``: DeepSpeed pads parameters to a multiple of ``world_size``."""
    numel = shape.numel()
    return _slice(numel, -(-numel // world_size), rank)


def _pinned(value: Tensor) -> Tensor:
    from deepspeed.accelerator import get_accelerator

    pinned: Tensor = get_accelerator().pin_memory(value)
    return pinned


def accept_whole_tensors(model: nn.Module, loaded: Callable[[], None]) -> None:
    """Make ``load_state_dict`` accept full tensors for partitioned parameters: each rank takes its slice of them.

    Args:
        model: The partitioned model.
        loaded: Called when slices have been written.
    """

    def take_slices(
        module: nn.Module,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: Any,
        missing: Any,
        extra: Any,
        errors: Any,
    ) -> None:
        parameters: dict[str, Any] = dict(module._parameters)
        for name, parameter in parameters.items():
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor) or not hasattr(parameter, "ds_tensor"):
                continue
            if value.shape == parameter.shape != parameter.ds_shape:
                continue  # a placeholder of DeepSpeed's own checkpoints, which bring the slices by another way
            if metadata.get("assign_to_params_buffers"):
                raise FabricInitError(
                    f"{prefix}{name} is partitioned by DeepSpeed, and assign=True would put a tensor of yours in its "
                    "place. Load without assign."
                )
            if value.shape != parameter.ds_shape:
                shapes = f"{tuple(value.shape)} in the state dict and {tuple(parameter.ds_shape)} in the model"
                errors.append(f"size mismatch for {prefix}{name}: {shapes}.")
            else:
                span = _span(parameter)
                with torch.no_grad():
                    parameter.ds_tensor[: span.numel].copy_(take(value.detach(), span))
                loaded()
            if parameter.shape != value.shape:
                state_dict[prefix + name] = value.new_empty(parameter.shape)  # it is not gathered: nothing else to copy

    for module in model.modules():
        if any(hasattr(parameter, "ds_tensor") for parameter in module._parameters.values()):
            module.register_load_state_dict_pre_hook(take_slices)
