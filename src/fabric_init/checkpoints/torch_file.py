"""Reader for one file written by ``torch.save``: ``.pt``, ``.pth``, ``.bin``, ``.ckpt``.

The format: a zip archive with a pickle and one uncompressed record a storage, see
https://docs.pytorch.org/docs/stable/notes/serialization.html. ``torch.load`` reads it with ``weights_only=True``,
always: no code in the pickle runs, and there is no option to let it. With ``mmap=True`` only the pickle is read.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fabric_init.checkpoints.file_bytes import FileBytes, Opener, open_bytes
from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.checkpoints.region import Region, take
from fabric_init.checkpoints.remote import AnyPath, as_path
from fabric_init.checkpoints.torch_archive import TorchArchive, unsafe_globals
from fabric_init.errors import CheckpointError, CheckpointFormatError

WRAPPERS = ("model", "state_dict", "module")
"""Where training checkpoints keep the state dict: Fabric and most scripts, Lightning's Trainer, DeepSpeed."""

_allowed_list = threading.Lock()

_ZIP_MAGIC = b"PK\x03\x04"
_MAP_PRIVATE = 2  # mmap.MAP_PRIVATE on every POSIX system; the name is missing on Windows

_CODE_IN_PICKLE = """\
{path} holds more than tensors: its pickle names {globals}, which could run code, so it is not loaded.
If you trust the file, convert it once:
    state = torch.load({name!r}, weights_only=False)   # runs the code in it
    safetensors.torch.save_file(state_dict_of(state), "model.safetensors")
or allow harmless classes beforehand: torch.serialization.add_safe_globals([...])."""

_LEGACY = """\
{path} was written in the format of before torch 1.6 (or with _use_new_zipfile_serialization=False), which cannot be
read in parts. Save it once more:
    torch.save(torch.load({name!r}, map_location="cpu", weights_only=True), "new.pt")"""


class TorchFileReader:
    """One open zip file of ``torch.save``; a :class:`~fabric_init.checkpoints.reader.CheckpointReader`.

    The state dict is the dict found under ``model``, ``state_dict`` or ``module`` (one level down; ``note`` says
    which), else the file's own dict. Entries that are no tensors have no key; those whose name ends in
    ``_extra_state`` are kept in ``extra_state``.

    ``read`` returns a view of a private copy-on-write map. With ``mmap=False`` it copies the region out of that map, so
    what was read no longer depends on the file; the file must stay unchanged while the reader lives. Tensors that share
    storage in the file share it here too, unless copied.

    Raises :class:`~fabric_init.errors.CheckpointNotFoundError` for a missing file and
    :class:`~fabric_init.errors.CheckpointFormatError` for one that is truncated, corrupt, in the legacy format, carries
    code, or holds no state dict of dense tensors.
    """

    format = "torch"
    note: str | None = None

    def __init__(
        self, path: str | os.PathLike[str] | AnyPath, *, mmap: bool = True, opener: Opener | None = None
    ) -> None:
        self.path = as_path(path)
        self._archive: TorchArchive | None = None
        if opener is None and isinstance(self.path, Path):
            self._copy = not mmap or not maps_privately()
            loaded = load_mapped(self.path)
        else:
            self._copy = not mmap
            file = open_bytes(self.path, mmap=mmap) if opener is None else opener(self.path)
            self._archive, loaded = _open_archive(file)
        state, wrapper = _find_state_dict(self.path, loaded)
        if wrapper is not None:
            self.note = f"state dict found under {wrapper!r}"
        self._tensors: dict[str, torch.Tensor] = {}
        self.extra_state: dict[str, Any] = {}
        """Entries ``*_extra_state`` (``nn.Module.get_extra_state``) that are not tensors."""
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                self._tensors[checked_key(self.path, key, value, self._archive)] = value.detach()
            elif isinstance(key, str) and key.endswith("_extra_state"):
                self.extra_state[key] = value
        self._specs = {key: TensorSpec(value.shape, value.dtype) for key, value in self._tensors.items()}

    def keys(self) -> Sequence[str]:
        """Every tensor's key, in the order of the state dict."""
        return tuple(self._tensors)

    def spec(self, key: str) -> TensorSpec:
        """Shape and dtype of one tensor. Raises ``KeyError`` for an unknown key."""
        try:
            return self._specs[key]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {key!r}") from None

    def read(self, key: str, region: Region | None = None) -> torch.Tensor:
        """The tensor or a region of it, on the CPU. Raises ``KeyError`` for an unknown key."""
        self.spec(key)
        if self._archive is not None:
            with _corruption_of(self.path):
                return self._archive.read(self._tensors[key], region)
        part = take(self._tensors[key], region).resolve_conj().resolve_neg()
        if self._copy:
            part = part.clone(memory_format=torch.contiguous_format)
        return part.detach()


def maps_privately() -> bool:
    """Whether writes to what :func:`load_mapped` gives stay in this process."""
    # torch.serialization.set_default_mmap_options may have asked for shared maps; writes would reach the file.
    return torch.serialization.get_default_mmap_options() in (None, _MAP_PRIVATE)


