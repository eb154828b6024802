"""Read what a fill will need before it asks: it knows all places in files, and the order in which it takes them.

[Note: reading ahead]
All of it is a hint: a read that finds nothing reads by itself, through the same checks, so that a place that is wrong
or missing costs time and never a value. What is done depends on the file, each as measured (docs/benchmarks.md):

- A local file that is mapped is read by touching memory, a page fault at a time. Unless the places are in the kernel's
  cache, a thread has them read into it, which goes on after the fill.
- Plain reads of a local file, from front to back, are read ahead by the kernel itself.
- Of a file at a URL, places that lie close together are one *piece*, large ones several. Pieces are requested in the
  order in which reads need them, so many as are in flight or not taken yet within a bound of bytes.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from fabric_init.checkpoints.storage.page_cache import BackgroundReading, is_cached
from fabric_init.checkpoints.storage.strided_window import copy_bytes

PIECE_BYTES = 8 << 20
"""At most so much in one request."""
REQUESTS = 16
"""How many requests are in flight at once."""
GAP_BYTES = 1 << 16
"""A gap up to this is read along with what lies on both sides of it: a request costs more than these bytes."""
_BOUND_BYTES = 256 << 20
MAPPED_BYTES = 32 << 20
"""What is smaller altogether is read before a thread has begun."""


class PlacedFile(Protocol):
    """A file that places are in."""

    @property
    def path(self) -> Any:
        """Where it is: on this machine if this is a :class:`~pathlib.Path`."""
        ...

    mapped: bool
    """Whether it is read by touching memory, later than it is asked for."""


class RequestedFile(PlacedFile, Protocol):
    """A file at a URL."""

    ahead: ReadAhead | None
    """Has what was requested ahead."""

    def request(self, start: int, stop: int, buffer: bytearray) -> bytes | memoryview:
        """Return bytes ``start:stop``, perhaps in the memory of ``buffer``."""
        ...


class Place(NamedTuple):
    """Bytes ``start:stop`` of a file."""

    file: PlacedFile
    start: int
    stop: int


@dataclass(eq=False)
class _Piece:
    file: RequestedFile
    start: int
    stop: int
    last: int
    """The last read that needs it."""
    left: int = 0
    """Bytes that are still to be taken."""
    data: Future[bytes | memoryview] | None = None
    """What was requested, until it is taken."""
    buffer: bytearray | None = None
    copying: int = 0
    """How many threads copy out of it now."""


@dataclass
class _Pieces:
    """The pieces of one file by their position; they do not overlap."""

    starts: list[int] = field(default_factory=list)
    pieces: list[_Piece] = field(default_factory=list)

    def overlapping(self, start: int, stop: int) -> list[_Piece]:
        first, end = max(0, bisect_right(self.starts, start) - 1), bisect_left(self.starts, stop)
        return [piece for piece in self.pieces[first:end] if piece.stop > start]

    def insert(self, piece: _Piece) -> None:
        at = bisect_right(self.starts, piece.start)
        self.starts.insert(at, piece.start)
        self.pieces.insert(at, piece)


class ReadAhead:
    """Context in which the places of some reads are read ahead of them.

    Args:
        reads: For each read, in their order, the places in files that it will need, as far as they are known.
        bound: How many bytes to have requested and not taken at once.
    """

    def __init__(self, reads: Sequence[Iterable[Place]], bound: int = _BOUND_BYTES) -> None:
        self._bound = bound
        self._mapped: list[tuple[Path, int, int]] = []
        self._of_file: dict[RequestedFile, _Pieces] = {}
        self._waiting: deque[_Piece] = deque()  # to be requested
        self._requested: deque[_Piece] = deque()
        self._held = 0  # bytes requested, and not taken
        self._index = 0
        self._free: list[bytearray] = []
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(REQUESTS, "fabric_init requests")  # starts threads when they are needed
        self._background: BackgroundReading | None = None
        for index, places in enumerate(reads):
            for place in places:
                file = place.file
                if file.mapped:
                    self._mapped.append((file.path, place.start, place.stop))
                elif not isinstance(file.path, Path):
                    self._add(cast(RequestedFile, file), place.start, place.stop, index)

    def __enter__(self) -> ReadAhead:
        if sum(stop - start for _, start, stop in self._mapped) >= MAPPED_BYTES and not is_cached(self._mapped):
            self._background = BackgroundReading(self._mapped)
        for piece in self._waiting:
            piece.left = piece.stop - piece.start
            piece.file.ahead = self
        self._request_more()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for file in self._of_file:
            file.ahead = None
        self._waiting.clear()
        if error is not None and self._background is not None:
            self._background.stop()
        self._pool.shutdown(wait=error is None, cancel_futures=True)  # an error waits for no server

    def reading(self, index: int) -> None:
        """Say that reads before ``index`` are done."""
        self._index = index
        if self._requested:
            with self._lock:
                while self._requested and (self._requested[0].last < index or self._requested[0].data is None):
                    self._release(self._requested.popleft())
            self._request_more()

    def take(self, file: RequestedFile, start: int, target: memoryview) -> bool:
        """Fill ``target`` with bytes of a file that were requested; return whether all of them were.

        Raises:
            CheckpointError: The request has failed.
        """
        stop = start + len(target)
        with self._lock:
            pieces = self._of_file[file].overlapping(start, stop)
            begun = [(piece.start, piece.data) for piece in pieces if piece.data is not None]
            for piece in pieces:
                piece.copying += 1
        at = start
        for piece in pieces:
            at = piece.stop if piece.start <= at else at
        complete = len(begun) == len(pieces) and at >= stop
        for first, data in begun if complete else ():
            part = memoryview(data.result())[max(0, start - first) : stop - first]
            copy_bytes(target[max(0, first - start) :][: len(part)], part)
        with self._lock:
            for piece in pieces:
                piece.copying -= 1
                piece.left -= min(stop, piece.stop) - max(start, piece.start)
                if piece.left <= 0 and piece.last <= self._index:
                    self._release(piece)
        self._request_more()
        return complete

    def _add(self, file: RequestedFile, start: int, stop: int, index: int) -> None:
        pieces = self._of_file.setdefault(file, _Pieces())
        for piece in pieces.overlapping(start, stop):
            piece.last = index
            if start < piece.start:
                self._append(file, start, piece.start, index)
            start = piece.stop
        if start < stop:
            self._append(file, start, stop, index)

    def _append(self, file: RequestedFile, start: int, stop: int, index: int) -> None:
        pieces = self._of_file[file]
        latest = self._waiting[-1] if self._waiting else None
        if latest is not None and latest.file is file and 0 <= start - latest.stop <= GAP_BYTES:
            end = latest.start + PIECE_BYTES
            if start < end and not (latest.stop < start and pieces.overlapping(latest.stop, start)):
                latest.stop, latest.last = min(stop, end), index
                start = latest.stop
        for at in range(start, stop, PIECE_BYTES):
            piece = _Piece(file, at, min(at + PIECE_BYTES, stop), index)
            pieces.insert(piece)
            self._waiting.append(piece)

    def _request_more(self) -> None:
        with self._lock:
            while self._waiting:
                piece = self._waiting[0]
                size = piece.stop - piece.start
                if self._held and self._held + size > self._bound:
                    return
                self._waiting.popleft()
                if piece.left > 0 and piece.last >= self._index:  # else it was read already
                    piece.buffer = self._buffer(size)
                    try:
                        piece.data = self._pool.submit(piece.file.request, piece.start, piece.stop, piece.buffer)
                    except RuntimeError:  # this process can start no thread: reads do without
                        self._waiting.clear()
                        return
                    self._held += size
                    self._requested.append(piece)

    def _buffer(self, size: int) -> bytearray:
        """Return memory for a request, not much more than ``size``: of small pieces, thousands are held at once."""
        if size <= PIECE_BYTES // 2:
            return bytearray(size)
        return self._free.pop() if self._free else bytearray(PIECE_BYTES)

    def _release(self, piece: _Piece) -> None:
        if piece.data is not None:
            whole = piece.buffer is not None and len(piece.buffer) == PIECE_BYTES
            if whole and piece.data.done() and not piece.copying:
                self._free.append(cast(bytearray, piece.buffer))  # new memory costs more than a copy of it
            piece.data = piece.buffer = None
            self._held -= piece.stop - piece.start
