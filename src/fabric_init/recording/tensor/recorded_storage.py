"""The storage object of recorded tensors, which has no bytes before they have values, and says so."""

from __future__ import annotations

from typing import Any

import torch

from fabric_init.errors import RecordingError


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

    def data_ptr(self) -> int:
        """Return where the bytes are; 0, as on meta, while there are none: code in C may read what lies there."""
        memory = self._fabric_init.memory
        return 0 if memory is None else int(memory[0].data_ptr())

    def _memory(self, use: str) -> torch.UntypedStorage:
        record = self._fabric_init
        if record.memory is None and record.tape.after_block.block_is_open:
            raise RecordingError(
                f"UntypedStorage.{use} in a recorded block: the storage has no bytes yet. Use the tensor, or do it "
                "after the block."
            )
        memory: torch.UntypedStorage = record.tape.after_block.memory(
            record, f"have its storage read or written ({use})"
        )
        return memory


_ON_BYTES = (
    *("__getitem__", "__setitem__", "__iter__", "__copy__", "__reduce__", "fill_", "copy_", "tolist", "clone"),
    *("cpu", "cuda", "to", "type", "byteswap", "share_memory_", "pin_memory", "double", "float", "half", "long", "int"),
    *("short", "char", "byte", "bool", "bfloat16", "_write_file", "_byteswap"),
    *("_share_filename_cpu_", "_share_fd_cpu_", "_share_cuda_"),
)


def _on_memory(name: str) -> Any:
    def method(self: RecordedStorage, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._memory(name), name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in _ON_BYTES:
    setattr(RecordedStorage, _name, _on_memory(_name))
