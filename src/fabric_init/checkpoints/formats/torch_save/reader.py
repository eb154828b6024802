"""Reader for one file written by ``torch.save``: ``.pt``, ``.pth``, ``.bin``, ``.ckpt``.

The format: a zip archive with a pickle and one uncompressed record a storage, see
https://docs.pytorch.org/docs/stable/notes/serialization.html. The pickle goes through torch's ``weights_only``
unpickler, always: no code in it runs, and there is no option to let it. Only the pickle is read when a file is opened.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fabric_init._text import joined
from fabric_init._torch_internals import legacy_load, weights_only_unpickler
from fabric_init.checkpoints.formats.pickles.unsafe_globals import unsafe_globals
from fabric_init.checkpoints.formats.torch_save.archive import StandIns, TorchArchive
from fabric_init.checkpoints.formats.torch_save.corruption import corruption_of
from fabric_init.checkpoints.formats.torch_save.legacy import BoundedFile, check_sizes
from fabric_init.checkpoints.formats.torch_save.meta_tensors import Storages
from fabric_init.checkpoints.reader import BaseReader, TensorSpec
from fabric_init.checkpoints.region import Region, is_below, take
from fabric_init.checkpoints.state_dicts import EXTRA_STATE, OPTIMIZER_PARTS, Location, choose_state_dict, describe
from fabric_init.checkpoints.storage.local import FileBytes, Opener, open_bytes
from fabric_init.checkpoints.storage.read_ahead import Place
from fabric_init.checkpoints.storage.remote import AnyPath, as_path
from fabric_init.errors import CheckpointFormatError

_ZIP_MAGIC = b"PK\x03\x04"

_CODE_IN_PICKLE = """\
{path} holds more than tensors: its pickle names {globals}, which could run code, so it is not loaded.
If you trust the file, convert it once:
    state = torch.load({name!r}, weights_only=False)   # runs the code in it
    safetensors.torch.save_file(state_dict_of(state), "model.safetensors")
