"""Models that are sharded when they are set up: each rank fills its own shards, and takes no memory for others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Shard, _StridedShard
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fabric_init.checkpoints import Box, CheckpointReader, Region
from fabric_init.errors import FabricInitError, UninitializedTensorError
from fabric_init.filling.agreement import Agreement
from fabric_init.filling.materialize import carry_out, prepare
from fabric_init.filling.placement import Placement, become
from fabric_init.filling.plan import Wanted
from fabric_init.filling.slots import Slot, named_modules

_ATTRIBUTE = "_fabric_init_bound"


class _Bound(NamedTuple):
    """What a recorded model is to be filled from when it is set up."""

    reader: CheckpointReader | None
    wanted: Wanted
    hooks: tuple[RemovableHandle, ...]


def _refuse(*_: Any) -> NoReturn:
    raise UninitializedTensorError(
        "this model has no memory before fabric.setup(model), which shards and fills it: run, load and save it after"
    )


def bind(model: nn.Module, reader: CheckpointReader | None, wanted: Wanted) -> None:
    """Remember what ``model`` is to be filled from, until it is sharded."""
    hooks = [
        hook
        for module in model.modules()
        for hook in (
            module.register_forward_pre_hook(_refuse),
            module.register_state_dict_pre_hook(_refuse),
            module.register_load_state_dict_pre_hook(_refuse),
        )
    ]
    vars(model)[_ATTRIBUTE] = _Bound(reader, wanted, tuple(hooks))


def is_bound(model: nn.Module) -> bool:
    """Whether ``model`` waits to be sharded and filled."""
    return _ATTRIBUTE in vars(model)


def shard_and_fill(
    model: nn.Module,
    shard: Callable[[nn.Module], nn.Module],
    placement_for: Callable[[nn.Module], ShardPlacement],
    agreement: Agreement,
) -> nn.Module:
    """Plan for the recorded ``model``, let ``shard`` put shards in its parameters' places, and fill those."""
    bound: _Bound = vars(model).pop(_ATTRIBUTE)
    for hook in bound.hooks:
        hook.remove()
    try:
        prepared = prepare(model, bound.reader, bound.wanted, agreement=agreement)
    except BaseException:
        bind(model, bound.reader, bound.wanted)  # as it was: the user may mend it and set up once more
        raise
    sharded = agreement.same("sharding the model", lambda: shard(model), lambda _: "")
    placement = placement_for(sharded)
    slots = [entry.slot for entry in prepared.plan.entries]
    tensors = [placement.current(slot, tensor) for slot, tensor in zip(slots, prepared.tensors, strict=True)]
    carry_out(prepared, sharded, tensors, placement, agreement)
    left = [name for name, tensor in parameters_by_name(sharded).items() if tensor.is_meta]
    if left:
        raise FabricInitError(f"sharding split a tie or made parameters of its own, which have no values: {left}")
    return sharded


class ShardPlacement(Placement, Protocol):
    """A placement that knows what sharding has made of each tensor. ``current`` comes first, once for each slot."""

    def current(self, slot: Slot, tensor: Tensor) -> Tensor:
        """What the sharded model holds where it held ``tensor``."""
        ...


class ShardedTensors:
    """A placement for models whose parameters are DTensors, beside whole ones.

    Args:
        model: the model after sharding, its parameters still without memory.
        device: where shards are to be.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._owners = {_plain_name(prefix): module for prefix, module in named_modules(model)}
        self._attributes: dict[str, dict[str, Any]] = {}

    def current(self, slot: Slot, tensor: Tensor) -> Tensor:
        """What the sharded model holds where it held ``tensor``."""
        owner, attribute = self._place(slot.name)
        found = getattr(owner, attribute, None) if owner is not None else None
        if not isinstance(found, Tensor) or slot.kind == "attribute":
            return tensor
        if found is not tensor:  # sharding makes new parameters, and forgets what model code put on the old ones
            self._attributes[slot.name] = dict(vars(tensor))
        return found

    def _place(self, name: str) -> tuple[nn.Module | None, str]:
        prefix, _, attribute = name.rpartition(".")
        return self._owners.get(prefix), attribute

    def device(self, slot: Slot) -> torch.device:
        return slot.device if slot.real else self._device

    def region(self, slot: Slot) -> Region | None:
        owner, attribute = self._place(slot.name)
        tensor = getattr(owner, attribute, None) if owner is not None else None
        return region_of(tensor) if isinstance(tensor, DTensor) else None

    def put(self, slot: Slot, tensor: Tensor, value: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            become(tensor, value)
            return tensor
        _become_shard(tensor, value.contiguous())
        vars(tensor).update(self._attributes.get(slot.name, {}))
        return tensor


def _become_shard(parameter: DTensor, local: Tensor) -> None:
    """Give a sharded parameter, which stays the same object, the memory of its shard."""
    whole = DTensor(local, parameter._spec, requires_grad=False)
    torch._C._swap_tensor_impl(parameter, nn.Parameter(whole, requires_grad=parameter.requires_grad))
    parameter._local_tensor = local  # beside the impl, a DTensor keeps its shard in a slot of its own


def region_of(tensor: DTensor) -> Box:
    """The part of the full tensor that this rank holds: offsets and sizes, in elements of each dimension.

    Raises:
        FabricInitError: the part is no box: a partial value, or a shard that is not one contiguous range.
    """
    placements, mesh = tensor.placements, tensor.device_mesh
    sizes = tuple(tensor._local_tensor.shape)
    if any(placement.is_partial() for placement in placements):
        raise FabricInitError(f"cannot fill a DTensor with {placements}: a partial value is no part of the full tensor")
    for index, placement in enumerate(placements):
        if isinstance(placement, _StridedShard):  # FSDP over tensor parallel: mesh dimensions to its right come first
            later = 1
            for other, along in enumerate(placements[index + 1 :], index + 1):
                if isinstance(along, (Shard, _StridedShard)) and along.dim == placement.dim:
                    later *= mesh.size(other)
            if placement.split_factor != later and 0 not in sizes:
                raise FabricInitError(f"cannot fill a DTensor with {placements} on {mesh}: its shard is not contiguous")
    if 0 in sizes:
        return Box((0,) * len(sizes), sizes)
    computed, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if tuple(computed) != sizes:
        raise FabricInitError(f"{placements} on {mesh}: torch says {tuple(computed)}, the local tensor is {sizes}")
    return Box(tuple(offsets), sizes)


def remap(optimizer: Optimizer, old: Mapping[str, nn.Parameter], new: Mapping[str, nn.Parameter]) -> None:
    """Make an optimizer that was given ``old`` parameters hold their ``new`` selves, by name.

    Raises:
        FabricInitError: the optimizer has taken steps, so its state is of the old parameters' shape.
    """
    names = {id(parameter): name for name, parameter in old.items() if new.get(name) is not parameter}
    if any(id(parameter) in names for parameter in optimizer.state):
        raise FabricInitError(
            f"this {type(optimizer).__name__} has taken steps with parameters that setup now shards. Make it after "
            "setup, or call setup before the first step."
        )
    for group in optimizer.param_groups:
        group["params"][:] = [new.get(names.get(id(parameter), ""), parameter) for parameter in group["params"]]


def _plain_name(name: str) -> str:
    """A module's name without what wrappers for compiling and activation checkpointing put in between."""
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module")]
    return ".".join(parts)


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under every name it has, names as before any wrapping."""
    found: dict[str, Any] = {}
    for prefix, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[f"{_plain_name(prefix)}.{name}" if prefix else name] = parameter
    return found
