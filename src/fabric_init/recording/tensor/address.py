"""The address of a recorded tensor: it tells who shares memory, and where in it, and cannot be read from."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from fabric_init.errors import RecordingError


class Address:
    """What ``data_ptr()`` returns while there is no memory: a pointer that can be compared and counted with.

    Libraries use addresses as keys, to find tied tensors or to follow a parameter while it is sharded, as accelerate
    does. So two of these are equal exactly where the memory will be the same, and two into the same storage have an
    order and a distance. It is no ``int``, which code in C could read from: whoever needs the number gets it if the
    values have come, and a refusal otherwise.

    Args:
        found: The ``StorageTag`` of the recorded storage.
        offset: The byte in it.
    """

    def __init__(self, found: Any, offset: int) -> None:
        self._found, self._offset = found, offset

    @property
    def _storage(self) -> int:
        return int(self._found.storage)  # of which no other tape has the same

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and (self._storage, self._offset) == (other._storage, other._offset)

    def __hash__(self) -> int:
        return hash((self._storage, self._offset))

    def __index__(self) -> int:
        later = self._found.tape.after_block
        if self._found.memory is None and later.block_is_open:
            raise RecordingError(
                "the number of an address in a recorded block: the tensor has no memory to be read or written there. "
                "Read a copy of its values (tensor.numpy(), tensor.tolist()), write by operators of torch, or do it "
                "after the block."
            )
        later.memory(self._found, "be read")
        storage, offset = self._found.memory
        return int(storage.data_ptr() + offset + self._offset)

    @property
    def _as_parameter_(self) -> int:  # what ctypes asks for
        return self.__index__()

    def __bool__(self) -> bool:
        return bool(self._found.tape.after_block.block_is_open) or self.__index__() != 0

    def __add__(self, count: int) -> Address:
        return Address(self._found, self._offset + count)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if not isinstance(other, Address):
            return self + -other
        return self._offset - other._offset if self._storage == other._storage else int(self) - int(other)

    def __repr__(self) -> str:
        return "<the address of a tensor that has no values yet>"


def _compared(compare: Callable[[int, int], bool]) -> Any:
    def method(self: Address, other: Any) -> bool:
        if isinstance(other, Address) and self._storage == other._storage:
            return compare(self._offset, other._offset)
        if type(other) is int and other <= 0:  # "is there memory?"
            return compare(1, other)
        return compare(int(self), int(other))

    return method


def _on_number(name: str) -> Any:
    def method(self: Address, other: Any) -> Any:
        return getattr(self.__index__(), name)(other)

    return method


for _name in ("lt", "le", "gt", "ge"):
    setattr(Address, f"__{_name}__", _compared(getattr(operator, _name)))
for _name in ("rsub", "mod", "and", "floordiv", "rshift"):
    setattr(Address, f"__{_name}__", _on_number(f"__{_name}__"))
