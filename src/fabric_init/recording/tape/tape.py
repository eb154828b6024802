"""The tape: the recorded ops in order, the storages they write, and the random streams they draw from.

A recorded tensor is identified by its *storage* and its geometry on it, never by the Python object:
``nn.Parameter(t)``, ``t.data`` and views make new objects on the same storage. So views need no ops of their own, and
tied tensors are seen to be one.

The tape is data. :mod:`fabric_init.recording.tape.liveness` decides which ops still matter, and
:mod:`fabric_init.recording.replay.replay` runs them.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch

from fabric_init._text import dtype_name
from fabric_init.recording.tape.op_properties import Func, asks_shape_only, overwrites, written_arguments

Rng = Literal["per_op", "eager"]
"""``per_op``: each random op has its own generator. ``eager``: one stream, drawn in order like plain PyTorch's."""


def check_rng(rng: str) -> None:
    """Raise ``ValueError`` unless ``rng`` is a value of :data:`Rng`."""
    if rng not in get_args(Rng):
        raise ValueError(f"rng must be one of {', '.join(map(repr, get_args(Rng)))}, got {rng!r}")


_numbers = itertools.count()  # storages and ops are numbered once per process, so that tapes can be joined


def now() -> int:
    """Return a number above those of all ops recorded so far and below those of all later ones."""
    return next(_numbers)


class TensorRef(NamedTuple):
    """A tensor as geometry on a recorded storage. ``offset`` and ``stride`` count elements of ``dtype``."""

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
        return 0 in self.stride and any(not stride and n > 1 for stride, n in zip(self.stride, self.size, strict=True))

    @property
    def row_major(self) -> bool:
        """Whether its elements are in memory one behind the other, in the order of their indices."""
        return all(
            size == 1 or stride == dense
            for size, stride, dense in zip(self.size, self.stride, _row_major(self.size), strict=True)
        )

    def text(self, name: str = "") -> str:
        """Return the reference in one line, as ``s3[4, 2] float32 (offset 4)``, with the ``name`` of its storage."""
        details = [f"offset {self.offset}"] if self.offset else []
        if self.stride != _row_major(self.size):
            details.append(f"stride {list(self.stride)}")
        layout = f" ({', '.join(details)})" if details else ""
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
    """A real tensor that a recorded op read, with the values it had at that moment."""

    tensor: torch.Tensor

    def __repr__(self) -> str:
        return f"constant{list(self.tensor.shape)} {dtype_name(self.tensor.dtype)}"


class CallSite(NamedTuple):
    """The line of the model's own code that an op goes back to.

    ``constructed`` is true if that line only built one of torch's own modules, whose constructor chose the init.
    """

    file: str
    line: int
    constructed: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Draw(NamedTuple):
    """A random op's position in its stream: the stream, the number of earlier draws, and the op that drew last."""

    stream: int
    position: int
    previous: int | None


class RandomStream(NamedTuple):
    """A source of random numbers, with the generator states from before its first recorded draw.

    ``exact`` streams (the constructor called ``manual_seed`` or made its own generator) are always drawn in order, bit
    for bit. Each draw from the default stream has its own generator, seeded from ``seed`` and the draw's position,
    unless ``rng="eager"``.
    """

    exact: bool
    seed: int
    states: Mapping[torch.device, torch.Tensor]


class StorageInfo(NamedTuple):
    """One recorded storage: its size in bytes and the device that the constructor asked for."""

    nbytes: int
    device: torch.device


