"""The tape: which op wrote which storage, in order, and which of those ops still matter.

A recorded tensor is named by its *storage* and its geometry on it, never by the Python object: ``nn.Parameter(t)``,
``t.data`` and views make new objects on the same storage. So views need no ops of their own, and ties are plain to see.
The storage's number rides on the storage object itself (torch keeps that object alive with the memory it stands for),
which makes the look-up one attribute read and ties the recording's life to the tensors it is about.

Everything here is plain frozen data; :mod:`fabric_init.recording.replay` carries it out.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch

from fabric_init._text import dtype_name
from fabric_init.recording.op_schemas import (
    Func,
    asks_shape_only,
    only_copies,
    overwrites,
    pointwise,
    written_arguments,
)

Rng = Literal["per_op", "eager"]
"""``per_op``: each random op has its own generator. ``eager``: one stream, in order, as plain PyTorch draws it."""


def check_rng(rng: str) -> None:
    """Raise ``ValueError`` unless ``rng`` is one of the two modes."""
    if rng not in get_args(Rng):
        raise ValueError(f"rng={rng!r}: give one of {', '.join(map(repr, get_args(Rng)))}")


_numbers = itertools.count()  # storages and ops are numbered once per process, so that tapes can be joined


def now() -> int:
    """A number between those of the ops that were recorded before, and those that will be."""
    return next(_numbers)


class TensorRef(NamedTuple):
    """A tensor as a place on a recorded storage. ``offset`` and ``stride`` count elements of ``dtype``."""

    storage: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    conj: bool = False
    neg: bool = False

    @property
    def nbytes(self) -> int:
        return self.size.numel() * self.dtype.itemsize

    @property
    def expanded(self) -> bool:
        """Whether several of its elements are at one place in memory."""
        return any(stride == 0 and size > 1 for stride, size in zip(self.stride, self.size, strict=True))

    def text(self, name: str = "") -> str:
        """Return the reference in one line, as ``s3[4, 2] float32 (offset 4)``, with the ``name`` of its storage."""
        where = [f"offset {self.offset}"] if self.offset else []
        if self.stride != _row_major(self.size):
            where.append(f"stride {list(self.stride)}")
        layout = f" ({', '.join(where)})" if where else ""
        label = f"s{self.storage}:{name}" if name else f"s{self.storage}"
        return f"{label}{list(self.size)} {dtype_name(self.dtype)}{layout}"

    def __repr__(self) -> str:
        return self.text()


def _row_major(size: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for length in reversed(size[1:]):
        strides.append(strides[-1] * max(length, 1))
    return tuple(reversed(strides)) if size else ()


class Constant(NamedTuple):
    """A real tensor that the constructor brought in: its value at that moment."""

    tensor: torch.Tensor

    def __repr__(self) -> str:
        return f"constant{list(self.tensor.shape)} {dtype_name(self.tensor.dtype)}"


class CallSite(NamedTuple):
    """Where the model's own code asked for an op.

    ``constructed`` says that the line only built one of torch's own modules, whose constructor chose the rule.
    """

    file: str
    line: int
    constructed: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Draw(NamedTuple):
    """A random op's place in its stream: the stream, how many draws came before, and which op drew last."""

    stream: int
    position: int
    previous: int | None


class Stream(NamedTuple):
    """A source of random numbers as it stood before its first recorded draw.

    ``exact`` streams (a seed or a generator of the constructor's own choosing) are always drawn in order, bit for bit.
    Of the default stream each draw gets a generator of its own, seeded from ``seed`` and the draw's position, unless
    the replay asks for ``rng="eager"``.
    """

    exact: bool
    seed: int
    states: Mapping[torch.device, torch.Tensor]


class StorageInfo(NamedTuple):
    """One recorded storage: its size in bytes and the device that the constructor meant it for."""

    nbytes: int
    device: torch.device


