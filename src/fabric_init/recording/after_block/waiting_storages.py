"""Which recorded storages wait for values that only a load, or the user, can bring."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fabric_init.recording.replay.replay import real_execution
from fabric_init.recording.tape.liveness import writes_whole
from fabric_init.recording.tape.op_properties import only_copies, overwrites, traits
from fabric_init.recording.tape.tape import Tape, TensorRef, now
from fabric_init.recording.tensor.recorded_tensor import meta_of, recorded
from fabric_init.recording.tensor.storage_tags import ref_of

THREE_WAYS = (
    "Load them (fabric.load, fabric.load_raw or load_state_dict), or declare the load so that it is done for you "
    "(init_module(checkpoint=…)), or give them the model's own init (fabric.init_missing(model))."
)


class Waiting:
    """The storages of one tape that wait, from which op on, and under which names.

    A storage waits from the end of the block in which its model was built, until all of it was written: what its own
    init left there is not its value unless somebody asks for that (:meth:`accept_own_init`). A storage that is computed
    later from one that waits, waits for that one.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = weakref.ref(tape)
        self.names: dict[int, tuple[str, str]] = {}  # by storage: the class of the model, and the tensor's name
        self.refs: dict[int, TensorRef] = {}  # by storage: the tensor that waits
        self.views: dict[int, list[TensorRef]] = {}  # by storage: all of them, where several share it
        self.statuses: dict[int, str] = {}  # what those are reported as that have got their values
        self.fix = THREE_WAYS
        self.parts: set[int] = set()  # shards that are in the place of a whole tensor, which may be kept elsewhere
        self.beside: dict[int, int] = {}  # what is made with one that waits, such as scales of packed weights
        self._origins: dict[int, int] = {}  # the storage that one has taken the place of
        self._written: dict[int, Tensor] = {}  # by storage: which elements were, of those that wait

    @property
    def tape(self) -> Tape:
        """The tape that the storages are on."""
        tape = self._tape()
        assert tape is not None
        return tape

    def join(self, earlier: Waiting) -> None:
        """Take over what an earlier tape, which this one continues, knows."""
        self.fix = earlier.fix
        self.names.update(earlier.names)
        self.refs.update(earlier.refs)
        self.views.update(earlier.views)
        self.beside.update(earlier.beside)
        self.statuses.update(earlier.statuses)
        self._origins.update(earlier._origins)
        self.parts |= earlier.parts
        self._written.update(earlier._written)

    def begin(self, storage: int, model: str, name: str, ref: TensorRef | None = None) -> None:
        """Let a storage wait from now on; ``ref`` is the tensor of that name on it."""
        if ref is not None and self.refs.setdefault(storage, ref) != ref:
            self.views.setdefault(storage, [self.refs[storage]]).append(ref)
        self.tape.waits.setdefault(storage, now())
        if storage not in self.names or self.names[storage][0] != model:
            self.names[storage] = model, name  # of ties the first name

    def forget(self, storage: int) -> None:
        """Let ``storage`` wait for nothing by itself: it is a copy of another one from now on."""
        for table in (self.tape.waits, self.names, self.refs, self.views, self._origins, self._written):
            table.pop(storage, None)
        self.parts.discard(storage)

    def begin_again(self, since: int) -> None:
        """Let storages wait from now on that wait and were written since op number ``since``: by a later block."""
        for storage in self.tape.waits:
            if self.tape.written_since(storage, since):
                self.tape.waits[storage] = now()
                self._written.pop(storage, None)

    def rename(self, old: int, new: int) -> None:
        """Let storage ``new``, which takes the place of ``old``, be known under its name."""
        if old in self.names and new not in self.names:
            self.names[new] = self.names[old]
            self._origins.setdefault(new, old)

    def take_place(self, old: int, new: int, *, copied: bool = True) -> None:
        """Note that storage ``new`` has a part of ``old`` in its place; it waits, too, if nothing was ``copied``."""
        if old == new or old not in self.tape.waits:
            return
        self.rename(old, new)
        self.parts.add(new)
        if not copied:
            self.begin(new, *self.names[old])

    def note_status(self, storage: int, status: str) -> None:
        """Note what a tensor is reported as, under the storage that it had at first."""
        self.statuses[self.origin(storage)] = status

    def before(self, storage: int) -> int:
        """Return the storage whose place ``storage`` has taken."""
        return self._origins[storage]

    def origin(self, storage: int) -> int:
        """Return the storage that the tensor now on ``storage`` was on at first, before casts."""
        while storage in self._origins:
            storage = self._origins[storage]
        return storage

    def is_partly_written(self, storage: int) -> bool:
        """Return whether values were written to a storage that waits.

        Copies of what waits itself, such as FSDP2's padding of a shard, are none.
        """
        since = self.tape.waits.get(storage, 0)  # before that, its own init has written
        for number in self.tape.writers.get(storage, ()):
            if number < since:
                continue
            op = self.tape.ops[number]
            sources = {ref.storage for ref in op.reads()} - {storage}
            is_target = any(target.storage == storage for target in op.targets)
            if is_target and not (only_copies(op.func) and sources):
                return True
            if any(self.is_partly_written(source) for source in sources):
                return True
        return False

    def filled(self, storage: int) -> bool:
        """Note that a storage has got its values; returns whether it waited."""
        self._written.pop(storage, None)
        since = self.tape.waits.pop(storage, None)
        if since is None:
            return False
        self.tape.overruled[storage] = since
        return True

    def accept_own_init(self, storages: Iterable[int]) -> None:
        """Let these storages, and those that they are computed from, hold what the model's own init gives them."""
        for storage in (*storages, *self.missing(storages)):
            if self.tape.waits.pop(storage, None) is not None:
                self.note_status(storage, "initialized")

    def accept_fill(self, storages: Iterable[int]) -> None:
        """Let what was computed from these storages, which have got their values, be computed from those values."""
        for storage in storages:
            self.tape.waits.pop(storage, None)
            self.tape.overruled.pop(storage, None)

    def missing(self, storages: Iterable[int], before: int | None = None, *, declared_count: bool = True) -> list[int]:
        """Return which storages have to get values before all of ``storages`` have theirs, in order, each once.

        Args:
            storages: The storages in question.
            before: Take them as they are before this op number.
            declared_count: Whether a storage is missing whose values a declared load will bring, and could be read.
        """
        brought = {} if declared_count or not self.tape.loaded else self.tape.brought()
        waits = self.tape.waits
        if not waits and not self.tape.overruled:
            return []
        found: dict[int, None] = {}
        seen: set[tuple[int, int | None]] = set()
        work: list[tuple[int, int | None]] = [(storage, before) for storage in storages]
        while work:
            storage, limit = work.pop()
            if (storage, limit) in seen:
                continue
            seen.add((storage, limit))
            if storage in brought and (limit is None or limit > brought[storage].since):
                continue
            whole = self.beside.get(storage)
            if whole is not None and whole in waits and (limit is None or limit > waits[whole]):
                found[whole] = None
                continue
            since = waits.get(storage)
            if since is None and limit is not None:
                since = self.tape.overruled.get(storage)  # what it held before it got its values is not known
            complete = since is None or (limit is None and self._is_complete(storage))
            overwritten: set[TensorRef] = set()  # what later ops write, whatever was there
            for number in reversed(self.tape.writers.get(storage, ())):
                if limit is not None and number >= limit:
                    continue
                if since is not None and number < since:
                    break
                op = self.tape.ops[number]
                here = {ref for ref in op.targets if ref.storage == storage}
                if here and here <= overwritten:
                    continue
                if overwrites(op.func):
                    overwritten |= here
                work += [(ref.storage, number) for ref in op.reads() if ref.storage != storage]
                if writes_whole(self.tape, op, storage):
                    complete = True
                    break
            if not complete and (limit is None or since is None or limit > since):
                found[storage] = None
        return list(found)

    def written_since(self, storage: int, since: int) -> bool:
        """Return whether all of ``storage`` was overwritten by ops later than number ``since``."""
        later = [self.tape.ops[number] for number in self.tape.writers.get(storage, ()) if number > since]
        return any(writes_whole(self.tape, op, storage) for op in later) or (bool(later) and self._is_complete(storage))

    def note(self, func: Any, args: tuple[Any, ...], kwargs: Any, target: Tensor) -> None:
        """Note which elements of a storage that waits a recorded write overwrites, exactly."""
        tape_ref = recorded(target)
        if tape_ref is None or tape_ref.storage not in self.tape.waits:
            return
        meta = meta_of(target)
        elements = meta.untyped_storage().nbytes() // meta.element_size()
        mask = self._written.get(tape_ref.storage)
        if mask is None:
            mask = self._written[tape_ref.storage] = torch.zeros(elements, dtype=torch.bool)
        if mask.numel() != elements:
            return  # through a view of another dtype, elements cannot be told apart
        ref = ref_of(meta, tape_ref.storage)
        part = mask.as_strided(ref.size, ref.stride, ref.offset)
        if overwrites(func):
            part.fill_(True)
        elif kwargs.get("reduce") is None and (write := _PARTIAL.get(traits(func).name)) is not None:
            write(part, *args[1:])

    def _is_complete(self, storage: int) -> bool:
        mask = self._written.get(storage)
        with real_execution():
            return mask is not None and bool(mask.all())