class Op(NamedTuple):
    """One recorded call. ``args`` and ``kwargs`` hold refs and constants in place of tensors.

    ``outputs`` are the new tensors that the call returns, each the first on its storage, in the call's order.
    ``targets`` are the existing tensors that it writes in place.
    """

    number: int
    func: Func
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: tuple[TensorRef, ...]
    outputs: tuple[TensorRef, ...]
    draw: Draw | None = None
    source: CallSite | None = None
    default_dtype: torch.dtype | None = None  # set if the result's dtype was torch's default dtype

    def refs(self) -> list[TensorRef]:
        """Return every recorded tensor among the arguments, read or written."""
        return _refs_in((*self.args, *self.kwargs.values()))

    def reads(self) -> list[TensorRef]:
        """Return the recorded tensors whose old values the call needs."""
        if asks_shape_only(self.func):
            return []
        if not overwrites(self.func):
            return self.refs()
        positions, names = written_arguments(self.func)
        kept = [value for position, value in enumerate(self.args) if position not in positions]
        return _refs_in((*kept, *(value for name, value in self.kwargs.items() if name not in names)))

    def text(self, names: Mapping[int, str]) -> str:
        """Return the call in one line, with the names that ``names`` has for storages.

        For example ``#12 normal_(s3:head.weight[4, 4] float32, std=0.02)  ← model.py:31``.
        """
        name = getattr(self.func, "__name__", str(self.func)).split(".")[0]
        arguments = [_value_text(value, names) for value in self.args]
        arguments += [f"{key}={_value_text(value, names)}" for key, value in self.kwargs.items() if value is not None]
        outputs = ", ".join(_value_text(ref, names) for ref in self.outputs)
        line = f"#{self.number} {name}({', '.join(arguments)})" + (f" → {outputs}" if outputs else "")
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


def _refs_in(values: Iterable[Any]) -> list[TensorRef]:
    found: list[TensorRef] = []
    for value in values:
        kind = type(value)
        if kind is TensorRef:
            found.append(value)
        elif kind is list or kind is tuple:
            found += _refs_in(value)
    return found


def on_other_storages(value: Any, other: Callable[[int], int]) -> Any:
    """Return arguments with the storage ``other(number)`` in place of every number in their references."""
    if isinstance(value, TensorRef):
        return TensorRef(other(value.storage), *value[1:])
    return type(value)([on_other_storages(item, other) for item in value]) if type(value) in (list, tuple) else value


class ValueRead(NamedTuple):
    """What Python has seen of recorded values: the result of ``func`` on them, or all of them if there is none.

    Of tensors that ``func`` returned only the shapes were seen: their values are recorded. ``number`` is above those of
    the ops before the look and below those of the ops after it.
    """

    number: int
    func: Func | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    source: CallSite | None

    def refs(self) -> tuple[TensorRef, ...]:
        """Return the recorded tensors whose values were looked at."""
        return tuple(_refs_in((*self.args, *self.kwargs.values())))


class LoadedStorage(NamedTuple):
    """What a declared load brings for a storage, in place of what the ops before number ``since`` left there."""

    since: int
    read: Callable[[Tape], torch.UntypedStorage]


_SHOWN_OPS = 5  # at either end of a tape


