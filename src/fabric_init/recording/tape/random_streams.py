"""Random streams: which generator state each recorded random op draws from, so that replay draws the same numbers.

[Note: random streams]
Recording runs no kernel, so a recorded random op does not advance its generator. Yet the constructor may seed it
(``torch.manual_seed``), fork it (``torch.random.fork_rng``) or rewind it (``set_rng_state``), and the tape has to
follow. No hook reports these calls, but all of them set the generator's seed. Therefore:

- After each recorded random op the generator is seeded with a number of ours, its *label*, which stands for "after
  that op". A label is one 64-bit seed, so checking it is cheap.
- Before the next random op the seed is read. A known label continues its stream after the op that it stands for,
  which also covers forks and rewinds. Any other seed was set by the constructor: it begins a new stream.
- A stream that the constructor seeded, and every stream of a generator other than torch's default one, is *exact*:
  replay draws it in order, bit for bit, in both ``rng`` modes. For ``rng="per_op"`` the default stream is not exact:
  each op gets a generator seeded from the stream's seed and the op's position in it (``seeds.py``), so dead draws can
  be skipped and values do not depend on the order of replay. Large tensors have one for each chunk: see
  ``replay/chunks.py``.
- At the end of the block the default generator returns to its first state, plus one draw if anything has drawn from
  it, so that a second block differs from the first. Other generators, and the default one if the constructor has seeded
  it, get a fresh seed that follows from theirs, so that they do not repeat the weights' numbers. One that nothing was
  drawn from since the constructor has seeded it is not touched.
- A block that skips initialization, as Lightning's ``empty_init=True`` does, leaves the default generator where it was
  if nothing but ``torch.nn.init`` drew from it, or where the constructor has seeded it. The draw comes when the model's
  own init is asked for. A block that starts from the same state before that has other numbers nevertheless
  (:func:`_apart`).
"""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import string_at
from typing import Any

import torch

from fabric_init.recording.tape.op_properties import traits
from fabric_init.recording.tape.seeds import LAST_63_BITS, derived_seed
from fabric_init.recording.tape.tape import Draw, RandomStream, Tape

_undrawn: list[tuple[int, weakref.ref[Tape]]] = []
"""Blocks that have left the default generator where it was: the seed of that state, and the tape."""


def _apart(seed: int) -> int:
    """Return ``seed``, or another one if a model whose own init is still to come has it."""
    if any(other == seed for other, _ in _still_undrawn()):
        gc.collect()  # models that are gone, but for a reference cycle, do not count
        while any(other == seed for other, _ in _still_undrawn()):
            seed = derived_seed(seed, -2)
    return seed


def _still_undrawn() -> list[tuple[int, Tape]]:
    tapes = [(seed, tape.current()) for seed, reference in _undrawn if (tape := reference()) is not None]
    return [(seed, tape) for seed, tape in tapes if not tape.own_init_ran]


def own_init_runs(tape: Tape) -> None:
    """Draw once from the default generator, as every init does, before the own init of a model on ``tape`` runs."""
    if any(other is tape.current() for _, other in _still_undrawn()):
        _draw_once(torch.default_generator)
    tape.own_init_ran = True


def _draw_once(generator: torch.Generator) -> None:
    torch.empty((), dtype=torch.int64, device=generator.device).random_(generator=generator)


def _snapshot(generator: torch.Generator) -> dict[torch.device, torch.Tensor]:
    states = {generator.device: generator.get_state()}
    if generator is torch.default_generator and torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {torch.device("cuda", i): g.get_state() for i, g in enumerate(torch.cuda.default_generators)}
    return states


def _identity(generator: torch.Generator) -> int:
    # each op receives a new Python object for the same generator
    address: int = generator._cdata  # type: ignore[attr-defined]
    return address


