"""Bind a batch to the ``forward`` of a model, and find the labels in it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from inspect import Parameter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fabric_init.errors import FabricInitError
from fabric_init.recording.replay.replay import real_execution, storage_now, view
from fabric_init.recording.tensor.recorded_tensor import recorded
from fabric_init.recording.tensor.storage_tags import ref_of

LABEL_NAMES = ("labels", "label", "targets", "target", "y")


class Call(NamedTuple):
    """One call of a model. ``labels`` are those of the batch, also if ``forward`` does not take them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None


def as_call(model: nn.Module, batch: Any, device: torch.device) -> Call:
    """Return the call of ``model`` for a batch.

    Args:
        model: its ``forward`` determines the names and number of arguments.
        batch: a tensor, the only input; a tuple or list of the positional arguments, with the labels as one more; or a
            mapping from argument name to value. Labels have names such as ``labels``, ``targets`` or ``y``.
        device: the device to move tensors to.

    Raises:
        FabricInitError: ``forward`` does not take such a batch.
    """
    batch = _to_device(batch, device)
    parameters = list(inspect.signature(model.forward).parameters.values())
    if isinstance(batch, Mapping):
        return _from_mapping(model, dict(batch), parameters)
    if isinstance(batch, (tuple, list)):
        return _from_sequence(model, tuple(batch), parameters)
    if isinstance(batch, Tensor):
        return Call((batch,), {}, None)
    raise FabricInitError(
        f"batch is a {type(batch).__name__}: pass a tensor, a tuple of {type(model).__name__}.forward's arguments and "
        "the labels, or a mapping from argument name to tensor"
    )


def _from_mapping(model: nn.Module, batch: dict[str, Any], parameters: Sequence[Parameter]) -> Call:
    names = [p.name for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
    takes_all = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
    labels = next((batch[name] for name in LABEL_NAMES if isinstance(batch.get(name), Tensor)), None)
    unknown = [key for key in batch if key not in names and not takes_all]
    if wrong := [key for key in unknown if key not in LABEL_NAMES]:
        raise FabricInitError(
            f"the batch has {', '.join(map(str, wrong))}, which {type(model).__name__}.forward does not take; it takes "
            f"{', '.join(names) or 'nothing by name'}"
        )
    return Call((), {key: value for key, value in batch.items() if key not in unknown}, labels)


def _from_sequence(model: nn.Module, batch: tuple[Any, ...], parameters: Sequence[Parameter]) -> Call:
    positional = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is Parameter.empty for p in positional)
    takes_all = any(p.kind is Parameter.VAR_POSITIONAL for p in parameters)
    if len(batch) == needed + 1 and not takes_all and isinstance(batch[-1], Tensor):
        inputs, labels = batch[:-1], batch[-1]
        by_name = next((p.name for p in positional[needed:] if p.name in LABEL_NAMES), None)
        if by_name is not None:
            return Call(inputs, {by_name: labels}, labels)
        if len(positional) == needed:
            return Call(inputs, {}, labels)
    if not takes_all and not needed <= len(batch) <= len(positional):
        raise FabricInitError(
            f"the batch has {len(batch)} tensors, but {type(model).__name__}.forward takes "
            f"({', '.join(p.name for p in positional)}): pass those, and the labels as one more, or a mapping"
        )
    return Call(batch, {}, None)


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return _valued(batch).to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    return type(batch)(_to_device(value, device) for value in batch) if type(batch) in (tuple, list) else batch


def _valued(tensor: Tensor) -> Tensor:
    """Return the values of a tensor that a recorded constructor made, as Lightning modules do."""
    recording = recorded(tensor)
    if recording is None:
        return tensor
    memory, _ = storage_now(recording.tape, recording.storage, exact=False)
    with real_execution():
        return view(memory, ref_of(tensor, recording.storage))
