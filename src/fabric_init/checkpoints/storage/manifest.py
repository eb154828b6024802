"""SHA-256 of files, checked while they are read.

A manifest is what ``sha256sum`` writes, a line a file: ``<digest>  <name>``. Then each file is read whole, once, when
it is opened. :func:`write_manifest` adds the digest of every block of a file, in comment lines that ``sha256sum
--check`` skips. With those nothing is read ahead: each read checks the blocks that it touches, and takes its values
from the bytes that were checked.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch

from fabric_init.checkpoints.region import Window
from fabric_init.checkpoints.storage.local import FileBytes, Opener, open_bytes
from fabric_init.checkpoints.storage.read_ahead import Place
from fabric_init.checkpoints.storage.remote import AnyPath, as_path
from fabric_init.checkpoints.storage.strided_window import gather, memory
from fabric_init.errors import CheckpointFormatError, CheckpointNotFoundError

BLOCK_BYTES = 1 << 20
"""The usual block: what a tiny read costs at least, about a millisecond to hash; a manifest takes 67 bytes for each."""
_KEPT_BLOCKS = 8

_HEAD = "# fabric_init manifest: the digests of a file's blocks of {} bytes follow its line"
_HEAD_LINE = re.compile(r"# fabric_init manifest: the digests of a file's blocks of (\d{1,12}) bytes follow its line")
_FILE_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_BLOCK_LINE = re.compile(r"# ([0-9a-f]{64})")


@dataclass(slots=True)
class _Digests:
    of_file: str
    blocks: list[str] = field(default_factory=list)


class Manifest:
    """The digests of some files.

    A file is looked up by its name with as many folders before it as the manifest has: ``model.safetensors`` stands for
    a file of that name wherever it is, ``a/model.safetensors`` only for one in a folder ``a``.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointFormatError: it is not a manifest.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = as_path(path)
        file = open_bytes(self.path, mmap=False)
        self.block_bytes = 0
        self._files: dict[tuple[str, ...], _Digests] = {}
        last = None
        for number, line in enumerate(file.head(file.size).decode(errors="replace").splitlines(), 1):
            if head := _HEAD_LINE.fullmatch(line):
                self.block_bytes = int(head[1])
            elif (block := _BLOCK_LINE.fullmatch(line)) and last is not None and self.block_bytes:
                last.blocks.append(block[1])
            elif named := _FILE_LINE.fullmatch(line):
                last = self._files.setdefault(PurePosixPath(named[2]).parts, _Digests(named[1].lower()))
                if last.of_file != named[1].lower() or last.blocks:
                    raise CheckpointFormatError(f"{self.path}, line {number}: {named[2]!r} is listed twice.")
            elif line.strip() and not line.startswith("#"):
                raise CheckpointFormatError(
                    f"{self.path}, line {number}: expected '<SHA-256 in hex>  <file name>', as sha256sum writes it, "
                    f"and found {line!r:.100}."
                )
        if not self._files:
            raise CheckpointFormatError(f"{self.path} lists no file, so it is no manifest.")

    def opener(self, *, mmap: bool) -> Opener:
        """Return a function that opens files so that all reads are checked."""
        return lambda path: self._checked(path, mmap)

    def check(self, path: AnyPath) -> None:
        """Compare all of a file. Raises :class:`~fabric_init.errors.CheckpointFormatError` if it differs."""
        file = open_bytes(path, mmap=False)
        self._check_file(file, self._find(path))

    def differing(self, path: AnyPath, report: Callable[[int], None]) -> list[tuple[int, int]]:
        """Compare all of a file, and return the ranges of bytes that differ, block by block if the manifest has blocks.

        Args:
            path: of the file.
            report: called with the number of bytes after each block.

        Raises:
            CheckpointFormatError: the file is not listed or cannot be read.
        """
        file, digests = open_bytes(path, mmap=False), self._find(path)
        sha256, wrong, size = hashlib.sha256(), list[tuple[int, int]](), self.block_bytes or BLOCK_BYTES
        for index, start in enumerate(range(0, file.size, size)):
            block = _range(file, start, min(start + size, file.size))
            sha256.update(block)
            if digests.blocks and digests.blocks[index : index + 1] != [hashlib.sha256(block).hexdigest()]:
                wrong.append((start, start + len(block)))
            report(len(block))
        return wrong or ([] if sha256.hexdigest() == digests.of_file else [(0, file.size)])

    def check_folder(self, folder: Path) -> None:
        """Compare every file of a folder; what is listed for the folder must be there, too.

        Raises:
            CheckpointFormatError: a file differs or is not listed.
            CheckpointNotFoundError: a listed file is missing.
        """
        files = {file.absolute() for file in sorted(folder.rglob("*")) if file.is_file()}
        if isinstance(self.path, Path):
            files.discard(self.path.absolute())
        for file in sorted(files):
            self.check(file)
        # A name in the manifest ends a path; what is before it is the folder that the manifest is of.
        listed = list(self._files)
        roots = {
            file.parents[len(parts) - 1] for file in files for parts in listed if file.parts[-len(parts) :] == parts
        }
        for path in sorted(root.joinpath(*parts) for root in roots for parts in listed):
            if path.is_relative_to(folder.absolute()) and path not in files:
                raise CheckpointNotFoundError(f"{path} is listed in {self.path}, and is not there. {_CHANGED}")

    def _checked(self, path: AnyPath, mmap: bool) -> FileBytes:
        digests = self._find(path)
        # Blocks are copied anyway: a map would show later changes of the file.
        file = open_bytes(path, mmap=mmap and not digests.blocks)
        if not digests.blocks:
            self._check_file(file, digests)
            return file
        if len(digests.blocks) != -(-file.size // self.block_bytes):
            raise CheckpointFormatError(
                f"{file.path} has {file.size:,} bytes, and {self.path} lists {len(digests.blocks)} blocks of "
                f"{self.block_bytes:,} for it. {_CHANGED}"
            )
        return _CheckedBytes(file, digests.blocks, self)

    def _check_file(self, file: FileBytes, digests: _Digests) -> None:
        sha256 = hashlib.sha256()
        for start in range(0, file.size, BLOCK_BYTES):
            sha256.update(_range(file, start, min(start + BLOCK_BYTES, file.size)))
        if sha256.hexdigest() != digests.of_file:
            raise CheckpointFormatError(f"{file.path}: SHA-256 mismatch with {self.path}. {_CHANGED}")

    def _find(self, path: AnyPath) -> _Digests:
        parts = PurePosixPath(str(path)).parts if not isinstance(path, Path) else path.absolute().parts
        for first in range(len(parts)):
            if parts[first:] in self._files:
                return self._files[parts[first:]]
        raise CheckpointFormatError(
            f"{path} is not listed in the manifest {self.path}, so it is not read. It lists "
            f"{', '.join('/'.join(parts) for parts in list(self._files)[:8])}."
        )


_CHANGED = "It was changed or damaged, or the manifest is of another file: fetch both again from where you trust them."


class _CheckedBytes:
    """A file whose blocks are each compared before a byte of them is used."""

    def __init__(self, file: FileBytes, blocks: list[str], manifest: Manifest) -> None:
        self.path, self.size = file.path, file.size
        self._file, self._blocks, self._manifest = file, blocks, manifest
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def place(self, start: int, stop: int) -> Place:
        size = self._manifest.block_bytes
        return self._file.place(start // size * size, min(-(-stop // size) * size, self.size))

    def head(self, stop: int) -> bytes:
        return self.part(0, min(stop, self.size))

    def part(self, start: int, stop: int) -> bytes:
        data = bytearray(stop - start)
        self._copy(memoryview(data), start)
        return bytes(data)

    def tensor(self, dtype: torch.dtype, offset: int, window: Window) -> torch.Tensor:
        out = torch.empty(window.sizes, dtype=dtype, device="cpu")
        if not out.numel():
            return out

        def read_run(target: torch.Tensor, start: int) -> None:
            self._copy(memory(target), offset + start * dtype.itemsize)

        gather(out, window, read_run, self._manifest.block_bytes)
        return out

    def _copy(self, target: memoryview, start: int) -> None:
        done = 0
        while done < len(target):
            index, skip = divmod(start + done, self._manifest.block_bytes)
            block = memoryview(self._block(index))[skip:]
            count = min(len(block), len(target) - done)
            if not count:
                raise CheckpointFormatError(f"{self.path} ends before byte {start + len(target):,}. {_CHANGED}")
            target[done : done + count] = block[:count]
            done += count

    def _block(self, index: int) -> bytes:
        with self._lock:
            if index in self._kept:
                self._kept.move_to_end(index)
                return self._kept[index]
        size = self._manifest.block_bytes
        first, stop = index * size, min((index + 1) * size, self.size)
        block = self._file.part(first, max(first, stop))
        if index >= len(self._blocks) or hashlib.sha256(block).hexdigest() != self._blocks[index]:
            raise CheckpointFormatError(
                f"{self.path}: SHA-256 mismatch with {self._manifest.path} in bytes {first:,} to {stop:,}. {_CHANGED}"
            )
        with self._lock:
            self._kept[index] = block
            while len(self._kept) > _KEPT_BLOCKS:
                self._kept.popitem(last=False)
        return block


def write_manifest(
    path: str | os.PathLike[str], manifest: str | os.PathLike[str] | None = None, *, block_bytes: int = BLOCK_BYTES
) -> Path:
    """Write the SHA-256 digests of a checkpoint, a file or every file in a folder, for ``manifest=``.

    Args:
        path: the file or folder.
        manifest: where to; by default ``SHA256SUMS`` in the folder, or the file's name with ``.sha256`` beside it.
        block_bytes: how many bytes each digest covers.

    Returns:
        The manifest's path. ``sha256sum --check`` takes it, too.

    Raises:
        CheckpointNotFoundError: the file is missing, or the folder empty.
        CheckpointFormatError: a file cannot be read.
    """
    if block_bytes < 1:
        raise ValueError(f"block_bytes should be at least 1, and is {block_bytes}")
    path = Path(path)
    root = path if path.is_dir() else path.parent
    usual = root / "SHA256SUMS" if path.is_dir() else Path(f"{path}.sha256")
    target = usual if manifest is None else Path(manifest)
    files = sorted(_files_in(path)) if path.is_dir() else [path]
    files = [file for file in files if file.absolute() != target.absolute()]
    if not files:
        raise CheckpointNotFoundError(f"{path} has no file in it.")
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib lets other threads run
        digests = list(pool.map(lambda file: _digests(file, block_bytes), files))
    lines = [_HEAD.format(block_bytes)]
    for file, digest in zip(files, digests, strict=True):
        lines += [f"{digest.of_file}  {file.relative_to(root).as_posix()}", *(f"# {block}" for block in digest.blocks)]
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(beside, target)
    return target


def _files_in(folder: Path) -> Iterator[Path]:
    for entry in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in entry.relative_to(folder).parts)
        # A checkpoint of torch.distributed.checkpoint keeps its index in a hidden file.
        if entry.is_file() and (not hidden or entry.name == ".metadata"):
            yield entry


def _digests(path: Path, block_bytes: int) -> _Digests:
    if not path.stat().st_size:
        return _Digests(hashlib.sha256().hexdigest())
    file, sha256, blocks = open_bytes(path, mmap=False), hashlib.sha256(), []
    for start in range(0, file.size, block_bytes):
        block = _range(file, start, min(start + block_bytes, file.size))
        sha256.update(block)
        blocks.append(hashlib.sha256(block).hexdigest())
    return _Digests(sha256.hexdigest(), blocks)


def _range(file: FileBytes, start: int, stop: int) -> memoryview:
    return file.tensor(torch.uint8, 0, Window(start, (stop - start,), (1,))).numpy().data