class _GeneratorStreams:
    """The streams of one generator, and the labels that identify them: see [Note: random streams]."""

    def __init__(
        self, tape: Tape, generator: torch.Generator, *, exact: bool, agree: Callable[[int], int] = int
    ) -> None:
        self._tape = tape
        self.generator = generator
        states = _snapshot(generator)
        self.start = states[generator.device]
        digest = hashlib.blake2b(string_at(self.start.data_ptr(), self.start.numel()), digest_size=8).digest()
        seed = _apart(int.from_bytes(digest, "little") & LAST_63_BITS)
        self.stream = tape.add_stream(RandomStream(exact, agree(seed), states))
        self._next = Draw(self.stream, 0, None)
        self.has_drawn = False
        self.only_init = True  # whether nothing but functions of torch.nn.init has drawn
        self._labels: dict[int, Draw] = {}
        self._label = self.seed = seed
        self._mark()

    def _mark(self) -> None:
        self._label += 1
        self._labels[self._label] = self._next
        self.generator.manual_seed(self._label)

    def draw(self) -> Draw:
        """Return the position of the op that is about to be recorded; call :meth:`drawn` with its number next."""
        seed = self.generator.initial_seed()
        if seed != self._label:
            position = self._labels.get(seed)
            if position is None:  # the constructor has seeded the generator
                position = Draw(self._tape.add_stream(RandomStream(True, seed, _snapshot(self.generator))), 0, None)
            self._next = position
        return self._next

    def drawn(self, number: int, *, by_init: bool) -> None:
        """Label the generator's state as "after op ``number``", which was ``by_init``, a function of torch.nn.init."""
        self.has_drawn = True
        self.only_init = self.only_init and by_init
        self._next = Draw(self._next.stream, self._next.position + 1, number)
        self._mark()

    def current(self) -> int | None:
        """Return the stream that the generator is in; ``None`` if it was seeded and nothing was drawn since."""
        position = self._labels.get(self.generator.initial_seed())
        return None if position is None else position.stream


class RandomStreams:
    """All generators of one recording. Use it with torch's modes switched off."""

    def __init__(self, tape: Tape, *, exact: bool, agree: Callable[[int], int] = int, skips_init: bool = False) -> None:
        self._tape = tape
        self._skips_init = skips_init
        self._default = _GeneratorStreams(tape, torch.default_generator, exact=exact, agree=agree)
        self._others: dict[int, _GeneratorStreams] = {}
        self.default_stream = self._default.stream

    def of(self, generator: torch.Generator | None) -> _GeneratorStreams:
        """Return the streams of ``generator``; ``None`` stands for torch's default one."""
        if generator is None or _identity(generator) == _identity(torch.default_generator):
            return self._default
        streams = self._others.get(_identity(generator))
        if streams is None:
            streams = self._others[_identity(generator)] = _GeneratorStreams(self._tape, generator, exact=True)
        return streams

    def close(self) -> None:
        """Restore the default generator, advanced by one draw if there was any, and reseed those that were seeded.

        Replay draws from the states that those had; if restored, they would later return the numbers that went into
        the weights.
        """
        generator, stream = self._default.generator, self._default.current()
        undrawn = self._skips_init and self._default.only_init
        if undrawn and stream is not None:
            generator.set_state(self._tape.streams[stream].states[generator.device])
            _undrawn[:] = [known for known in _undrawn if known[1]() is not None]
            if self._default.has_drawn:
                _undrawn.append((self._default.seed, weakref.ref(self._tape)))
        elif stream == self._default.stream:
            generator.set_state(self._default.start)
            if self._default.has_drawn:  # a Trainer's configure_model, say, finds its model there
                _draw_once(generator)
        else:
            self._seed_anew(generator, stream)
        for streams in self._others.values():
            self._seed_anew(streams.generator, streams.current())

    def _seed_anew(self, generator: torch.Generator, stream: int | None) -> None:
        if stream is not None:
            generator.manual_seed(derived_seed(self._tape.streams[stream].seed, -1))


class LateRandomStreams:
    """Where ops draw from that are recorded after their block: each from a generator of its own.

    Its seed is drawn from the generator that the user's code has at that moment, so that it moves on, as in plain
    PyTorch, and ranks with one seed record one value.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def of(self, generator: torch.Generator | None) -> LateDraws:
        """Return the draws from ``generator``; ``None`` is torch's default one."""
        return LateDraws(self._tape, generator)


class LateDraws:
    """The one draw that an op makes."""

    def __init__(self, tape: Tape, generator: torch.Generator | None) -> None:
        self._tape = tape
        self._generator = generator if generator is not None else torch.default_generator

    def draw(self) -> Draw:
        """Return the place of the op that is about to be recorded."""
        number = torch.empty((), dtype=torch.int64, device=self._generator.device)
        seed = int(number.random_(generator=self._generator)) & LAST_63_BITS
        return Draw(self._tape.add_stream(RandomStream(True, seed, {})), 0, None)

    def drawn(self, number: int, *, by_init: bool) -> None:
        """Nothing follows in this stream."""


@contextmanager
def generator_kept(func: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Context in which an op that draws random numbers leaves its generator where it is."""
    if not traits(func).random:
        yield
        return
    generator = kwargs.get("generator") or torch.default_generator
    before = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(before)
