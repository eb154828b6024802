"""Full tensors in ``load_state_dict`` of a model whose parameters are DTensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fabric_init._dtensor_internals import DTensorSpec, TensorMeta
from fabric_init.checkpoints.region import take
from fabric_init.sharding.dtensor import region_of


def accept_whole_tensors(model: nn.Module) -> None:
    """Make ``load_state_dict`` accept full tensors for sharded parameters, too: each rank takes its shard of them."""
    if not has_shards(model):
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            cast(nn.Module, module).register_load_state_dict_pre_hook(_reshard)  # units come before what is in them
        if any(isinstance(parameter, DTensor) for parameter in module._parameters.values()):
            module.register_load_state_dict_pre_hook(_take_parts)


def has_shards(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def load_parts(model: nn.Module, whole: Mapping[str, Any], *, strict: bool) -> None:
    """Load a model that accepts whole tensors as Lightning's ``load_raw`` does, which ignores keys without a tensor.

    Raises:
        KeyError: With ``strict``, for a tensor of the model that is not there.
    """
    names = [name for name, held in model.state_dict().items() if isinstance(held, Tensor)]
    if strict and (missing := [name for name in names if name not in whole]):
        raise KeyError(
            f"The model contains a key '{missing[0]}' that does not exist in the loaded checkpoint."
            " To disable strict loading, set `strict=False`."
        )
    model.load_state_dict({name: whole[name] for name in names if name in whole}, strict=False)


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
