"""Replay: run the live ops of a tape on real memory, with the random numbers that were recorded for them."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction, conj_view, neg_view
from fabric_init.errors import RecordingError
from fabric_init.recording.replay.chunks import chunked_draw, chunks_of
from fabric_init.recording.replay.generators import ReplayGenerators
from fabric_init.recording.replay.threads import threaded
from fabric_init.recording.replay.tracing import OutsideTracing
from fabric_init.recording.tape.liveness import covers, is_final, live_ops
from fabric_init.recording.tape.op_properties import asks_shape_only, overwrites, with_generator
from fabric_init.recording.tape.tape import Constant, Op, Tape, TensorRef, ValueRead

_default_generator_lock = threading.Lock()


@contextmanager
def real_execution() -> Iterator[None]:
    """Switch off all dispatch and function modes, ours and the user's, and autograd: ops inside reach their kernels."""
    with (
        OutsideTracing(),
        DisableTorchDispatch(),
        DisableTorchFunction(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


_default_dtype_lock = threading.Lock()


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    if dtype is None or dtype == torch.get_default_dtype():
        yield
        return
    with _default_dtype_lock:  # the default dtype is global to the process
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def view(storage: torch.UntypedStorage, ref: TensorRef) -> torch.Tensor:
    """Return the tensor that ``ref`` describes, on real memory."""
    tensor = torch.empty(0, dtype=ref.dtype, device=storage.device)
    tensor.set_(storage, ref.offset, ref.size, ref.stride)
    if ref.conj:
        tensor = conj_view(tensor)
    if ref.neg:
        tensor = neg_view(tensor)
    return tensor


class _Execution:
    """One run of ops, in recorded order, on real memory. Frees a storage after its last use."""

    def __init__(
        self,
        tape: Tape,
        indices: Iterable[int],
        keep: Collection[int],
        to: DeviceMap,
        *,
        exact: bool,
        inputs: Mapping[int, torch.UntypedStorage] | None = None,
    ) -> None:
        self._tape = tape
        self._ops = [tape.ops[index] for index in sorted(indices)]
        self._keep = keep
        self._to = to
        self._exact = exact
        self._inputs = {} if inputs is None else inputs
        self._memory: dict[int, torch.UntypedStorage] = {}
        self._left_out: set[int] = set()
        self.draws = ReplayGenerators(tape, self._ops, exact=exact)

    def run(self) -> dict[int, torch.UntypedStorage]:
        last_use: dict[int, int] = {}
        for op in self._ops:
            for ref in (*op.refs(), *op.outputs):
                last_use[ref.storage] = op.number
        for op in self._ops:
            self._run(op)
            for ref in (*op.refs(), *op.outputs):
                if last_use[ref.storage] == op.number and ref.storage not in self._keep:
                    self._memory.pop(ref.storage, None)
        for storage in self._keep:
            self._storage(storage, zeroed=True)
        return {storage: self._memory[storage] for storage in self._keep}

    def _storage(self, number: int, *, zeroed: bool) -> torch.UntypedStorage:
        storage = self._memory.get(number)
        if storage is None:
            if number in self._left_out:
                raise RecordingError(
                    "a recorded op has returned a tensor of another shape than on the meta device, and that tensor is "
                    "used. Compute it after the block, or outside of it."
                )
            info = self._tape.storages[number]
            make = torch.zeros if zeroed else torch.empty
            tensor = make(info.nbytes, dtype=torch.uint8, device=self._to(info.device))
            storage = self._memory[number] = tensor.untyped_storage()
        return storage

    def _run(self, op: Op) -> None:
        if (draw := chunked_draw(self._tape, op, exact=self._exact)) is not None:
            memory = self._storage(draw.ref.storage, zeroed=not covers(self._tape, draw.ref))
            elements = view(memory, draw.ref).view(-1)
            for start, stop in chunks_of(len(elements)):
                draw.chunk(start, elements[start:stop])
            return
        # memory that this op overwrites completely need not be zeroed first
        overwritten = {ref.storage for ref in op.targets if covers(self._tape, ref)} if overwrites(op.func) else set()

        args = tuple(self._real(value, op, overwritten) for value in op.args)
        kwargs = {name: self._real(value, op, overwritten) for name, value in op.kwargs.items()}
        with _default_dtype(op.default_dtype):
            result = op.func(*args, **kwargs) if op.draw is None else self._draw(op, args, kwargs)
        if op.outputs:
            results = [item for item in _flat(result) if isinstance(item, torch.Tensor)]
            for tensor, ref in zip(results, op.outputs, strict=False):
                self._adopt(tensor, ref)

    def _real(self, value: Any, op: Op, overwritten: Collection[int]) -> Any:
        # a method: a function in _run that calls itself would be a reference cycle, which keeps the tape alive
        if isinstance(value, TensorRef):
            if asks_shape_only(op.func) and value.storage not in self._memory:
                return self._like(value)
            if value.storage in self._inputs and is_final(self._tape, value.storage, op.number):
                return view(self._inputs[value.storage], value)
            return view(self._storage(value.storage, zeroed=value.storage not in overwritten), value)
        if isinstance(value, Constant):
            tensor = value.tensor
            return tensor if tensor.dim() == 0 else tensor.to(self._to(tensor.device))
        if type(value) in (list, tuple):
            return type(value)(self._real(item, op, overwritten) for item in value)
        return self._to(value) if isinstance(value, torch.device) else value

    def _like(self, ref: TensorRef) -> torch.Tensor:
        """Return a tensor for its shape, dtype and device alone: what a checkpoint has for it need not be read."""
        info = self._tape.storages[ref.storage]
        memory = torch.empty(info.nbytes, dtype=torch.uint8, device=self._to(info.device)).untyped_storage()
        return view(memory, ref)

    def _draw(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = self._device(op, args, kwargs)
        generator = self.draws.generator(op, device)
        func = with_generator(op.func)
        if func is not None:
            result = func(*args, **{**kwargs, "generator": generator})
        else:  # the op takes no generator and draws from the default one
            default = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
            with _default_generator_lock:
                before = default.get_state()
                default.set_state(generator.get_state())
                try:
                    result = op.func(*args, **kwargs)
                    generator.set_state(default.get_state())
                finally:
                    default.set_state(before)
        self.draws.drawn(op)
        return result

    def _device(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
        tensor = next((item for item in _flat((args, tuple(kwargs.values()))) if isinstance(item, torch.Tensor)), None)
        if tensor is not None:
            return tensor.device
        return torch.device(kwargs.get("device") or "cpu")

    def _adopt(self, tensor: torch.Tensor, ref: TensorRef) -> None:
        """Keep a result as the memory behind ``ref``, copying only where the kernel chose another layout."""
        storage = tensor.untyped_storage()
        same_layout = (tensor.storage_offset(), tensor.size(), tensor.stride()) == (ref.offset, ref.size, ref.stride)
        if same_layout and storage.nbytes() == self._tape.storages[ref.storage].nbytes:
            self._memory[ref.storage] = storage
        elif tensor.size() == ref.size:
            view(self._storage(ref.storage, zeroed=False), ref).copy_(tensor)
        else:  # a result that is not the same on all devices, such as statistics of batch norm in eval mode
            self._left_out.add(ref.storage)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


_MUCH = 4  # times the memory of the result: several of these at once would need more than the model
_MIN_THREADED_BYTES = 1 << 20  # below it, starting threads takes longer than filling

DeviceMap = Callable[[torch.device], torch.device]
"""Maps the device that memory was recorded for to the device that replay allocates it on."""


def as_recorded(device: torch.device) -> torch.device:
    """Return ``device``: the placement that the constructor asked for."""
    return device


def all_on(device: torch.device) -> DeviceMap:
    """Return the map to ``device`` from whatever memory was recorded for."""
    return lambda _: device


class Brought(dict[int, torch.UntypedStorage]):
    """The memory of storages that declared loads bring, read when it is asked for, on the device that ``to`` says.

    It is only to be read. All ``but`` some storages are in it.
    """

    def __init__(self, tape: Tape, to: DeviceMap, *, but: Collection[int] = ()) -> None:
        super().__init__()
        self._tape, self._to = tape, to
        self._loaded = {storage: loaded for storage, loaded in tape.brought().items() if storage not in but}

    def __contains__(self, storage: object) -> bool:
        return storage in self._loaded

    def __iter__(self) -> Iterator[int]:
        return iter(self._loaded)

    def __missing__(self, storage: int) -> torch.UntypedStorage:
        device = self._to(self._tape.storages[storage].device)
        memory: torch.UntypedStorage = self._loaded[storage].read(self._tape).to(device=device)
        self[storage] = memory
        return memory


def storage_now(tape: Tape, storage: int, *, exact: bool) -> tuple[torch.UntypedStorage, bool]:
    """Return the current value of ``storage``, and whether it depends on random numbers.

    It is computed from what declared loads bring, where there are any.
    """
    inputs = Brought(tape, as_recorded) if tape.loaded else {}
    with real_execution():
        if storage in inputs:
            return inputs[storage].clone(), False
        live = live_ops(tape, [storage], exact=exact, inputs=inputs)
        memory = _Execution(tape, live, {storage}, as_recorded, exact=exact, inputs=inputs).run()[storage]
    return memory, any(tape.ops[index].draw is not None for index in live)


def run_ops(tape: Tape, numbers: Iterable[int], storage: int, device: torch.device) -> torch.UntypedStorage:
    """Run these ops, on ``device``, and return the memory of ``storage`` after them."""
    with real_execution():
        return _Execution(tape, numbers, {storage}, lambda _: device, exact=tape.rng == "eager").run()[storage]


def replay_with(
    tape: Tape,
    storages: Collection[int],
    inputs: Mapping[int, torch.UntypedStorage],
    *,
    exact: bool,
    to: DeviceMap = as_recorded,
) -> dict[int, torch.UntypedStorage]:
    """Return the values that the constructor's code computes for ``storages`` from other values of some storages.

    Args:
        tape: The recording.
        storages: The numbers of the storages to compute; what they have in common is computed once. The value of one
            that is among ``inputs`` is that.
        inputs: Storage number → the memory to read instead of that storage's last recorded value.
        exact: As in :func:`replay`.
        to: As in :func:`replay`.
    """
    computed = {storage for storage in storages if storage not in inputs}
    live = live_ops(tape, computed, exact=exact, inputs=inputs)
    with real_execution():
        values = _Execution(tape, live, computed, to, exact=exact, inputs=inputs).run()
    return values | {storage: inputs[storage] for storage in storages if storage in inputs}


def seen_in(tape: Tape, look: ValueRead, inputs: Mapping[int, torch.UntypedStorage], *, exact: bool) -> list[Any]:
    """Return what Python sees in ``look`` if ``inputs`` are the last values of some storages: tensors, shapes, numbers.

    Args:
        tape: The recording.
        look: One of its looks.
        inputs: Storage number → the memory to read instead of that storage's last recorded value.
        exact: As in :func:`replay`.
    """
    storages = {ref.storage for ref in look.refs()}
    given = {storage for storage in storages if storage in inputs and is_final(tape, storage, look.number)}
    computed = storages - given
    live = live_ops(tape, computed, exact=exact, before=look.number, inputs=inputs)
    with real_execution():
        memory = _Execution(tape, live, computed, as_recorded, exact=exact, inputs=inputs).run()
        memory.update({storage: inputs[storage] for storage in given})
        args, kwargs = _on_memory(look.args, memory), {k: _on_memory(v, memory) for k, v in look.kwargs.items()}
        if look.func is None:
            return list(args)
        seen = _flat([look.func(*args, **kwargs)])
        return [value.shape if isinstance(value, torch.Tensor) else value for value in seen]


def _on_memory(value: Any, memory: Mapping[int, torch.UntypedStorage]) -> Any:
    if isinstance(value, TensorRef):
        return view(memory[value.storage], value)
    if isinstance(value, Constant):
        return value.tensor
    return type(value)([_on_memory(item, memory) for item in value]) if type(value) in (list, tuple) else value


def _groups(tape: Tape, storages: Iterable[int], *, exact: bool) -> list[tuple[set[int], set[int]]]:
    """Partition ``storages`` so that no two groups share a live op; return (storages, ops) pairs in recorded order."""
    owner: dict[int, int] = {}
    parent: dict[int, int] = {}

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    live_of: dict[int, set[int]] = {}
    for storage in storages:
        parent[storage] = storage
        live = live_of[storage] = live_ops(tape, [storage], exact=exact)
        for index in live:
            other = owner.setdefault(index, storage)
            if other != storage:
                parent[root(storage)] = root(other)
    members: dict[int, tuple[set[int], set[int]]] = defaultdict(lambda: (set(), set()))
    for storage, live in live_of.items():
        group = members[root(storage)]
        group[0].add(storage)
        group[1].update(live)
    return sorted(members.values(), key=lambda group: min(group[1], default=-1))


def _needs_much(tape: Tape, group: tuple[set[int], set[int]]) -> bool:
    """Return whether far more memory is written on the way to a group of storages than they take: they are packed."""
    written = {ref.storage for number in group[1] for ref in (*tape.ops[number].targets, *tape.ops[number].outputs)}
    on_the_way = sum(tape.storages[storage].nbytes for storage in written - group[0])
    return on_the_way > _MUCH * sum(tape.storages[storage].nbytes for storage in group[0])


def replay(
    tape: Tape, storages: Iterable[int], *, exact: bool, to: DeviceMap = as_recorded, threads: int | None = None
) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Compute the values that the recorded constructor gives ``storages``.

    Args:
        tape: The recording.
        storages: Storage numbers.
        exact: Draw the default random stream in order, including dead draws: bit-identical to eager init. Otherwise
            each random op has its own generator, and only live ops run.
        to: The placement: maps each recorded device to the one to allocate on.
        threads: The number of groups of storages to replay at once; values do not depend on it. Default: torch's
            number of intra-op threads.

    Yields:
        Storage number → its memory, for one group of storages at a time, as groups are completed.
    """
    groups = _groups(tape, storages, exact=exact)

    def run(group: tuple[set[int], set[int]]) -> dict[int, torch.UntypedStorage]:
        with real_execution():
            return _Execution(tape, group[1], group[0], to, exact=exact).run()

    small = sum(tape.storages[storage].nbytes for group in groups for storage in group[0]) < _MIN_THREADED_BYTES
    alone: list[tuple[set[int], set[int]]] = []
    together: list[tuple[set[int], set[int]]] = []
    for group in groups:
        (alone if _needs_much(tape, group) else together).append(group)
    yield from map(run, alone)
    workers = 1 if small else min(threads or torch.get_num_threads(), len(together))
    yield from threaded(run, together, workers)