class Tape:
    """The record of one block. It grows while the block is open, and is only read afterwards."""

    def __init__(self, rng: Rng = "per_op") -> None:
        self.rng = rng
        self.ops: dict[int, Op] = {}
        self.writers: dict[int, list[int]] = {}
        self.storages: dict[int, StorageInfo] = {}
        self.streams: dict[int, RandomStream] = {}
        self.value_reads: list[ValueRead] = []
        self.constant_bytes = 0  # size of the real tensors that recorded ops read
        self.sealed_rng: Rng | None = (
            None  # the mode in which the constructor has read a random value: replay has to use the same
        )
        self.shares_seed = False  # whether all ranks that keep a part of the model draw the same numbers
        self.own_init_ran = False  # whether the model's own init was asked for
        self.has_plain = False  # plain meta tensors are on recorded storages: lazy ones get torch's own class later
        self.waits: dict[int, int] = {}  # storages that wait for a load, and the op number from which on
        self.loaded: dict[int, LoadedStorage] = {}  # storages whose last values a declared load brings
        self.registered: set[int] = set()  # storages of parameters and buffers, also of those that are gone
        self.made_of: dict[int, TensorRef] = {}  # by storage: the parameter that was there before it was packed
        self.overruled: dict[int, int] = {}  # those of them that got values, so their own init is not what they hold
        self.records: dict[int, weakref.ref[Any]] = {}  # tags by storage: alive as long as a tensor is on it
        self.after_block: Any = None  # answers for recorded tensors when no block is open
        self.joined: Tape | None = None  # the later tape that has taken this one in

    def summary(self) -> str:
        """Return the size of the tape in one line."""
        nbytes = sum(info.nbytes for info in self.storages.values())
        return (
            f"{len(self.ops):,} ops on {len(self.storages):,} storages ({nbytes:,} bytes), "
            f"{len(self.streams)} random stream{'s' if len(self.streams) != 1 else ''}, rng={self.rng!r}"
        )

    def __repr__(self) -> str:
        ops = [repr(self.ops[number]) for number in sorted(self.ops)]
        if len(ops) > 2 * _SHOWN_OPS:
            ops = [*ops[:_SHOWN_OPS], f"… {len(ops) - 2 * _SHOWN_OPS:,} more ops …", *ops[-_SHOWN_OPS:]]
        return "\n  ".join([f"Tape: {self.summary()}", *ops])

    def __deepcopy__(self, memo: dict[int, Any]) -> Tape:
        """Return the tape itself: copies of recorded tensors are on it, too."""
        return self

    def current(self) -> Tape:
        """Return this tape, or the later one that it was joined to."""
        tape = self
        while tape.joined is not None:
            tape = tape.joined
        return tape

    def join(self, later: Tape) -> None:
        """Move the record of this tape into ``later``, so that a model built in two blocks has one tape."""
        later.ops.update(self.ops)
        later.writers.update(self.writers)
        later.storages.update(self.storages)
        later.streams.update(self.streams)
        later.value_reads[:0] = self.value_reads
        later.constant_bytes += self.constant_bytes
        later.sealed_rng = later.sealed_rng or self.sealed_rng
        later.shares_seed = later.shares_seed and self.shares_seed
        later.waits.update(self.waits)
        later.loaded.update(self.loaded)
        later.records.update(self.records)
        later.overruled.update(self.overruled)
        later.registered |= self.registered
        later.made_of.update(self.made_of)
        if self.after_block is not None and later.after_block is not None:
            self.after_block.join(later.after_block)
        self.joined = later

    def add_storage(self, nbytes: int, device: torch.device) -> int:
        number = next(_numbers)
        self.storages[number] = StorageInfo(nbytes, device)
        return number

    def is_alive(self, storage: int) -> bool:
        """Return whether a recorded tensor is on ``storage`` still."""
        record = self.records.get(storage)
        return record is not None and record() is not None

    def written_since(self, storage: int, number: int) -> bool:
        """Return whether an op later than ``number`` wrote to ``storage``."""
        return any(writer > number for writer in self.writers.get(storage, ()))

    def brought(self) -> dict[int, LoadedStorage]:
        """Return the storages whose present values are those that a declared load brings, with how to read them."""
        return {storage: each for storage, each in self.loaded.items() if not self.written_since(storage, each.since)}

    def add_stream(self, stream: RandomStream) -> int:
        number = next(_numbers)
        self.streams[number] = stream
        return number

    def add_constant(self, tensor: torch.Tensor) -> Constant:
        """Return ``tensor`` as the tape holds it. The tape keeps its memory alive."""
        self.constant_bytes += tensor.nbytes
        return Constant(tensor)

    def add_look(
        self, func: Func | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], source: CallSite | None
    ) -> None:
        """Note that Python sees what ``func`` returns at this point."""
        self.value_reads.append(ValueRead(next(_numbers), func, args, kwargs, source))

    def append(self, op: Op) -> None:
        """Append a call, whose number is the highest so far."""
        self.ops[op.number] = op
        writers = self.writers
        for ref in op.targets:
            entry = writers.get(ref.storage)
            if entry is None:
                writers[ref.storage] = [op.number]
            else:
                entry.append(op.number)
        for ref in op.outputs:
            writers[ref.storage] = [op.number]

    def repeat(self, op: Op, other: Callable[[int], int], args: tuple[Any, ...] | None = None) -> None:
        """Append ``op`` once more, on the storage ``other(number)`` in place of each, with other ``args`` if given."""
        self.append(
            op._replace(
                number=now(),
                args=on_other_storages(op.args, other) if args is None else args,
                kwargs={name: on_other_storages(value, other) for name, value in op.kwargs.items()},
                targets=on_other_storages(op.targets, other),
                outputs=on_other_storages(op.outputs, other),
            )
        )
