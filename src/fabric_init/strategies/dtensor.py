"""Fill models whose parameters are DTensors: each rank allocates and fills its own shards only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Shard

from fabric_init._lightning_internals import (
    DTensorSpec,
    StridedShard,
    TensorMeta,
    compute_local_shape_and_global_offset,
)
from fabric_init._torch_internals import swap_tensor_impl
from fabric_init.checkpoints import Box, Region
from fabric_init.checkpoints.region import take
from fabric_init.errors import FabricInitError
from fabric_init.planning.tensors import TensorInfo, named_modules, plain_name
from fabric_init.recording.tensor import RecordedTensor, become, become_recorded


class ShardedTensors:
    """A placement for models whose parameters are DTensors, beside full tensors.

    Args:
        model: The model after sharding, its parameters still without memory.
        device: The device for shards.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._owners = {plain_name(prefix): module for prefix, module in named_modules(model)}
        self._attributes: dict[str, dict[str, Any]] = {}

    def current(self, slot: TensorInfo, tensor: Tensor) -> Tensor:
        """Return the tensor that the sharded model holds in the place of ``tensor``."""
        owner, attribute = self._place(slot.name)
        sharded = getattr(owner, attribute, None) if owner is not None else None
        if not isinstance(sharded, Tensor) or slot.kind == "attribute":
            return tensor
        if sharded is not tensor:  # sharding makes new parameters, and forgets what model code put on the old ones
            self._attributes[slot.name] = dict(vars(tensor))
        return sharded

    def _place(self, name: str) -> tuple[nn.Module | None, str]:
        prefix, _, attribute = name.rpartition(".")
        return self._owners.get(plain_name(prefix)), attribute

    def device(self, slot: TensorInfo) -> torch.device:
        return slot.device if slot.real else self._device

    def region(self, slot: TensorInfo) -> Region | None:
        owner, attribute = self._place(slot.name)
        tensor = getattr(owner, attribute, None) if owner is not None else None
        return region_of(tensor) if isinstance(tensor, DTensor) else None

    def put(self, slot: TensorInfo, tensor: Tensor, value: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            become(tensor, value.to(tensor.dtype) if isinstance(tensor, RecordedTensor) else value)
            return tensor
        if isinstance(tensor._local_tensor, RecordedTensor):  # which may have been cast while it was waiting
            become(tensor._local_tensor, value.to(tensor.dtype).contiguous())
        else:
            _become_shard(tensor, value.contiguous())
        vars(tensor).update(self._attributes.get(slot.name, {}))
        return tensor

    def put_waiting(self, slot: TensorInfo, tensor: Tensor, make: Callable[[Sequence[int]], RecordedTensor]) -> None:
        if isinstance(tensor, DTensor):
            _become_shard(tensor, make(tensor._local_tensor.shape))
            vars(tensor).update(self._attributes.get(slot.name, {}))
        else:
            recording = make(tensor.shape)
            become_recorded(tensor, recording._meta, recording._claimed)


def _become_shard(parameter: DTensor, local: Tensor) -> None:
    """Make a sharded parameter, which stays the same object, hold the memory of its shard."""
    whole = DTensor(local, parameter._spec, requires_grad=False)
    swap_tensor_impl(parameter, nn.Parameter(whole, requires_grad=parameter.requires_grad))
    parameter._local_tensor = local  # beside the impl, a DTensor keeps its shard in a slot of its own


def region_of(tensor: DTensor) -> Box:
    """Return the part of the full tensor that this rank holds: offsets and sizes in each dimension.

    Raises:
        FabricInitError: The part is no box: a partial value, or a shard that is not one contiguous range.
    """
    placements, mesh = tensor.placements, tensor.device_mesh
    sizes = tuple(tensor._local_tensor.shape)
    if any(placement.is_partial() for placement in placements):
        raise FabricInitError(f"cannot fill a DTensor with {placements}: a partial value is no part of the full tensor")
    for index, placement in enumerate(placements):
        if isinstance(placement, StridedShard):  # FSDP over tensor parallel: mesh dimensions to its right come first
            later = 1
            for other, along in enumerate(placements[index + 1 :], index + 1):
                if isinstance(along, (Shard, StridedShard)) and along.dim == placement.dim:
                    later *= mesh.size(other)
            if placement.split_factor != later and 0 not in sizes:
                raise FabricInitError(f"cannot fill a DTensor with {placements} on {mesh}: its shard is not contiguous")
    if 0 in sizes:
        return Box((0,) * len(sizes), sizes)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside the mesh holds nothing"
    box = shard_box(tensor.shape, mesh.shape, coordinate, placements)
    if box.sizes != sizes:
        raise FabricInitError(f"{placements} on {mesh}: torch says {box.sizes}, the local tensor is {sizes}")
    return box


def shard_box(
    shape: Sequence[int], mesh: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> Box:
    """Return the part of a tensor at a ``coordinate`` of a device mesh of these sizes; it may be empty."""
    sizes, offsets = compute_local_shape_and_global_offset(tuple(shape), tuple(mesh), list(coordinate), placements)
    return Box((0,) * len(sizes) if 0 in sizes else tuple(offsets), tuple(sizes))


def accept_whole_tensors(model: nn.Module) -> None:
    """Make ``load_state_dict`` accept full tensors for sharded parameters, too: each rank takes its shard of them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            cast(nn.Module, module).register_load_state_dict_pre_hook(_reshard)  # units come before what is in them
        if any(isinstance(parameter, DTensor) for parameter in module._parameters.values()):
            module.register_load_state_dict_pre_hook(_take_parts)


def _reshard(module: Any, *args: Any) -> None:
    module.reshard()  # with reshard_after_forward=False, the module holds full parameters since the forward


def _take_parts(module: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
    parameters: dict[str, Any] = dict(module._parameters)
    for name, parameter in parameters.items():
        value: Any = state_dict.get(prefix + name)
        if not isinstance(parameter, DTensor) or type(value) not in (Tensor, nn.Parameter):
            continue
        if value.shape == parameter.shape:  # otherwise torch says so
            part = take(value.detach(), region_of(parameter))
            part = part.to(parameter._local_tensor.device, copy=True, memory_format=torch.contiguous_format)
            meta = TensorMeta(parameter.shape, parameter.stride(), value.dtype)
            spec = DTensorSpec(parameter.device_mesh, parameter.placements, tensor_meta=meta)
            state_dict[prefix + name] = DTensor(part, spec, requires_grad=False)  # in this call's own copy
