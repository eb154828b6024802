"""The tensors of a model, each once, with every name it has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fabric_init.recording.tape import TensorRef, recorded, ref_of

Kind = Literal["parameter", "buffer", "non-persistent buffer", "attribute"]

_MODULE_INTERNALS = frozenset(vars(nn.Module()))


class Slot(NamedTuple):
    """One tensor of a model: what has to be filled.

    ``names[0]`` is the first name in module order; further names are ties. ``ref`` is its place on the tape, ``None``
    if the tensor was not recorded. ``real`` says that it has memory of its own already.
    """

    names: tuple[str, ...]
    kind: Kind
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    ref: TensorRef | None
    real: bool
    requires_grad: bool

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def saved(self) -> bool:
        """Whether ``state_dict`` holds it, so that a checkpoint can bring it."""
        return self.kind in ("parameter", "buffer")


def _in_containers(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif depth < 4:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from _in_containers(item, f"{path}[{key!r}]", depth + 1)
        elif isinstance(value, (list, tuple, set)):
            for index, item in enumerate(value):
                yield from _in_containers(item, f"{path}[{index}]", depth + 1)


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under every name it has, in module order. ``Module.named_modules`` does the same, but slower."""
    found: list[tuple[str, nn.Module]] = []
    todo: list[tuple[str, nn.Module]] = [("", model)]
    while todo:
        prefix, module = todo.pop()
        found.append((prefix, module))
        dot = f"{prefix}." if prefix else ""
        todo.extend((dot + name, child) for name, child in reversed(module._modules.items()) if child is not None)
    return found


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Kind, Tensor]]:
    modules = named_modules(model)
    for prefix, module in modules:
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + name, "parameter", parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                temporary = name in module._non_persistent_buffers_set
                yield dot + name, "non-persistent buffer" if temporary else "buffer", buffer
    for prefix, module in modules:
        for name, value in vars(module).items():
            # by type(): isinstance would ask objects for their __class__, which some (configs) compute
            if name not in _MODULE_INTERNALS and issubclass(type(value), (Tensor, dict, list, tuple, set)):
                for path, tensor in _in_containers(value, f"{prefix}.{name}" if prefix else name):
                    yield path, "attribute", tensor


def find_slots(model: nn.Module) -> list[tuple[Slot, Tensor]]:
    """Every parameter, buffer and plain tensor attribute of ``model``, with the tensor itself.

    Plain attributes are looked for in the modules' own attributes and in lists, tuples, sets and dicts there.
    """
    names: dict[int, list[str]] = {}
    first: dict[int, tuple[Kind, Tensor]] = {}
    for name, kind, tensor in _named_tensors(model):
        key = id(tensor)
        if key not in first:
            first[key] = (kind, tensor)
            names[key] = [name]
        elif kind != "attribute":
            names[key].append(name)
            if first[key][0] == "non-persistent buffer" and kind != "non-persistent buffer":
                first[key] = (kind, tensor)
    with torch._C.DisableTorchFunction():  # lazy parameters refuse every question otherwise
        return [
            (slot, tensor)
            for key, (kind, tensor) in first.items()
            if (slot := _slot(tuple(names[key]), kind, tensor)) is not None
        ]


def _slot(names: tuple[str, ...], kind: Kind, tensor: Tensor) -> Slot | None:
    found = recorded(tensor)
    if is_lazy(tensor):
        kind = "attribute"  # no shape yet, so nothing that a checkpoint could bring
    if kind == "attribute" and found is None:
        return None  # a real tensor of the model's own
    return Slot(
        names,
        kind,
        tensor.size(),
        tensor.dtype,
        tensor.device if found is None else found.device,
        None if found is None else ref_of(tensor, found.storage),
        not tensor.is_meta,
        tensor.requires_grad,
    )
