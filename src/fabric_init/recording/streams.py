"""Where random numbers come from while recording, so that replay can draw them again.

Recording draws nothing for a recorded op, yet has to notice when the constructor seeds (``torch.manual_seed``), forks
(``torch.random.fork_rng``) or rewinds (``set_rng_state``) a generator. So each recorded random op advances the
generator by one plain draw, and the state that this leaves behind is a label for "after that op": a state that carries
a known label continues that stream from there, an unknown one begins a new, exact stream. Other threads, and code
after the block, just see a generator that was drawn from.
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


_LABEL_BYTES = 96


class _GeneratorStreams:
    """The labels that one generator's states carry."""

    def __init__(
        self, tape: Tape, generator: torch.Generator, *, exact: bool, agree: Callable[[int], int] = int
    ) -> None:
        self._tape = tape
        self.generator = generator
        states = _snapshot(generator)
        state = states[generator.device]
        self._size = state.numel()
        # Where per-op seeds come from: the state itself, so that a second block differs from the first, and the same
        # seed gives the same tape.
        digest = hashlib.blake2b(string_at(state.data_ptr(), state.numel()), digest_size=8).digest()
        seed = agree(int.from_bytes(digest, "little") & _LAST_63_BITS)
        self.stream = tape.add_stream(Stream(exact, seed, states))
        self._next = Draw(self.stream, 0, None)
        self.last = self._label()
        self._labels = {self.last: self._next}
        self._step = torch.empty((), dtype=torch.int64, device=generator.device)

    def _label(self) -> bytes:
        """What tells one state from another: its two ends hold the seed, the position, the first words of the Mersenne
        twister and the saved half of the last normal pair (CUDA's whole state is shorter than that)."""
        state = self.generator.get_state()
        start, size = state.data_ptr(), self._size
        if size <= 2 * _LABEL_BYTES:
            return string_at(start, size)
        return string_at(start, _LABEL_BYTES) + string_at(start + size - _LABEL_BYTES, _LABEL_BYTES)

    def draw(self) -> Draw:
        """The place of the op that is about to be recorded; :meth:`drawn` must follow with the op's number."""
        label = self._label()
        if label != self.last:
            known = self._labels.get(label)
            if known is None:
                stream = self._tape.add_stream(Stream(True, 0, _snapshot(self.generator)))
                known = self._labels[label] = Draw(stream, 0, None)
            self._next = known
        return self._next

    def drawn(self, number: int) -> None:
        """Move the generator on, and label the state it is left in as "after op ``number``"."""
        self._step.random_(generator=self.generator)
        self.last = self._label()
        self._next = self._labels[self.last] = Draw(self._next.stream, self._next.position + 1, number)

    def touched(self) -> bool:
        """Whether somebody else has used the generator since the last recorded draw."""
        return self._label() != self.last


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
        """Give every generator of the constructor's own a fresh seed.

        Replay will draw on from where the generator stood; left as it is, it would later hand out the very numbers
        that went into the weights.
        """
        for streams in self._others.values():
            if not streams.touched():
                streams.generator.manual_seed(derived_seed(streams.generator.initial_seed(), -1))
