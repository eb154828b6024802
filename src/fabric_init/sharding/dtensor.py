"""Where a DTensor keeps its values: the region of the full tensor on this rank, and its local tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement as DTensorPlacement
from torch.distributed.tensor.placement_types import Shard

from fabric_init._dtensor_internals import StridedShard, compute_local_shape_and_global_offset
from fabric_init._torch_internals import swap_tensor_impl
from fabric_init.checkpoints.region import Box, Region
from fabric_init.errors import FabricInitError
from fabric_init.planning.placement import Placement
from fabric_init.planning.tensors import TensorInfo, Walked, registered_tensors
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, become
from fabric_init.recording.tensor.wrappers import inner_tensors, is_wrapper


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor; any other tensor as it is.

    Of a part in a wrapper that only adds to it what is to be done with it, as torchao's float8 training does, this is
    the tensor in there.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    part: Tensor = tensor._local_tensor
    while is_wrapper(part):
        inner = list(inner_tensors(part).values())
        if len(inner) != 1 or (inner[0].size(), inner[0].dtype) != (part.size(), part.dtype):
            break
        part = inner[0]
    return part


def ranks_with_shards(model: Walked) -> set[int]:
    """Return the ranks that hold other shards of the tensors of ``model`` than this one.

    Ranks with copies of what this one holds are not among them: they may run the model at another time, or never.
    """
    tensors = [tensor for _, _, tensor in registered_tensors(model) if isinstance(tensor, DTensor)]
    found: set[int] = set()
    for mesh, placements in {(tensor.device_mesh, tensor.placements) for tensor in tensors}:
        if (here := mesh.get_coordinate()) is not None:
            along = [at if place.is_replicate() else slice(None) for at, place in zip(here, placements, strict=True)]
            found.update(mesh.mesh[tuple(along)].flatten().tolist())
            found.discard(int(mesh.mesh[tuple(here)]))
    return found


class ShardedTensors:
    """A placement for models some of whose tensors are DTensors.

    Args:
        sharded: The DTensors, by the name of the tensor: the first of its names.
        others: How this rank keeps all other tensors.
    """

    def __init__(self, sharded: Mapping[str, DTensor], others: Placement) -> None:
        self._sharded = sharded
        self._others = others
        self._regions: dict[str, Region] = {}  # torch takes its time, and is asked for each several times

    def device(self, slot: TensorInfo) -> torch.device:
        tensor = self._sharded.get(slot.name)
        if tensor is None:
            return self._others.device(slot)
        device = local(tensor).device
        return torch.device(tensor.device_mesh.device_type) if device.type == "meta" else device

    def region(self, slot: TensorInfo) -> Region | None:
        tensor = self._sharded.get(slot.name)
        if tensor is None:
            return self._others.region(slot)
        if slot.name not in self._regions:
            self._regions[slot.name] = region_of(tensor)
        return self._regions[slot.name]

    def put(self, slot: TensorInfo, tensor: Tensor, value: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return self._others.put(slot, tensor, value)
        part, value = local(tensor), value.to(tensor.dtype).contiguous()
        if isinstance(part, RecordedTensor):
            become(part, _padded(value, part._meta))
        elif part is not tensor._local_tensor:
            become(part, value)
        else:
            _become_shard(tensor, value)
        return tensor


def _padded(value: Tensor, meta: Tensor) -> Tensor:
    """Return ``value`` in memory as large as the storage of ``meta``: ``fully_shard`` pads a shard, and keeps both."""
    storage = meta.untyped_storage()
    if storage.nbytes() == value.nbytes or not meta.is_contiguous():
        return value
    whole = torch.zeros(storage.nbytes() // meta.element_size(), dtype=value.dtype, device=value.device)
    return whole.as_strided(meta.size(), meta.stride(), meta.storage_offset()).copy_(value)


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
    if 0 in sizes:  # of a rank outside the mesh, too
        return Box((0,) * tensor.ndim, sizes if len(sizes) == tensor.ndim else (0,) * tensor.ndim)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside the mesh holds nothing"
    box = shard_box(tensor.shape, mesh.shape, coordinate, placements)
    if box.sizes != sizes:
        raise FabricInitError(f"{placements} on {mesh}: torch says {box.sizes}, the local tensor is {sizes}")
    return box


def shard_box(
    shape: Sequence[int], mesh: Sequence[int], coordinate: Sequence[int], placements: Sequence[DTensorPlacement]
) -> Box:
    """Return the part of a tensor at a ``coordinate`` of a device mesh of these sizes; it may be empty."""
    sizes, offsets = compute_local_shape_and_global_offset(tuple(shape), tuple(mesh), list(coordinate), placements)
    return Box((0,) * len(sizes) if 0 in sizes else tuple(offsets), tuple(sizes))
