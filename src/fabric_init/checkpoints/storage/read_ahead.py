"""Read what a fill will need before it asks: it knows all places in files, and the order in which it takes them.

[Note: reading ahead]
Places that lie close together are one *piece* of a file, large ones several. Pieces are begun in the order in which the
reads need them, so many as are in flight or waiting to be taken within a bound of bytes. What beginning means is the
file's: for a local one the kernel is asked to have the bytes in its cache, which takes no copy and no memory of ours;
for one at a URL a request is sent, and its answer is kept until it is taken.

All of it is a hint. A read that finds nothing begun reads by itself, through the same checks, so that a place that is
wrong or missing costs time and never a value.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fabric_init.checkpoints.storage.page_cache import BackgroundReading

PIECE_BYTES = 8 << 20
"""At most so much in one request."""
REQUESTS = 16
"""How many requests are in flight at once."""
_BOUND_BYTES = 256 << 20
GAP_BYTES = 1 << 16
"""A gap up to this is read along with what lies on both sides of it: a request costs more than these bytes."""
_LOCAL_BYTES = 32 << 20
"""Local reads that are smaller altogether are over before reading ahead pays."""


class ReadableAhead(Protocol):
    """A file of which parts can be begun."""

    @property
    def path(self) -> Any:
        """Where it is."""
        ...

    mapped: bool
    """Whether it is read by touching memory, later than it is asked for."""
    ahead: ReadAhead | None
    """What reads ahead now; the file tells it what was taken."""

    def begin(self, start: int, stop: int) -> Callable[[], bytes] | None:
        """Begin to read bytes ``start:stop``; return what requests them if they take a request."""
        ...


class Place(NamedTuple):
    """Bytes ``start:stop`` of a file."""

    file: ReadableAhead
    start: int
    stop: int


@dataclass(eq=False)
class _Piece:
    file: ReadableAhead
    start: int
    stop: int
    last: int
    """The last read that needs it."""
    left: int = 0
    """Bytes that are still to be taken."""
    held: bool = False
    data: Future[bytes] | None = None


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
        bound: How many bytes to have in flight and not taken at once.
    """

    def __init__(self, reads: Sequence[Iterable[Place]], bound: int = _BOUND_BYTES) -> None:
        self._bound = bound
        self._of_file: dict[ReadableAhead, _Pieces] = {}
        self._waiting: deque[_Piece] = deque()  # to be begun
        self._taking: deque[_Piece] = deque()  # begun, not all taken
        self._held = 0
        self._index = 0
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._background: BackgroundReading | None = None
        for index, places in enumerate(reads):
            for place in places:
                self._add(place, index)

    def __enter__(self) -> ReadAhead:
        local = [piece for piece in self._waiting if isinstance(piece.file.path, Path)]
        if sum(piece.stop - piece.start for piece in local) < _LOCAL_BYTES:
            self._waiting = deque(piece for piece in self._waiting if not isinstance(piece.file.path, Path))
            local = []
        mapped = [(piece.file.path, piece.start, piece.stop) for piece in local if piece.file.mapped]
        if mapped:
            self._waiting = deque(piece for piece in self._waiting if not piece.file.mapped)
            self._background = BackgroundReading(mapped)
        for piece in self._waiting:
            piece.left = piece.stop - piece.start
            piece.file.ahead = self
        self._begin_more()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for file in self._of_file:
            file.ahead = None
        self._waiting.clear()
        if error is not None and self._background is not None:
            self._background.stop()  # else it goes on: what is mapped is touched after the fill
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def reading(self, index: int) -> None:
        """Say that reads before ``index`` are done."""
        with self._lock:
            self._index = index
            while self._taking and (self._taking[0].last < index or not self._taking[0].held):
                self._release(self._taking.popleft())
        self._begin_more()

    def taken(self, file: ReadableAhead, start: int, stop: int) -> None:
        """Say that bytes of a file have been read."""
        with self._lock:
            for piece in self._of_file[file].overlapping(start, stop):
                piece.left -= min(stop, piece.stop) - max(start, piece.start)
                if piece.left <= 0 and piece.last <= self._index:
                    self._release(piece)
        self._begin_more()

    def take(self, file: ReadableAhead, start: int, stop: int) -> bytes | memoryview | None:
        """Return bytes of a file that were requested; ``None`` if some of them were not.

        Raises:
            CheckpointError: The request has failed.
        """
        with self._lock:
            pieces = self._of_file[file].overlapping(start, stop)
            futures = [piece.data for piece in pieces]
        begun = [future for future in futures if future is not None]
        at = start
        for piece in pieces:
            at = piece.stop if piece.start <= at else at
        if len(begun) < len(pieces) or at < stop:
            self.taken(file, start, stop)  # by a request of its own
            return None
        parts = [
            memoryview(future.result())[max(0, start - piece.start) : stop - piece.start]
            for piece, future in zip(pieces, begun, strict=True)
        ]
        self.taken(file, start, stop)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _add(self, place: Place, index: int) -> None:
        file, start, stop = place
        pieces = self._of_file.setdefault(file, _Pieces())
        known = pieces.overlapping(start, stop)
        for piece in known:
            piece.last = index
            if start < piece.start:
                self._append(file, pieces, start, piece.start, index)
            start = piece.stop
        if start < stop:
            self._append(file, pieces, start, stop, index)

    def _append(self, file: ReadableAhead, pieces: _Pieces, start: int, stop: int, index: int) -> None:
        latest = self._waiting[-1] if self._waiting else None
        if latest is not None and latest.file is file and 0 <= start - latest.stop <= GAP_BYTES:
            between = pieces.overlapping(latest.stop, start) if latest.stop < start else []
            room = PIECE_BYTES - (latest.stop - latest.start)
            if not between and start - latest.stop < room:
                latest.stop, latest.last = min(stop, latest.start + PIECE_BYTES), index
                start = latest.stop
        for at in range(start, stop, PIECE_BYTES):
            piece = _Piece(file, at, min(at + PIECE_BYTES, stop), index)
            pieces.insert(piece)
            self._waiting.append(piece)

    def _begin_more(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                piece = self._waiting[0]
                size = piece.stop - piece.start
                if self._held and self._held + size > self._bound:
                    return
                self._waiting.popleft()
                if piece.left <= 0 or piece.last < self._index:
                    continue  # was read already
                piece.held = True
                self._held += size
                self._taking.append(piece)
                request = piece.file.begin(piece.start, piece.stop)
                if request is not None:
                    self._pool = self._pool or ThreadPoolExecutor(REQUESTS, "fabric_init read-ahead")
                    piece.data = self._pool.submit(request)

    def _release(self, piece: _Piece) -> None:
        piece.left, piece.data = 0, None
        if piece.held:
            piece.held = False
            self._held -= piece.stop - piece.start
