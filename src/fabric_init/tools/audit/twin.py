"""Make a filled copy of a recorded model, which itself stays recorded, to be loaded or sharded later."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.api import materialize
from fabric_init.errors import FabricInitError
from fabric_init.guard.recorded import guards_in_copy, release_recorded
from fabric_init.planning.tensors import find_tensors


def with_values(model: nn.Module) -> nn.Module:
    """Return ``model`` if it has values, else a copy filled by its own init, which takes the memory of the model.

    Raises:
        FabricInitError: the model cannot be copied.
        UninitializedTensorError: its own code does not initialize some tensor.
    """
    recorded = [tensor for slot, tensor in find_tensors(model) if slot.ref is not None]
    if not recorded:
        return model
    # the tensors of the twin share the recorded storages, so the same tape fills them
    memo: dict[int, Any] = {id(tensor): _twin(tensor) for tensor in recorded}
    memo.update(guards_in_copy(model))
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise FabricInitError(
            f"{type(model).__name__} cannot be copied to run it ({type(error).__name__}: {error}). "
            "Call fabric_init.materialize(model) first, or build it plainly: then it is run itself."
        ) from error
    release_recorded(twin)
    materialize(twin)
    return twin


def _twin(tensor: Tensor) -> Tensor:
    with DisableTorchFunction():
        twin = tensor.detach()
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, tensor.requires_grad)
    vars(twin).update(vars(tensor))
    return twin