or allow harmless classes beforehand: torch.serialization.add_safe_globals([...])."""

_LEGACY_NOTE = "legacy format of before torch 1.6: all of the file is in memory"


class TorchFileReader(BaseReader):
    """One open file of ``torch.save``; a :class:`~fabric_init.checkpoints.reader.CheckpointReader`.

    The state dict is what ``entry`` names (``"generator"``, ``"app.model"``), or else the dict found under ``model``,
    ``state_dict`` or ``module``, else the file's own dict, else the only one in it that has tensors; ``note`` says
    where. The state of optimizers is not looked at. Entries that are no tensors have no key; those whose name ends in
    ``_extra_state`` are kept in ``extra_state``.

    ``read`` returns a view of a private copy-on-write map; tensors that share storage in the file share memory here,
    too. With ``mmap=False`` it copies the region by plain reads: there is no map that a change of the file could break.
    A file in the legacy format (of before torch 1.6, or with ``_use_new_zipfile_serialization=False``) cannot be
    mapped: opening reads all of it into memory, once.

    Raises:
        CheckpointNotFoundError: the file is missing.
        CheckpointFormatError: it is truncated, corrupt, carries code, or holds no state dict of dense tensors, or
            several of which ``entry`` names none.
    """

    format = "torch"

    def __init__(
        self,
        path: str | os.PathLike[str] | AnyPath,
        *,
        mmap: bool = True,
        entry: str | None = None,
        opener: Opener | None = None,
    ) -> None:
        self.path = as_path(path)
        self._copy = not mmap
        file = open_bytes(self.path, mmap=mmap) if opener is None else opener(self.path)
        loaded, legacy, self._archive = _load_from(file, direct=opener is None and isinstance(self.path, Path))
        if not isinstance(loaded, dict):
            raise CheckpointFormatError(
                f"{path} holds a {type(loaded).__name__}, not a state dict. Save model.state_dict() instead."
            )
        states = dict(state_dicts_in(loaded))
        counts = {location: count_tensors(state) for location, state in states.items()}
        location = choose_state_dict(self.path, counts, entry)
        state = states[location]
        notes = [note for note in (describe(location), _LEGACY_NOTE if legacy else None) if note]
        self.note = "; ".join(notes) or None
        self._tensors: dict[str, torch.Tensor] = {}
        extra_state: dict[str, Any] = {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                for name, part in _parts(key, value):
                    self._tensors[checked_key(self.path, name, part, self._archive)] = part.detach()
            elif isinstance(key, str) and key.endswith(EXTRA_STATE):
                extra_state[key] = value if self._archive is None else self._archive.with_values(value)
        self.extra_state = extra_state
        self.metadata = getattr(state, "_metadata", None)
        self.specs = {key: TensorSpec(value.shape, value.dtype) for key, value in self._tensors.items()}

    def read(self, key: str, region: Region | None = None) -> torch.Tensor:
        """Return the tensor, or a region of it, on the CPU. Raises ``KeyError`` for an unknown key."""
        self.spec(key)
        if self._archive is not None:
            return self._archive.read(self._tensors[key], region).detach()
        part = take(self._tensors[key], region).resolve_conj().resolve_neg()
        if self._copy:  # of the legacy format, all of which is in memory
            part = part.clone(memory_format=torch.contiguous_format)
        return part.detach()

    def places(self, key: str, region: Region | None = None) -> Iterator[Place]:
        return iter(()) if self._archive is None else self._archive.places(self._tensors[key], region)


def _load_from(file: FileBytes, *, direct: bool) -> tuple[Any, bool, TorchArchive | None]:
    """Return the content, whether it is in the legacy format, and if not, the archive to read its tensors' values from.

    ``direct``: the file may be opened again by its path, without ``file``.
    """
    with corruption_of(file.path):
        if _is_legacy(file.path, file.head(64)):
            # All of it is read at once; not twice, where the file can be opened again.
            content = BoundedFile(Path(str(file.path))) if direct else io.BytesIO(file.head(file.size))
            try:
                with content:
                    check_sizes(content, file.size)
                    return legacy_load(content, "cpu", weights_only_unpickler), True, None
            except pickle.UnpicklingError as error:
                _refuse_code(file.path, _named_global(error))
                raise
        archive, loaded = load_archive(file)
        return loaded, False, archive


def load_archive(file: FileBytes, stand_ins: StandIns = ()) -> tuple[TorchArchive, Any]:
    """Return a zip file of ``torch.save``, and what is in it, its tensors on the meta device.

    Raises:
        CheckpointFormatError: it is no such file, or carries code.
    """
    with corruption_of(file.path):
        archive = TorchArchive(file)
        try:
            return archive, archive.load(stand_ins)
        except pickle.UnpicklingError:
            _refuse_code(file.path, unsafe_globals(archive.pickle))
            raise


def _is_legacy(path: AnyPath, head: bytes) -> bool:
    # A legacy file begins as a pickle of protocol 2 or later does.
    if not head.startswith((_ZIP_MAGIC, b"\x80")):
        raise CheckpointFormatError(
            f"{path} is not a file of torch.save: it begins with {head[:8]!r}, not with a zip header. Wrong file?"
        )
    return not head.startswith(_ZIP_MAGIC)


def _refuse_code(path: AnyPath, blocked: list[str]) -> None:
    """Raise if a pickle names what ``weights_only`` refuses."""
    if blocked:
        named = joined(blocked, most=5)
        raise CheckpointFormatError(_CODE_IN_PICKLE.format(path=path, name=path.name, globals=named)) from None


def _named_global(error: Exception) -> list[str]:
    return re.findall(r" GLOBAL (\S+) ", str(error))


_DEEPEST = 32
"""How many dicts may lie around a state dict. A file can nest a million, and each has all keys above it."""


def state_dicts_in(loaded: dict[object, object]) -> Iterator[tuple[Location, dict[object, object]]]:
    """Yield each dict that has tensors, and the keys that lead to it; optimizer state is left out."""
    waiting: list[tuple[Location, dict[object, object]]] = [((), loaded)]  # not below _DEEPEST
    seen = set()  # a pickle can make dicts that hold themselves
    for location, state in waiting:
        if id(state) in seen or state.keys() >= OPTIMIZER_PARTS:
            continue
        seen.add(id(state))
        if count_tensors(state):
            yield location, state
        if len(location) == _DEEPEST:
            continue
        inner = [(str(key), value) for key, value in state.items() if isinstance(value, dict)]
        waiting += [((*location, key), value) for key, value in inner if not key.endswith(EXTRA_STATE)]


def _parts(key: object, value: torch.Tensor) -> Iterator[tuple[object, torch.Tensor]]:
    """Yield a tensor by its key, or those that a quantized one holds, as torchao names them in safetensors files."""
    if isinstance(key, str) and hasattr(value, "__tensor_flatten__") and not hasattr(value, "_local_tensor"):
        module, dot, name = key.rpartition(".")
        for inner in value.__tensor_flatten__()[0]:
            yield f"{module}{dot}_{name}_{inner}", getattr(value, inner)
    else:
        yield key, value


def count_tensors(state: dict[object, object]) -> int:
    return sum(isinstance(value, torch.Tensor) for value in state.values())


def checked_key(path: AnyPath, key: object, value: torch.Tensor, archive: Storages | None = None) -> str:
    """Return ``key``. Raise if it is not a string, or its tensor is not a dense one with values in the file."""
    has_values = value.device.type == "cpu" if archive is None else archive.holds(value)
    if not isinstance(key, str):
        raise CheckpointFormatError(
            f"{path}: a tensor has the key {key!r}, a {type(key).__name__}; keys must be strings."
        )
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        why = f"a {type(value).__name__}: gather it into a plain tensor before saving"
    elif value.layout is not torch.strided or value.is_quantized:
        why = f"{value.layout}, {value.dtype}: only dense, unquantized tensors can be read; convert it before saving"
    elif not has_values:
        why = f"on the {value.device.type!r} device: it was saved before it had values"
    elif not _is_possible(value):
        why = f"of shape {tuple(value.shape)} and strides {value.stride()}: the file is damaged"
    elif archive is not None and not archive.reaches(value):
        why = "larger than its storage: the file is damaged"
    else:
        return key
    raise CheckpointFormatError(f"{path}: tensor {key!r} is {why}.")


def _is_possible(value: torch.Tensor) -> bool:
    """Return whether torch can take regions of a tensor with these sizes and strides; a pickle may state any."""
    reach = int(value.storage_offset()) + sum(n * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    return min(value.shape, default=0) >= 0 and is_below(2**62, value.shape) and reach < 2**62