class Op(NamedTuple):
    """One recorded call. ``args`` and ``kwargs`` hold refs and constants in place of tensors.

    ``outputs`` are the storages' first tensors for a call that makes new ones, in the order that the call returns them;
    ``targets`` are the existing tensors that it writes in place.
    """

    number: int
    func: Func
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: tuple[TensorRef, ...]
    outputs: tuple[TensorRef, ...]
    draw: Draw | None
    source: CallSite | None
    default_dtype: torch.dtype | None = None  # set where the result's dtype came from torch's default one

    def refs(self) -> Iterator[TensorRef]:
        """Every recorded tensor among the arguments, read or written."""
        return _refs_in(itertools.chain(self.args, self.kwargs.values()))

    def reads(self) -> Iterator[TensorRef]:
        """Every recorded tensor whose old value the call needs."""
        if asks_shape_only(self.func):
            return iter(())
        if not overwrites(self.func):
            return self.refs()
        positions, names = written_arguments(self.func)
        kept = [value for position, value in enumerate(self.args) if position not in positions]
        return _refs_in(itertools.chain(kept, (value for name, value in self.kwargs.items() if name not in names)))

    def text(self, names: Mapping[int, str]) -> str:
        """Return the call in one line, with the names that ``names`` has for storages.

        For example ``#12 normal_(s3:head.weight[4, 4] float32, std=0.02)  ← model.py:31``.
        """
        name = getattr(self.func, "__name__", str(self.func)).split(".")[0]
        given = [_value_text(value, names) for value in self.args]
        given += [f"{key}={_value_text(value, names)}" for key, value in self.kwargs.items() if value is not None]
        made = ", ".join(_value_text(ref, names) for ref in self.outputs)
        line = f"#{self.number} {name}({', '.join(given)})" + (f" → {made}" if made else "")
        return line if self.source is None else f"{line}  ← {os.path.basename(self.source.file)}:{self.source.line}"

    def __repr__(self) -> str:
        return self.text({})


def _value_text(value: Any, names: Mapping[int, str]) -> str:
    if isinstance(value, TensorRef):
        return value.text(names.get(value.storage, ""))
    if type(value) in (list, tuple, torch.Size):
        return f"[{', '.join(_value_text(item, names) for item in value)}]"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return f"{value:g}" if type(value) is float else str(value) if isinstance(value, torch.device) else repr(value)


def _refs_in(values: Iterable[Any]) -> Iterator[TensorRef]:
    for value in values:
        if isinstance(value, TensorRef):
            yield value
        elif type(value) in (list, tuple):
            yield from _refs_in(value)


_SHOWN = 5  # ops at either end of a tape


