"""The part of a model that one rank holds: how large it is, reading it once, and comparing it with the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from _verification import same_moments
from _workload import INIT_OVER_CHECKPOINT, Workload
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

PAGE = 4096


def local_part(tensor: Tensor) -> Tensor:
    """This rank's memory of a tensor: a DTensor's shard, a flat slice of ZeRO-3, or the whole."""
    if isinstance(tensor, DTensor):
        return tensor.detach().to_local()
    return getattr(tensor, "ds_tensor", tensor).detach()


def touch(model: nn.Module) -> None:
    """Read from every page that this rank holds of the model, as its first use will."""
    for tensor in _tensors(model).values():
        local = local_part(tensor)
        if local.numel() and not local.is_meta:
            data = local.reshape(-1).view(torch.uint8)
            data[::PAGE].sum().item()
            data[-1].item()


def verify(model: nn.Module, workload: Workload, cast: torch.dtype | None, *, initialized: bool) -> dict[str, Any]:
    """What this rank holds, in bytes, and the names of tensors of which it does not hold what it should.

    ``cast`` is the dtype that the strategy's precision gives every buffer; ``None`` leaves them as they are built.
    ``initialized``: it should hold the model's own init, drawn by the same rule as the reference's, and no checkpoint.
    """
    buffers = torch.load(workload.buffers, weights_only=True)
    buffers = {name: buffer.to(cast or buffer.dtype) for name, buffer in buffers.items()}
    tensors = _tensors(model)
    on_meta, wrong = [], []
    with safe_open(workload.safetensors, "pt") as file:
        for name in sorted({*file.keys(), *buffers, *tensors}):
            if (tensor := tensors.get(name)) is None:
                wrong.append(name)
            elif local_part(tensor).is_meta:
                on_meta.append(name)
            elif name in buffers:
                wrong += [] if _holds(tensor, buffers[name]) else [name]
            elif initialized:
                wrong += [] if _is_like(tensor, file.get_tensor(name) * INIT_OVER_CHECKPOINT) else [name]
            elif not _holds(tensor, file.get_tensor(name)):
                wrong.append(name)
    parameters = [local_part(parameter) for parameter in model.parameters()]
    return {"shard": sum(parameter.nbytes for parameter in parameters), "on_meta": on_meta, "wrong": wrong}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _is_like(tensor: Tensor, whole: Tensor) -> bool:
    local, whole = local_part(tensor).cpu().float(), whole.float()
    if whole.std() == 0:
        return bool((local == whole.flatten()[0]).all())
    return same_moments(local, whole)


def _holds(tensor: Tensor, whole: Tensor) -> bool:
    local = local_part(tensor).cpu()
    if isinstance(tensor, DTensor):
        shape = tensor.shape
        sizes, offsets = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
        wanted = whole
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            wanted = wanted.narrow(dim, min(offset, whole.shape[dim]), size)
    elif hasattr(tensor, "ds_tensor"):  # flattened, cut into equal slices, the last of them padded
        shape = tensor.ds_shape
        start = torch.distributed.get_rank() * local.numel()
        wanted = whole.reshape(-1)[start : start + local.numel()]
        local = local[: wanted.numel()]
    else:
        shape, wanted = tensor.shape, whole
    return tuple(shape) == tuple(whole.shape) and local.dtype == whole.dtype and torch.equal(local, wanted)
