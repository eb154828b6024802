"""The meta twin of a recorded tensor: a plain meta tensor beside it, on the storage that it is recorded on.

A twin never changes, so tensors of one geometry on one storage share it: a parameter has that of the tensor that it was
made of. An operator that changes a tensor's geometry in place gives it another one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.recording.tape.tape import TensorRef
from fabric_init.recording.tensor.storage_tags import StorageTag, mark, recorded_storage, ref_of


class MetaTwin:
    """A geometry on a storage of the meta device, and the device that its tensors claim to be on.

    Most twins are of parameters that nobody looks into before they have values. So what identifies a meta tensor, the
    mark on its storage object, is put there when :attr:`meta` is asked for.
    """

    __slots__ = ("_meta", "_recorded", "_ref", "device")

    def __init__(self, meta: Tensor, device: torch.device, recorded: StorageTag | None = None) -> None:
        self._meta = meta
        self.device = device
        self._recorded = recorded
        self._ref: TensorRef | None = None

    @property
    def meta(self) -> Tensor:
        """The plain meta tensor, for operators to run on."""
        if self._recorded is not None and not self._recorded.is_marked:
            with DisableTorchFunction():
                mark(self._meta, self._recorded)
        return self._meta

    @property
    def unmarked(self) -> Tensor:
        """The same, to be asked for nothing but its geometry."""
        return self._meta

    @property
    def recorded(self) -> StorageTag | None:
        """The recording of the storage."""
        if self._recorded is None:
            with DisableTorchFunction():
                self._recorded = recorded_storage(self._meta)
        return self._recorded

    @property
    def ref(self) -> TensorRef:
        """The geometry and the storage as they are on the tape."""
        if self._ref is None:
            recorded = self.recorded
            assert recorded is not None
            with DisableTorchFunction():
                self._ref = ref_of(self._meta, recorded.storage)
        return self._ref

    def own(self) -> MetaTwin:
        """Return a twin like this whose meta tensor an operator may change, and put on another storage."""
        return MetaTwin(self.meta.detach(), self.device)
