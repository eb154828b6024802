"""Where random numbers come from while recording, so that replay can draw them again.

Recording draws nothing for a recorded op, yet has to notice when the constructor seeds (``torch.manual_seed``), forks
(``torch.random.fork_rng``) or rewinds (``set_rng_state``) a generator. So after each recorded random op the generator
is given a seed of ours, a label for "after that op": a state that carries a known label continues that stream from
there, any other begins a new, exact stream. When the block ends the generator is put back to where it was, one draw
on, so that a second block differs from the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from ctypes import string_at

import torch

from fabric_init.recording.tape import Draw, Stream, Tape

_LAST_63_BITS = (1 << 63) - 1


def derived_seed(seed: int, position: int) -> int:
    """A seed for draw number ``position`` of the stream ``seed``: 63 well mixed bits of both."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _LAST_63_BITS


def _snapshot(generator: torch.Generator) -> dict[torch.device, torch.Tensor]:
    states = {generator.device: generator.get_state()}
    if generator is torch.default_generator and torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {torch.device("cuda", i): g.get_state() for i, g in enumerate(torch.cuda.default_generators)}
    return states


def _identity(generator: torch.Generator) -> int:
    # ops get a new Python object for the generator that they were given
    address: int = generator._cdata  # type: ignore[attr-defined]
    return address


class _GeneratorStreams:
    """The labels that one generator's states carry."""

    def __init__(
        self, tape: Tape, generator: torch.Generator, *, exact: bool, agree: Callable[[int], int] = int
    ) -> None:
        self._tape = tape
        self.generator = generator
        states = _snapshot(generator)
        self.start = states[generator.device]
        digest = hashlib.blake2b(string_at(self.start.data_ptr(), self.start.numel()), digest_size=8).digest()
        seed = int.from_bytes(digest, "little") & _LAST_63_BITS
        self.stream = tape.add_stream(Stream(exact, agree(seed), states))
        self._next = Draw(self.stream, 0, None)
        self._labels: dict[int, Draw] = {}
        self._label = seed
        self._mark()

    def _mark(self) -> None:
        self._label += 1
        self._labels[self._label] = self._next
        self.generator.manual_seed(self._label)

    def draw(self) -> Draw:
        """The place of the op that is about to be recorded; :meth:`drawn` must follow with the op's number."""
        seed = self.generator.initial_seed()
        if seed != self._label:
            known = self._labels.get(seed)
            if known is None:
                known = Draw(self._tape.add_stream(Stream(True, seed, _snapshot(self.generator))), 0, None)
            self._next = known
        return self._next

    def drawn(self, number: int) -> None:
        """Label the generator's state as "after op ``number``"."""
        self._next = Draw(self._next.stream, self._next.position + 1, number)
        self._mark()

    def touched(self) -> bool:
        """Whether the constructor has left the generator in a state of its own choosing."""
        return self.generator.initial_seed() not in self._labels


class Streams:
    """All generators of one recording. Call it with torch's modes switched off."""

    def __init__(self, tape: Tape, *, exact: bool, agree: Callable[[int], int] = int) -> None:
        self._tape = tape
        self._default = _GeneratorStreams(tape, torch.default_generator, exact=exact, agree=agree)
        self._others: dict[int, _GeneratorStreams] = {}
        self.default_stream = self._default.stream

    def of(self, generator: torch.Generator | None) -> _GeneratorStreams:
        """The streams of ``generator``; ``None`` is torch's default one."""
        if generator is None or _identity(generator) == _identity(torch.default_generator):
            return self._default
        streams = self._others.get(_identity(generator))
        if streams is None:
            streams = self._others[_identity(generator)] = _GeneratorStreams(self._tape, generator, exact=True)
        return streams

    def close(self) -> None:
        """Put the default generator back, one draw on; give the constructor's own ones a fresh seed.

        Replay will draw on from where those stood; put back, they would later hand out the very numbers that went into
        the weights.
        """
        if not self._default.touched():
            self._default.generator.set_state(self._default.start)
            torch.empty((), dtype=torch.int64).random_(generator=self._default.generator)
        for streams in self._others.values():
            if not streams.touched():
                seed = self._tape.streams[streams.stream].seed
                streams.generator.manual_seed(derived_seed(seed, -1))


class LateStreams:
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
        seed = int(number.random_(generator=self._generator)) & _LAST_63_BITS
        return Draw(self._tape.add_stream(Stream(True, seed, {})), 0, None)

    def drawn(self, number: int) -> None:
        """Nothing follows in this stream."""
