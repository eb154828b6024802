"""The tensors of a model, each once, with every name it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.recording.storage_tags import ref_of
from fabric_init.recording.tape import Tape, TensorRef
from fabric_init.recording.tensor import meta_of, recorded

Kind = Literal["parameter", "buffer", "non-persistent buffer", "attribute"]

_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_NOT_THE_MODELS = ("_fabric_init_", "__composable_api_state_key")
"""How attributes begin in which we, or fully_shard, keep what is known of a module."""


class TensorInfo(NamedTuple):
    """One tensor of a model.

    Attributes:
        names: Its names in module order; those after the first are ties.
        kind: Whether it is a parameter, a buffer or a plain attribute.
        shape: The shape of the full tensor.
        dtype: The dtype in the model.
        device: The device that the constructor asked for.
        ref: Its place on the tape; ``None`` if it was not recorded.
        real: Whether it already has memory.
        requires_grad: As of the tensor.
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
        """The first of its names."""
        return self.names[0]

    @property
    def saved(self) -> bool:
        """Whether it is part of the state dict, so that a checkpoint can hold it."""
        return self.kind in ("parameter", "buffer")


_PLAIN = (str, bytes, int, float, bool, complex, type(None), type, torch.dtype, torch.device, torch.Size)
_PLAIN_TYPES = frozenset(_PLAIN)
_DEPTH = 5


def _tensors_in(value: Any, path: str, seen: set[int], depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in an attribute of a module: itself, or in containers and plain objects."""
    kind = type(value)  # not isinstance(): that asks objects for their __class__, which some (configs) compute
    if issubclass(kind, Tensor):
        yield path, value
        return
    if issubclass(kind, (*_PLAIN, nn.Module)) or depth == _DEPTH or id(value) in seen:
        return
    seen.add(id(value))
    if issubclass(kind, dict):
        for key, item in list(value.items()):
            yield from _tensors_in(item, f"{path}[{key!r}]", seen, depth + 1)
    elif issubclass(kind, (list, tuple, set, frozenset)):
        for index, item in enumerate(value):
            yield from _tensors_in(item, f"{path}[{index}]", seen, depth + 1)
    elif not callable(value):
        for name, item in list(getattr(value, "__dict__", {}).items()):
            yield from _tensors_in(item, f"{path}.{name}", seen, depth + 1)


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every module under every name it has, in module order. ``Module.named_modules`` is slower."""
    modules: list[tuple[str, nn.Module]] = []
    _visit("", model, modules, set())
    return modules


def _visit(prefix: str, module: nn.Module, modules: list[tuple[str, nn.Module]], above: set[int]) -> None:
    # No nested function: a recursive closure is a reference cycle, which would keep the model alive for a while.
    if id(module) in above:
        return  # a cycle: the module has its names already
    above.add(id(module))
    modules.append((prefix, module))
    dot = f"{prefix}." if prefix else ""
    for name, child in module._modules.items():
        if child is not None:
            _visit(dot + name, child, modules, above)
    above.remove(id(module))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Kind, Tensor]]:
    """Yield every parameter, buffer and plain tensor attribute of ``model``, under every name it has."""
    modules = named_modules(model)
    for prefix, module in modules:
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + name, "parameter", parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                non_persistent = name in module._non_persistent_buffers_set
                yield dot + name, "non-persistent buffer" if non_persistent else "buffer", buffer
    seen: set[int] = set()
    for prefix, module in modules:
        for name, value in vars(module).items():
            if (
                type(value) not in _PLAIN_TYPES
                and name not in _MODULE_INTERNALS
                and not name.startswith(_NOT_THE_MODELS)
            ):
                for path, tensor in _tensors_in(value, f"{prefix}.{name}" if prefix else name, seen):
                    yield path, "attribute", tensor


def plain_name(name: str) -> str:
    """A module's name without what wrappers for compiling and activation checkpointing put in between."""
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module")]
    return ".".join(parts)


def find_tensors(model: nn.Module) -> list[tuple[TensorInfo, Tensor]]:
    """Return every parameter, buffer and plain tensor attribute of ``model`` once, with the tensor itself.

    Plain tensors are searched in the attributes of modules, and in containers and plain objects there.
    """
    names: dict[int, list[str]] = {}
    first: dict[int, tuple[Kind, Tensor]] = {}
    for name, kind, tensor in named_tensors(model):
        key = id(tensor)
        if key not in first:
            first[key] = (kind, tensor)
            names[key] = [name]
        elif kind != "attribute":
            names[key].append(name)
            if first[key][0] == "non-persistent buffer" and kind != "non-persistent buffer":
                first[key] = (kind, tensor)
    with DisableTorchFunction():  # lazy parameters refuse every question otherwise
        return [
            (slot, tensor)
            for key, (kind, tensor) in first.items()
            if (slot := _slot(tuple(names[key]), kind, tensor)) is not None
        ]


def _slot(names: tuple[str, ...], kind: Kind, tensor: Tensor) -> TensorInfo | None:
    record = recorded(tensor)
    if is_lazy(tensor):
        return None  # no shape yet: it gets one, and values, from the first batch or load_state_dict after the block
    if kind == "attribute" and record is None:
        return None  # a real tensor of the model's own
    return TensorInfo(
        names,
        kind,
        tensor.size(),
        tensor.dtype,
        tensor.device if record is None else record.device,
        None if record is None else ref_of(meta_of(tensor), record.storage),
        record is None and not tensor.is_meta,
        tensor.requires_grad,
    )


def survey(model: nn.Module) -> tuple[list[TensorInfo], list[Tensor], Mapping[int, Tape]]:
    """Return the model's tensors, described and themselves, and the tape of each recorded storage among them."""
    slots: list[TensorInfo] = []
    tensors: list[Tensor] = []
    tapes: dict[int, Tape] = {}
    for slot, tensor in find_tensors(model):
        slots.append(slot)
        tensors.append(tensor)
        if slot.ref is not None:
            with DisableTorchFunction():
                record = recorded(tensor)
            assert record is not None
            tapes[record.storage] = record.tape
    return slots, tensors, tapes