def uninitialized(model: str, use: str, names: list[str], fix: str = THREE_WAYS) -> str:
    """Return the message about tensors of ``model`` that are used without values."""
    listed = "\n".join(f"  {name}" for name in names)
    which = "one of its tensors was" if len(names) == 1 else f"{len(names)} of its tensors were"
    return f"{model} cannot {use}: {which} neither loaded nor initialized:\n{listed}\n{fix}"


def _index_put(part: Tensor, indices: Any, values: Any, accumulate: bool = False, *rest: Any) -> None:
    if not accumulate:
        part[tuple(slice(None) if index is None else index for index in indices)] = True


# What an op that overwrites chosen elements does to a mask of those that were written.
_PARTIAL: dict[str, Any] = {
    "aten::index_put_": _index_put,
    "aten::_index_put_impl_": _index_put,
    "aten::index_copy_": lambda part, dim, index, source: part.index_fill_(dim, index, True),
    "aten::index_fill_": lambda part, dim, index, value: part.index_fill_(dim, index, True),
    "aten::masked_fill_": lambda part, mask, value: part.masked_fill_(mask, True),
    "aten::masked_scatter_": lambda part, mask, source: part.masked_fill_(mask, True),
    "aten::scatter_": lambda part, dim, index, *rest: part.scatter_(dim, index, True),
}