def load_mapped(path: Path, stand_ins: Sequence[tuple[type, str]] = ()) -> Any:
    """What ``torch.save`` was given, with its tensors still in the file.

    ``stand_ins`` are what to use for classes that the pickle may name: (harmless class of ours, full name in the file).
    """
    _check_magic(path, open_bytes(path, mmap=False).head(64))
    with _corruption_of(path), _allowing(stand_ins):
        try:
            return torch.load(os.fspath(path), mmap=True, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError:
            _refuse_code(path, _unsafe_globals(path))
            raise


def _open_archive(file: FileBytes) -> tuple[TorchArchive, Any]:
    """The file, and what ``torch.save`` was given, its tensors without values."""
    _check_magic(file.path, file.head(64))
    with _corruption_of(file.path):
        archive = TorchArchive(file)
        try:
            return archive, archive.load()
        except pickle.UnpicklingError:
            _refuse_code(file.path, unsafe_globals(archive.pickle))
            raise


@contextmanager
def _corruption_of(path: AnyPath) -> Iterator[None]:
    # A corrupt pickle calls allowed functions with wrong arguments: the error can be of any type.
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointFormatError(_corrupt(path, error)) from error


def _check_magic(path: AnyPath, head: bytes) -> None:
    if head.startswith(_ZIP_MAGIC):
        return
    if head.startswith(b"\x80"):  # a pickle of protocol 2 or later, as legacy torch files begin
        raise CheckpointFormatError(_LEGACY.format(path=path, name=path.name))
    raise CheckpointFormatError(
        f"{path} is not a file of torch.save: it begins with {head[:8]!r}, not with a zip header. Wrong file?"
    )


def _refuse_code(path: AnyPath, blocked: list[str]) -> None:
    if blocked:
        named = ", ".join(blocked[:5]) + (f" and {len(blocked) - 5} more" if len(blocked) > 5 else "")
        raise CheckpointFormatError(_CODE_IN_PICKLE.format(path=path, name=path.name, globals=named)) from None


@contextmanager
def _allowing(stand_ins: Sequence[tuple[type, str]]) -> Iterator[None]:
    # torch keeps one list for the process: without the lock the thread that is done first would end it for the others.
    if not stand_ins:
        yield
        return
    with _allowed_list, torch.serialization.safe_globals(list(stand_ins)):
        yield


def _unsafe_globals(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(os.fspath(path)))
    except Exception:  # corrupt as well: the caller reports the first error
        return []


def _corrupt(path: AnyPath, error: Exception) -> str:
    reason = str(error).strip().split("\n")[-1][:300]
    return (
        f"{path} cannot be read as a file of torch.save: {reason} ({type(error).__name__}). If a download or copy was "
        f"cut short, fetch it again; a TorchScript archive must be saved as a state dict first."
    )


def _find_state_dict(path: AnyPath, loaded: object) -> tuple[dict[object, object], str | None]:
    """The dict with the tensors, and the entry of the outer dict it was found under."""
    if not isinstance(loaded, dict):
        raise CheckpointFormatError(
            f"{path} holds a {type(loaded).__name__}, not a state dict. Save model.state_dict() instead."
        )
    holders = {key: _count_tensors(value) for key, value in loaded.items() if _count_tensors(value)}
    wrapped = [name for name in WRAPPERS if name in holders]
    if len(wrapped) > 1:
        raise CheckpointFormatError(
            f"{path} holds state dicts under {' and '.join(map(repr, wrapped))}. Save the one you mean to its own file."
        )
    if wrapped:
        return loaded[wrapped[0]], wrapped[0]
    if _count_tensors(loaded):
        return loaded, None
    inside = ", ".join(f"{key!r} ({count} tensors)" for key, count in holders.items())
    raise CheckpointFormatError(
        f"{path} holds no tensor at the top level, nor in a dict under {', '.join(map(repr, WRAPPERS))}. "
        + (f"There are tensors under {inside}: save that dict to its own file." if inside else "Is it the right file?")
    )


def _count_tensors(value: object) -> int:
    return sum(isinstance(entry, torch.Tensor) for entry in value.values()) if isinstance(value, dict) else 0


def checked_key(path: AnyPath, key: object, value: torch.Tensor, archive: TorchArchive | None = None) -> str:
    """The key, if it is a name and its tensor is one whose values lie densely in this file."""
    has_values = value.device.type == "cpu" or (archive is not None and archive.holds(value))
    if not isinstance(key, str):
        raise CheckpointFormatError(
            f"{path}: a tensor has the key {key!r}, a {type(key).__name__}; keys must be strings."
        )
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        why = f"a {type(value).__name__}: gather it into a plain tensor before saving"
    elif not has_values:
        why = f"on the {value.device.type!r} device: it was saved before it had values"
    elif value.layout is not torch.strided or value.is_quantized:
        why = f"{value.layout}, {value.dtype}: only dense, unquantized tensors can be read; convert it before saving"
    else:
        return key
    raise CheckpointFormatError(f"{path}: tensor {key!r} is {why}.")
