"""The tensors of a model, each once, with every name it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.errors import RecordingError
from fabric_init.recording.tape.tape import Tape, TensorRef
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, recorded, recorded_ref
from fabric_init.recording.tensor.wrappers import inner_tensors, is_sharded, is_wrapper, recorded_parts

Kind = Literal["parameter", "buffer", "non-persistent buffer", "attribute"]

_NOT_ITS_OWN = frozenset({*vars(nn.Module()), "_trainer", "_fabric"})
"""Attributes of a module that hold no tensors of its own: torch's tables, and what runs a ``LightningModule``."""
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


_NO_OWN_CLASS = frozenset({nn.Parameter, RecordedTensor})
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


class Walk:
    """What one walk over a model has found, for all that goes through it: its modules, and the tensors in them.

    It tells what the model held then. Whoever has put other modules or tensors into the model since walks again; a
    tensor that has got its values is still the same object.

    Attributes:
        model: The model itself.
        named: Every module under every name it has, in module order.
        once: Every module once, under the first of its names.
        registered: The name, kind and tensor of every parameter and buffer, under every name it has.
        tensors: The same, and then every plain tensor attribute.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.named = named_modules(model)
        self.once = _first(self.named)
        self.registered = _registered(self.named)
        self.tensors = [*self.registered, *_attributes(self.named)]


Walked = nn.Module | Walk
"""A model, or what a walk over it has found."""


def walked(model: Walked) -> Walk:
    """Return the walk over ``model``."""
    return model if isinstance(model, Walk) else Walk(model)


def named_modules(model: Walked) -> list[tuple[str, nn.Module]]:
    """Return every module under every name it has, in module order. ``Module.named_modules`` is slower."""
    if isinstance(model, Walk):
        return model.named
    modules: list[tuple[str, nn.Module]] = []
    _visit("", model, modules, set())
    return modules


def modules_once(model: Walked) -> list[tuple[str, nn.Module]]:
    """Return every module once, under the first of its names."""
    return model.once if isinstance(model, Walk) else _first(named_modules(model))


def _first(named: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    first: dict[int, tuple[str, nn.Module]] = {}
    for each in named:
        first.setdefault(id(each[1]), each)
    return list(first.values())


def _visit(prefix: str, module: nn.Module, modules: list[tuple[str, nn.Module]], above: set[int]) -> None:
    # No nested function: a recursive closure is a reference cycle, which would keep the model alive for a while.
    if id(module) in above:
        return  # a cycle: the module has its names already
    modules.append((prefix, module))
    if not module._modules:
        return
    above.add(id(module))
    dot = f"{prefix}." if prefix else ""
    for name, child in module._modules.items():
        if child is not None:
            _visit(dot + name, child, modules, above)
    above.remove(id(module))


def named_tensors(model: Walked) -> list[tuple[str, Kind, Tensor]]:
    """Return every parameter, buffer and plain tensor attribute of ``model``, under every name it has."""
    return walked(model).tensors


def registered_tensors(model: Walked) -> list[tuple[str, Kind, Tensor]]:
    """Return every parameter and buffer of ``model``, under every name it has."""
    return model.registered if isinstance(model, Walk) else _registered(named_modules(model))


def _registered(named: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, Kind, Tensor]]:
    found: list[tuple[str, Kind, Tensor]] = []
    for prefix, module in named:
        parameters, buffers = module._parameters, module._buffers
        if parameters:
            for key, tensor in parameters.items():
                if tensor is not None:
                    found.append((f"{prefix}.{key}" if prefix else key, "parameter", tensor))
        if buffers:
            for key, buffer in buffers.items():
                if buffer is not None:
                    kind: Kind = "non-persistent buffer" if key in module._non_persistent_buffers_set else "buffer"
                    found.append((f"{prefix}.{key}" if prefix else key, kind, buffer))
    return found


def _attributes(named: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Kind, Tensor]]:
    """Yield the plain tensor attributes of modules, and of parameters whose class may keep more beside the values."""
    seen: set[int] = set()
    for prefix, module in named:
        for name, parameter in module._parameters.items():
            if parameter is not None and _is_of_own_class(parameter):
                for key, value in vars(parameter).items():
                    beside = f"{prefix}.{name}.{key}" if prefix else f"{name}.{key}"
                    for path, tensor in _tensors_in(value, beside, seen):
                        yield path, "attribute", tensor
        attributes = vars(module)
        own = attributes.keys() - _NOT_ITS_OWN  # a set knows no order, but takes away much at once
        if not _PLAIN_TYPES.issuperset(map(type, map(attributes.__getitem__, own))):  # few modules
            for name, value in attributes.items():
                if name in own and type(value) not in _PLAIN_TYPES and not name.startswith(_NOT_THE_MODELS):
                    for path, tensor in _tensors_in(value, f"{prefix}.{name}" if prefix else name, seen):
                        yield path, "attribute", tensor


def _is_of_own_class(parameter: Tensor) -> bool:
    """Return whether a parameter is of a class that may keep more beside its values, such as the scales of them.

    A wrapper that answers operators by itself, such as a DTensor, has no values of its own.
    """
    kind = type(parameter)
    if kind in _NO_OWN_CLASS:
        return False
    return isinstance(parameter, RecordedTensor) or kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def plain_name(name: str) -> str:
    """Return a module's name without what wrappers for compiling and activation checkpointing insert."""
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module")]
    return ".".join(parts)


def find_tensors(model: Walked) -> list[tuple[TensorInfo, Tensor]]:
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
            if (slot := info_of(tuple(names[key]), kind, tensor)) is not None
        ]


def info_of(names: tuple[str, ...], kind: Kind, tensor: Tensor) -> TensorInfo | None:
    """Return the description of a tensor that a model has under ``names``; ``None`` if it is not to be filled."""
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
        None if record is None else recorded_ref(tensor, record.storage),
        record is None and not tensor.is_meta,
        tensor.requires_grad,
    )


def _inner(tensor: Tensor) -> Iterable[Tensor]:
    """Return the tensors in a wrapper; of a sharded one, whose shard is looked at elsewhere, those in that."""
    inner = list(inner_tensors(tensor).values())
    return [part for each in inner if is_wrapper(each) for part in _inner(each)] if is_sharded(tensor) else inner


def tensors_and_tapes(model: Walked) -> tuple[list[TensorInfo], list[Tensor], Mapping[int, Tape]]:
    """Return the model's tensors, described and themselves, and the tape of each recorded storage among them."""
    slots: list[TensorInfo] = []
    tensors: list[Tensor] = []
    tapes: dict[int, Tape] = {}
    for slot, tensor in find_tensors(model):
        if is_wrapper(tensor) and any(map(recorded_parts, _inner(tensor))):
            raise RecordingError(
                f"{slot.name} is a {type(tensor).__name__} that was made of a recorded tensor, which this cannot give "
                "values to. Call fabric_init.materialize(model) before, or make it of a tensor that has values."
            )
        slots.append(slot)
        tensors.append(tensor)
        if slot.ref is not None:
            with DisableTorchFunction():
                record = recorded(tensor)
            assert record is not None
            tapes[record.storage] = record.tape
    return slots, tensors, tapes


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter under every name it has, as before any wrapping."""
    found = registered_tensors(model)
    return {plain_name(name): cast(nn.Parameter, tensor) for name, kind, tensor in found if kind == "parameter"}
