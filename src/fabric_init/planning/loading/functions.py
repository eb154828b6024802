"""Plain functions that make tensors of a checkpoint's tensors: ``convert={"new.key": lambda s: s["a"] @ s["b"].T}``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fabric_init.checkpoints import CheckpointReader, Conversion
from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.loading.sources import source_tensor
from fabric_init.recording.mode import RecordMode
from fabric_init.recording.recorder import Recorder

Functions = Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]]
"""By new key: a function that is given the tensors of the checkpoint by key, and returns the new one."""
Convert = Sequence[Conversion] | Functions
"""What ``convert=`` takes."""


class Sources(Mapping[str, Tensor]):
    """The tensors of a checkpoint by key, as recorded tensors without values, each made when it is asked for."""

    def __init__(self, recorder: Recorder, reader: CheckpointReader) -> None:
        self._recorder = recorder
        self._reader = reader
        self._keys = frozenset(reader.keys())
        self.made: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        if key not in self.made:
            self.made[key] = source_tensor(self._recorder, self._reader, key)
        return self.made[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def made_by(functions: Functions, key: str, sources: Sources) -> Tensor:
    """Return what the function for ``key`` makes.

    Raises:
        CheckpointMismatchError: It asks for a key that the checkpoint does not have.
        TypeError: It returns something else than a tensor.
    """
    try:
        result = functions[key](sources)
    except KeyError as error:
        raise CheckpointMismatchError(
            f"{sources._reader.path}: convert[{key!r}] asks for {error}, which the checkpoint does not have."
        ) from error
    if not isinstance(result, Tensor):
        raise TypeError(f"convert[{key!r}] returned {type(result).__name__}, not a tensor")
    return result


def keys_after(reader: CheckpointReader, functions: Functions) -> list[str]:
    """Return the keys of a checkpoint when functions have made tensors of some of them, which they replace.

    Raises:
        CheckpointMismatchError: A function asks for a key that is not there, or makes one that is, and is not used.
        TypeError: A function returns something else than a tensor.
    """
    if not functions:
        return [*reader.keys(), *reader.extra_state]
    generator = torch.get_rng_state()
    try:
        with RecordMode() as mode, torch.no_grad():
            sources = Sources(mode.recorder, reader)
            for key in functions:
                made_by(functions, key, sources)
    finally:
        torch.set_rng_state(generator)
    left = [key for key in reader.keys() if key not in sources.made]
    double = [key for key in left if key in functions]
    if double:
        raise CheckpointMismatchError(
            f"{reader.path}: convert makes {double[0]!r}, and the checkpoint has a tensor of that name already."
        )
    return [*left, *functions, *reader.extra_state]
