"""Run recorded ops for real: the last rule that wrote a tensor, once, with its own random numbers."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch

from fabric_init.recording.op_schemas import overwrites, with_generator
from fabric_init.recording.rng import derived_seed
from fabric_init.recording.tape import Constant, Op, Tape, TensorRef

_default_generator_lock = threading.Lock()


@contextmanager
def real_execution() -> Iterator[None]:
    """No mode of anybody's between us and the kernels: whatever runs inside runs for real, and without autograd."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


_default_dtype_lock = threading.Lock()


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    if dtype is None or dtype == torch.get_default_dtype():
        yield
        return
    with _default_dtype_lock:  # the default dtype is the whole process's
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def view(storage: torch.UntypedStorage, ref: TensorRef) -> torch.Tensor:
    """The tensor that ``ref`` describes, on real memory."""
    tensor = torch.empty(0, dtype=ref.dtype, device=storage.device)
    tensor.set_(storage, ref.offset, ref.size, ref.stride)
    if ref.conj:
        tensor = torch._conj(tensor)
    if ref.neg:
        tensor = torch._neg_view(tensor)
    return tensor


class _Draws:
    """Generators for the random ops of one replay, positioned as recorded."""

    def __init__(self, tape: Tape, ops: Iterable[Op], *, exact: bool) -> None:
        self._tape = tape
        self._exact = exact
        followers = Counter(op.draw.previous for op in ops if op.draw is not None)
        self._branches = {previous for previous, count in followers.items() if count > 1}
        self._saved: dict[int, dict[torch.device, torch.Tensor]] = {}
        self._generators: dict[int, dict[torch.device, torch.Generator]] = {}
        self._last: dict[int, int | None] = {}

    def generator(self, op: Op, device: torch.device) -> torch.Generator:
        draw = op.draw
        assert draw is not None
        stream = self._tape.streams[draw.stream]
        if not (stream.exact or self._exact):
            return torch.Generator(device).manual_seed(derived_seed(stream.seed, draw.position))
        if draw.stream not in self._last or self._last[draw.stream] != draw.previous:
            states = stream.states if draw.previous is None else self._saved[draw.previous]
            self._generators[draw.stream] = {where: _from_state(where, state) for where, state in states.items()}
        generators = self._generators[draw.stream]
        if device not in generators:  # the stream never saw this device: as a fresh process would seed it
            generators[device] = torch.Generator(device).manual_seed(stream.seed)
        return generators[device]

    def drawn(self, op: Op) -> None:
        draw = op.draw
        assert draw is not None
        self._last[draw.stream] = op.number
        if op.number in self._branches:
            self._saved[op.number] = self.states(draw.stream)

    def states(self, stream: int) -> dict[torch.device, torch.Tensor]:
        return {device: generator.get_state() for device, generator in self._generators.get(stream, {}).items()}


