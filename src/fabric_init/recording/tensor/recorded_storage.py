"""The storage object of recorded tensors, which has no bytes before they have values, and says so.

What reads or writes single elements of it does that as the same operator on a recorded tensor over all of the storage:
in a block it is recorded, and after it runs on the values, if they are there. Everything else needs the memory.
"""

from __future__ import annotations

from typing import Any

import torch

from fabric_init.errors import RecordingError
from fabric_init.recording.tensor.address import Address


class RecordedStorage(torch.UntypedStorage):
    """A storage on the meta device that reads and writes the memory which takes its place, once there is some.

    It claims the device that its tensors claim, so torch refuses to make another tensor on it, which would be one on
    meta that nobody answers for.
    """

    _fabric_init: Any

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device that the storage is meant for."""
        return torch.device(self._fabric_init.device)

    def data_ptr(self) -> Any:
        """Return where the bytes are, or what stands for that while there are none."""
        memory = self._fabric_init.memory
        if memory is not None:
            return memory[0].data_ptr() + memory[1]
        return Address(self._fabric_init, 0) if self.nbytes() else 0

    def __repr__(self) -> str:
        if self._fabric_init.memory is None:
            return f"<the storage of a tensor that has no values yet, {self.nbytes()} bytes, device='{self.device}'>"
        return repr(self.memory("__repr__"))

    def elements(self, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """Return a recorded tensor of ``dtype`` over all of the storage."""
        tensor: torch.Tensor = self._fabric_init.tape.after_block.elements(self, dtype)
        return tensor

    def memory(self, use: str) -> torch.UntypedStorage:
        """Return the memory that has taken the place of this storage.

        Raises:
            RecordingError: There is none yet.
        """
        record = self._fabric_init
        if record.memory is None and record.tape.after_block.block_is_open:
            raise RecordingError(
                f"{use} of the storage of a tensor in a recorded block: the storage has no bytes yet. Use the tensor, "
                "or do it after the block."
            )
        found = record.tape.after_block.memory(record, f"have its storage read or written ({use})")
        storage, offset = record.memory
        if offset or storage.nbytes() != self.nbytes():  # a part of a larger one, such as a mapped file
            return self.elements().clone().untyped_storage()
        return found  # type: ignore[no-any-return]


class RecordedTypedStorage(torch.TypedStorage):
    """The same with a dtype, which is what ``t.storage()`` returns."""

    _untyped_storage: RecordedStorage

    def _getitem(self, idx: Any) -> Any:
        if not isinstance(idx, int):
            return super()._getitem(idx)  # type: ignore[no-untyped-call]  # an error
        return self._untyped_storage.elements(self.dtype)[idx].item()

    def _setitem(self, idx: Any, value: Any) -> None:
        if not isinstance(idx, (int, slice)) or torch.is_storage(value):
            super()._setitem(idx, value)  # type: ignore[no-untyped-call]  # an error
        self._untyped_storage.elements(self.dtype)[idx] = value

    def _to(self, dtype: torch.dtype) -> Any:
        return typed_storage(self._untyped_storage.elements(self.dtype).to(dtype, copy=True)._typed_storage())

    def _new_wrapped_storage(self, untyped_storage: torch.UntypedStorage) -> Any:
        return typed_storage(torch.TypedStorage(wrap_storage=untyped_storage, dtype=self.dtype, _internal=True))

    def _pickle_storage_type(self) -> Any:  # what torch.save asks before it takes the bytes from C++
        self._untyped_storage = self._untyped_storage.memory("torch.save")  # type: ignore[assignment]
        self.__class__ = torch.TypedStorage  # type: ignore[assignment]
        return self._pickle_storage_type()


def typed_storage(storage: Any) -> Any:
    """Return what ``t.storage()`` has returned as one that answers for itself, if it is on a recorded storage."""
    if type(storage) is torch.TypedStorage and isinstance(storage._untyped_storage, RecordedStorage):
        storage.__class__ = RecordedTypedStorage
    return storage


def _bytes_of(storage: Any) -> torch.Tensor:
    untyped = getattr(storage, "_untyped_storage", storage)
    if isinstance(untyped, RecordedStorage):
        return untyped.elements()
    return torch.empty(0, dtype=torch.uint8, device=untyped.device).set_(untyped)


def _index(storage: RecordedStorage, index: Any) -> Any:
    if isinstance(index, slice):  # torch returns a storage on a part of the memory
        return storage.memory("__getitem__")[index]
    return storage.elements()[index].item()


def _set_index(storage: RecordedStorage, index: Any, value: int) -> None:
    storage.elements()[index] = value


def _fill(storage: RecordedStorage, value: int) -> RecordedStorage:
    storage.elements().fill_(value)
    return storage


def _copy(storage: RecordedStorage, source: Any, non_blocking: bool | None = None) -> RecordedStorage:
    storage.elements().copy_(_bytes_of(source))
    return storage


_BY_ELEMENT: dict[str, Any] = {
    "__getitem__": _index,
    "__setitem__": _set_index,
    "__iter__": lambda storage: iter(storage.elements().tolist()),
    "tolist": lambda storage: storage.elements().tolist(),
    "fill_": _fill,
    "copy_": _copy,
    "clone": lambda storage: storage.elements().clone().untyped_storage(),
    "__copy__": lambda storage: storage.clone(),
}
_ON_MEMORY = (
    *("__reduce__", "cpu", "cuda", "to", "type", "byteswap", "share_memory_", "pin_memory", "double", "float", "half"),
    *("long", "int", "short", "char", "byte", "bool", "bfloat16", "complex_double", "complex_float", "_to"),
    *(
        "_write_file",
        "_byteswap",
        "is_pinned",
        "_swap_data_ptr_",
        "_set_from_file",
        "_share_filename_cpu_",
        "_share_fd_cpu_",
        "_share_cuda_",
    ),
)


def _on_memory(name: str) -> Any:
    def method(self: RecordedStorage, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.memory(name), name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in _ON_MEMORY:
    setattr(RecordedStorage, _name, _on_memory(_name))
for _name, _method in _BY_ELEMENT.items():
    setattr(RecordedStorage, _name, _method)
