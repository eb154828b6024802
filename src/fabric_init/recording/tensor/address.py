"""The address of a recorded tensor that waits for values: it tells who shares memory, and cannot be read from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.recording.tensor.recorded_tensor import recorded, recorded_ref
from fabric_init.recording.tensor.storage_tags import StorageTag


class Address:
    """What ``data_ptr()`` returns while there is no memory.

    Libraries use addresses as keys, to find tied tensors or to follow a parameter while it is sharded, as accelerate
    does. So two of these are equal exactly where the memory will be the same. It is no ``int``, which code in C could
    read from: whoever needs the number gets it if the values have come, and a refusal otherwise.
    """

    def __init__(self, later: Any, found: StorageTag, offset: int) -> None:
        self._later, self._found, self._offset = later, found, offset

    @property
    def _place(self) -> tuple[int, int, int]:
        return id(self._found.tape), self._found.storage, self._offset

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and self._place == other._place

    def __hash__(self) -> int:
        return hash(self._place)

    def __index__(self) -> int:
        return int(self._later.memory(self._found, "be read").data_ptr()) + self._offset

    @property
    def _as_parameter_(self) -> int:  # what ctypes asks for
        return self.__index__()

    def __bool__(self) -> bool:
        return self.__index__() != 0

    def __repr__(self) -> str:
        return "<the address of a tensor that has no values yet>"


def _on_number(name: str) -> Any:
    def method(self: Address, other: Any) -> Any:
        return getattr(self.__index__(), name)(int(other) if isinstance(other, Address) else other)

    return method


for _name in ("add", "radd", "sub", "rsub", "mod", "and", "floordiv", "rshift", "lt", "le", "gt", "ge"):
    setattr(Address, f"__{_name}__", _on_number(f"__{_name}__"))


def address_of(later: Any, tensor: Tensor) -> int | Address:
    """Return the address of the values of ``tensor``, or what stands for it while ``tensor`` waits for them."""
    with DisableTorchFunction():
        found = recorded(tensor)
        if found is None or found.memory is not None or later.has_value(tensor):
            return int(later.value(tensor, "be read").data_ptr())
        if not tensor.numel():
            return 0  # as torch
        ref = recorded_ref(tensor, found.storage)
        return Address(later, found, ref.offset * tensor.element_size())
