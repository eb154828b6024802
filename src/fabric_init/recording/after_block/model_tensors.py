"""Where the tensors of living models are: what the guard of a model tells those that answer for its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from fabric_init.recording.tape.tape import TensorRef


class ModelTensors(Protocol):
    """Where the tensors of a living model are, by recorded storage."""

    def model(self) -> nn.Module | None:
        """Return the model, if it still lives."""
        ...

    def gathered_for(self, module: nn.Module) -> None:
        """Note that torch gathers tensors of the model from other ranks right before ``module`` runs."""
        ...

    def has(self, storage: int) -> bool:
        """Return whether a tensor of the model was on ``storage``."""
        ...

    def now(self, storage: int) -> Iterator[Tensor]:
        """Yield what is today where tensors on ``storage`` were."""
        ...

    def at(self, module: nn.Module, name: str) -> Iterator[TensorRef]:
        """Yield the places that the tensor ``name`` of ``module`` had on the tape."""
        ...

    def recorded(self, storage: int) -> Iterator[Tensor]:
        """Yield those of them that are still on ``storage``."""
        ...

    def filled(self, storage: int, status: str) -> None:
        """Note that what was on ``storage`` has its values, and what it is reported as."""
        ...

    def put(self, storage: int, tensor: Tensor, value: Tensor) -> None:
        """Give ``tensor``, which was on ``storage``, the memory of ``value``, or what its strategy keeps of that."""
        ...

    def unfilled(self) -> tuple[str, dict[int, str]]:
        """Return the class of the model, and the names of its tensors that wait, by recorded storage."""
        ...