class Tape:
    """What one recording wrote. Grows while the block is open, and is only read afterwards."""

    def __init__(self, rng: Rng = "per_op") -> None:
        self.rng = rng
        self.ops: dict[int, Op] = {}
        self.writers: dict[int, list[int]] = {}
        self.storages: dict[int, StorageInfo] = {}
        self.streams: dict[int, Stream] = {}
        self.has_plain = False  # plain meta tensors are on recorded storages: lazy ones get torch's own class later
        self.brought = 0  # bytes of the real tensors that the constructor brought in
        self.sealed_rng: Rng | None = None  # a random value was shown to the constructor: the mode it was drawn in
        self.waits: dict[int, int] = {}  # storages that wait for a load, and the op number from which on
        self.overruled: dict[int, int] = {}  # those of them that got values, so their own init is not what they hold
        self.records: dict[int, weakref.ref[Recorded]] = {}  # by storage: alive as long as a tensor is on it
        self.later: Any = None  # answers for recorded tensors when no block is open
        self._joined: Tape | None = None

    def summary(self) -> str:
        """Return the size of the tape in words."""
        nbytes = sum(info.nbytes for info in self.storages.values())
        return (
            f"{len(self.ops):,} ops on {len(self.storages):,} storages ({nbytes:,} bytes), "
            f"{len(self.streams)} random stream{'s' if len(self.streams) != 1 else ''}, rng={self.rng!r}"
        )

    def __repr__(self) -> str:
        ops = [repr(self.ops[number]) for number in sorted(self.ops)]
        if len(ops) > 2 * _SHOWN:
            ops = [*ops[:_SHOWN], f"… {len(ops) - 2 * _SHOWN:,} more ops …", *ops[-_SHOWN:]]
        return "\n  ".join([f"Tape: {self.summary()}", *ops])

    def __deepcopy__(self, memo: dict[int, Any]) -> Tape:
        """Return the tape itself: copies of recorded tensors are on it, too."""
        return self

    def current(self) -> Tape:
        """This tape, or the later one that it was joined to."""
        tape = self
        while tape._joined is not None:
            tape = tape._joined
        return tape

    def join(self, later: Tape) -> None:
        """Continue this tape in ``later``: a model made in two blocks has one history."""
        later.ops.update(self.ops)
        later.writers.update(self.writers)
        later.storages.update(self.storages)
        later.streams.update(self.streams)
        later.brought += self.brought
        later.sealed_rng = later.sealed_rng or self.sealed_rng
        later.waits.update(self.waits)
        later.records.update(self.records)
        later.overruled.update(self.overruled)
        if self.later is not None and later.later is not None:
            self.later.join(later.later)
        self._joined = later

    def add_storage(self, nbytes: int, device: torch.device) -> int:
        number = next(_numbers)
        self.storages[number] = StorageInfo(nbytes, device)
        return number

    def is_alive(self, storage: int) -> bool:
        """Whether a recorded tensor is on ``storage`` still."""
        record = self.records.get(storage)
        return record is not None and record() is not None

    def add_stream(self, stream: Stream) -> int:
        number = next(_numbers)
        self.streams[number] = stream
        return number

    def bring(self, tensor: torch.Tensor) -> Constant:
        """A real tensor as the tape holds it: with its memory."""
        self.brought += tensor.nbytes
        return Constant(tensor)

    def add_op(
        self,
        func: Func,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        targets: tuple[TensorRef, ...],
        outputs: tuple[TensorRef, ...],
        draw: Draw | None,
        source: CallSite | None,
        default_dtype: torch.dtype | None = None,
    ) -> int:
        index = next(_numbers)
        self.ops[index] = Op(index, func, args, kwargs, targets, outputs, draw, source, default_dtype)
        writers = self.writers
        for ref in targets:
            entry = writers.get(ref.storage)
            if entry is None:
                writers[ref.storage] = [index]
            else:
                entry.append(index)
        for ref in outputs:
            writers[ref.storage] = [index]
        return index

    def written_since(self, storage: int, number: int) -> bool:
        """Return whether an op later than ``number`` wrote to ``storage``."""
        return any(writer > number for writer in self.writers.get(storage, ()))

    def first_ref(self, storage: int) -> TensorRef | None:
        """Return how the first tensor that was written whole lies on ``storage``."""
        for number in self.writers.get(storage, ()):
            for ref in (*self.ops[number].outputs, *self.ops[number].targets):
                if ref.storage == storage and self.covers(ref):
                    return ref
        return None

    def covers(self, ref: TensorRef) -> bool:
        """Whether ``ref`` is the whole of its storage, every byte once."""
        if ref.nbytes != self.storages[ref.storage].nbytes:
            return False
        expected = 1
        for stride, size in sorted(zip(ref.stride, ref.size, strict=True)):
            if size != 1:
                if stride != expected:
                    return False
                expected *= size
        return True

    def writes_whole(self, op: Op, storage: int) -> bool:
        """Whether ``op`` gives ``storage`` a value that does not depend on what was there before."""
        if any(ref.storage == storage for ref in op.outputs):
            return True
        if not overwrites(op.func):
            return False
        if any(ref.storage == storage for ref in op.reads()):
            return False
        return any(ref.storage == storage and self.covers(ref) for ref in op.targets)

    def is_final(self, storage: int, before: int) -> bool:
        """Whether ``storage`` holds its last value by the time that op number ``before`` runs."""
        writers = self.writers.get(storage)
        return not writers or writers[-1] < before

    def live(
        self, storages: Iterable[int], *, exact: bool, before: int | None = None, given: Collection[int] = ()
    ) -> set[int]:
        """The ops that have to run so that ``storages`` hold what they held just before op ``before`` (default: now).

        Of each storage that is its last full write and what came after, with everything those read. Draws from an
        exact stream bring the draws before them along; ``exact`` makes the default stream such a one. What leads to the
        last values of the storages ``given`` is left out, where others read them.
        """
        live: set[int] = set()
        seen: set[tuple[int, int]] = set()
        storage_work = [(storage, before) for storage in storages]
        op_work: list[int] = []
        while storage_work or op_work:
            if op_work:
                index = op_work.pop()
                if index in live:
                    continue
                live.add(index)
                op = self.ops[index]
                storage_work.extend(
                    (ref.storage, index)
                    for ref in op.reads()
                    if ref.storage not in given or not self.is_final(ref.storage, index)
                )
                draw = op.draw
                if draw is not None and draw.previous is not None and (exact or self.streams[draw.stream].exact):
                    op_work.append(draw.previous)
                continue
            storage, limit = storage_work.pop()
            for index in reversed(self.writers.get(storage, ())):
                if limit is not None and index >= limit:
                    continue
                if (storage, index) in seen:
                    break
                seen.add((storage, index))
                op_work.append(index)
                if self.writes_whole(self.ops[index], storage):
                    break
        return live

    def computed_from(self, storage: int, others: Mapping[int, int | None], *, exact: bool = False) -> set[int]:
        """Which of the storages ``others`` its value is computed from, as they are in the end.

        A mere copy is not computed, unless it was made since the op number that ``others`` has.
        """
        live = [self.ops[index] for index in self.live([storage], exact=exact, given=others)]
        copied = all(only_copies(op.func) for op in live)
        found = set()
        for op in live:
            for read in {ref.storage for ref in op.reads()} - {storage}:
                if read in others and self.is_final(read, op.number):
                    since = others[read]
                    if not copied or (since is not None and op.number > since):
                        found.add(read)
        return found

    def never_written(self, ref: TensorRef) -> bool:
        """Whether some of ``ref``'s value goes back to memory that no op wrote: plain PyTorch leaves garbage there."""
        if self._unwritten(ref, None):
            return True
        for number in self.live([ref.storage], exact=False):
            op = self.ops[number]
            for read in op.reads():
                # an op that scatters values into its target needs its old ones only where it puts no new ones, and
                # which those are cannot be told; one that computes on its target keeps garbage garbage
                if (read not in op.targets or pointwise(op.func)) and self._unwritten(read, number):
                    return True
        return False

    def _unwritten(self, ref: TensorRef, before: int | None) -> bool:
        """Whether no op before number ``before`` wrote some element of ``ref``."""
        if ref.size.numel() == 0:
            return False
        writers = [
            self.ops[number] for number in self.writers.get(ref.storage, ()) if before is None or number < before
        ]
        if any(self.writes_whole(op, ref.storage) for op in writers):
            return False
        targets = [target for op in writers for target in op.targets if target.storage == ref.storage]
        if any(target == ref or target.dtype != ref.dtype for target in targets):
            return False  # through a view of another dtype, elements cannot be told apart
        written = torch.zeros(self.storages[ref.storage].nbytes // ref.dtype.itemsize, dtype=torch.bool)
        for target in targets:
            written.as_strided(target.size, target.stride, target.offset).fill_(True)
        return not bool(written.as_strided(ref.size, ref.stride, ref.offset).all())


class Recorded:
    """What a recorded storage object carries: the tape it was first written on, and its number there.

    ``memory`` is where its values are, and at which byte, once they have come: tensors that nobody has turned into
    plain ones by then, such as views in a closure, find them there.
    """

    __slots__ = ("__weakref__", "first_tape", "memory", "storage")

    def __init__(self, first_tape: Tape, storage: int) -> None:
        self.first_tape = first_tape
        self.storage = storage
        self.memory: tuple[torch.UntypedStorage, int] | None = None

    @property
    def tape(self) -> Tape:
        return self.first_tape.current()

    @property
    def device(self) -> torch.device:
        return self.tape.storages[self.storage].device


def recorded_storage(tensor: torch.Tensor) -> Recorded | None:
    """Return the recording behind a plain meta ``tensor``, or ``None`` for any other tensor, real or meta."""
    if not tensor.is_meta:
        return None
    try:
        found: Recorded | None = tensor.untyped_storage()._fabric_init  # type: ignore[attr-defined]
    except (AttributeError, NotImplementedError):  # a meta tensor from elsewhere; a sparse one
        return None
    return found


def begin(tensor: torch.Tensor, tape: Tape, device: torch.device) -> int:
    """Begin the recording of a fresh meta tensor's storage; gives its number on ``tape``."""
    storage = tensor.untyped_storage()
    number = tape.add_storage(storage.nbytes(), device)
    record = Recorded(tape, number)
    storage._fabric_init = record  # type: ignore[attr-defined]
    tape.records[number] = weakref.ref(record)
    return number


def ref_of(tensor: torch.Tensor, storage: int) -> TensorRef:
    """Where ``tensor`` lies on recorded storage number ``storage``."""
    complex_or_part = tensor.is_neg() or (tensor.dtype.is_complex and tensor.is_conj())
    return TensorRef(
        storage,
        int(tensor.storage_offset()),
        tensor.size(),
        tensor.stride(),
        tensor.dtype,
        *((tensor.is_conj(), tensor.is_neg()) if complex_or_part else ()),
    )
