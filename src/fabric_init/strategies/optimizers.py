"""Update optimizers that were made before their parameters were sharded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from fabric_init.errors import FabricInitError
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor


def remap(optimizer: Optimizer, old: Mapping[str, nn.Parameter], new: Mapping[str, nn.Parameter]) -> None:
    """Replace the ``old`` parameters of an optimizer by the ``new`` ones of the same name.

    Raises:
        FabricInitError: The optimizer has taken steps, so its state is of the old parameters' shape.
    """
    names = {id(parameter): name for name, parameter in old.items() if new.get(name) is not parameter}
    if any(id(parameter) in names for parameter in optimizer.state):
        raise FabricInitError(
            f"this {type(optimizer).__name__} has taken steps with parameters that setup now shards. Make it after "
            "setup, or call setup before the first step."
        )
    for group in optimizer.param_groups:
        group["params"][:] = [new.get(names.get(id(parameter), ""), parameter) for parameter in group["params"]]


def refuse_left_behind(optimizer: Optimizer, models: Iterable[nn.Module] = ()) -> None:
    """Raise if ``optimizer`` holds parameters without memory that are in none of the ``models`` that were set up.

    Raises:
        FabricInitError: It does, and would train nothing.
    """
    held = {id(parameter) for model in models for parameter in model.parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in held]
    if any(isinstance(parameter, RecordedTensor) or parameter.is_meta for parameter in parameters):
        raise FabricInitError(
            f"this {type(optimizer).__name__} holds parameters without memory, and would train nothing. Set up their "
            "model first; if load_state_dict(assign=True) has put others in their places, make it after that."
        )
