"""A recorded model's twin with values: the model itself stays recorded, to be loaded or sharded later."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.errors import FabricInitError
from fabric_init.filling.fill import fill
from fabric_init.planning.placement import WholeTensors
from fabric_init.planning.plan import LoadOptions
from fabric_init.planning.prepare import plan_for
from fabric_init.planning.tensors import TensorInfo, find_tensors
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, become, make_recorded_tensor


class _Apart(WholeTensors):
    """Places values in the twin's tensors alone, though they lie on the same recorded storages as the model's."""

    def put(self, slot: TensorInfo, tensor: Tensor, value: Tensor) -> Tensor:
        become(tensor, value, alone=True)
        return tensor


def with_values(model: nn.Module) -> nn.Module:
    """Return ``model`` itself if it has values; else a copy that its own init has filled. Takes memory for one model.

    Raises:
        FabricInitError: the model cannot be copied.
        UninitializedTensorError: its own code never gives some tensor a value.
    """
    recorded = [tensor for info, tensor in find_tensors(model) if info.ref is not None]
    if not recorded:
        return model
    memo: dict[int, Any] = {id(tensor): _twin(tensor) for tensor in recorded}
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise FabricInitError(
            f"{type(model).__name__} cannot be copied to run it ({type(error).__name__}: {error}). "
            "Call fabric_init.materialize(model) first, or build it plainly: then it is run itself."
        ) from error
    prepared = plan_for(twin, None, LoadOptions())
    fill(prepared.plan, prepared.tensors, prepared.tapes, None, _Apart(), exact=prepared.exact)
    return twin


def _twin(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, RecordedTensor)
    with DisableTorchFunction():
        twin = make_recorded_tensor(tensor._meta.detach(), tensor._claimed, tensor.requires_grad)
    if isinstance(tensor, nn.Parameter):
        twin._is_param = True
    for name, value in vars(tensor).items():
        setattr(twin, name, value)
    return twin