def _from_state(device: torch.device, state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


class _Execution:
    """Runs ops in order on real memory, and lets go of a storage after its last use."""

    def __init__(
        self,
        tape: Tape,
        indices: Iterable[int],
        keep: Collection[int],
        to: Place,
        *,
        exact: bool,
        given: Mapping[int, torch.UntypedStorage] | None = None,
    ) -> None:
        self._tape = tape
        self._ops = [tape.ops[index] for index in sorted(indices)]
        self._keep = keep
        self._to = to
        self._given = given or {}
        self._memory: dict[int, torch.UntypedStorage] = {}
        self.draws = _Draws(tape, self._ops, exact=exact)

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
            info = self._tape.storages[number]
            make = torch.zeros if zeroed else torch.empty
            tensor = make(info.nbytes, dtype=torch.uint8, device=self._to(info.device))
            storage = self._memory[number] = tensor.untyped_storage()
        return storage

    def _run(self, op: Op) -> None:
        whole = {ref.storage for ref in op.targets if self._tape.covers(ref)} if overwrites(op.func) else set()

        def real(value: Any) -> Any:
            if isinstance(value, TensorRef):
                if value.storage in self._given and self._tape.is_final(value.storage, op.number):
                    return view(self._given[value.storage], value)
                return view(self._storage(value.storage, zeroed=value.storage not in whole), value)
            if isinstance(value, Constant):
                tensor = value.tensor
                return tensor if tensor.dim() == 0 else tensor.to(self._to(tensor.device))
            if type(value) in (list, tuple):
                return type(value)(real(item) for item in value)
            if isinstance(value, torch.device):
                return self._to(value)
            return value

        args = tuple(real(value) for value in op.args)
        kwargs = {name: real(value) for name, value in op.kwargs.items()}
        with _default_dtype(op.default_dtype):
            result = op.func(*args, **kwargs) if op.draw is None else self._draw(op, args, kwargs)
        if op.outputs:
            results = [item for item in _flat(result) if isinstance(item, torch.Tensor)]
            for tensor, ref in zip(results, op.outputs, strict=False):
                self._adopt(tensor, ref)

    def _draw(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = self._device(op, args, kwargs)
        generator = self.draws.generator(op, device)
        func = with_generator(op.func)
        if func is not None:
            result = func(*args, **{**kwargs, "generator": generator})
        else:  # the op knows the default generator alone
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
        elif tensor.numel() or not ref.size.numel():  # else a result that the kernel leaves out: batch norm's, in eval
            view(self._storage(ref.storage, zeroed=False), ref).copy_(tensor)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


_WORTH_A_THREAD = 1 << 20  # bytes; below it, starting threads takes longer than filling

Place = Callable[[torch.device], torch.device]
"""Where memory that was recorded for a device is to be."""


def as_recorded(device: torch.device) -> torch.device:
    return device


def storage_now(tape: Tape, storage: int, *, exact: bool) -> tuple[torch.UntypedStorage, bool]:
    """The storage as the constructor would find it at this point, and whether random numbers went into it."""
    live = tape.live([storage], exact=exact)
    with real_execution():
        memory = _Execution(tape, live, {storage}, as_recorded, exact=exact).run()[storage]
    return memory, any(tape.ops[index].draw is not None for index in live)


def replay_with(
    tape: Tape,
    storage: int,
    given: Mapping[int, torch.UntypedStorage],
    *,
    exact: bool,
    to: Place = as_recorded,
) -> torch.UntypedStorage:
    """``storage`` as the constructor would compute it, had the storages ``given`` ended up with these values."""
    live = tape.live([storage], exact=exact, given=given)
    with real_execution():
        return _Execution(tape, live, {storage}, to, exact=exact, given=given).run()[storage]


def _groups(tape: Tape, storages: Iterable[int], *, exact: bool) -> list[tuple[set[int], set[int]]]:
    """Storages that share no op can be replayed apart: pairs of (storages, ops), in the order of recording."""
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
        live = live_of[storage] = tape.live([storage], exact=exact)
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


def replay(
    tape: Tape, storages: Iterable[int], *, exact: bool, to: Place = as_recorded, threads: int | None = None
) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Give ``storages`` the values that the recorded constructor gives them; yields them as they are done.

    Args:
        tape: the recording.
        storages: storage numbers.
        exact: draw the default random stream in order, dead draws too: bit-identical to eager init. Otherwise each
            random op has a generator of its own, and only live ops run.
        to: where memory that was recorded for a device is to be.
        threads: how many groups of storages to replay at once; values do not depend on it. Default: torch's number
            of intra-op threads.
    """
    groups = _groups(tape, storages, exact=exact)

    def run(group: tuple[set[int], set[int]]) -> dict[int, torch.UntypedStorage]:
        with real_execution():
            return _Execution(tape, group[1], group[0], to, exact=exact).run()

    small = sum(tape.storages[storage].nbytes for group in groups for storage in group[0]) < _WORTH_A_THREAD
    workers = 1 if small else min(threads or torch.get_num_threads(), len(groups))
    if workers <= 1:
        yield from map(run, groups)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="fabric-init-replay") as pool:
        todo = iter(groups)
        running: set[Future[dict[int, torch.UntypedStorage]]] = set()
        try:
            for group in todo:
                running.add(pool.submit(run, group))
                if len(running) > 2 * workers:  # enough to keep the workers busy; no more memory in flight than that
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in running:
                future.cancel()
