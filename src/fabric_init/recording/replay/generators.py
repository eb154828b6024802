"""Generators for the random ops of a replay, positioned as they were recorded (see tape/random_streams.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from fabric_init.recording.tape.seeds import derived_seed
from fabric_init.recording.tape.tape import Op, Tape


class ReplayGenerators:
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
        """Return the generator that ``op`` draws from on ``device``; call :meth:`drawn` once it has run."""
        draw = op.draw
        assert draw is not None
        stream = self._tape.streams[draw.stream]
        if not (stream.exact or self._exact):
            return torch.Generator(device).manual_seed(derived_seed(stream.seed, draw.position))
        # a draw that does not follow the last one replayed: go back to the state after its recorded predecessor
        if draw.stream not in self._last or self._last[draw.stream] != draw.previous:
            states = stream.states if draw.previous is None else self._saved[draw.previous]
            self._generators[draw.stream] = {place: _from_state(place, state) for place, state in states.items()}
        generators = self._generators[draw.stream]
        if device not in generators:  # no state was recorded for this device: seed it as a new process would
            generators[device] = torch.Generator(device).manual_seed(stream.seed)
        return generators[device]

    def drawn(self, op: Op) -> None:
        """Note that ``op`` has drawn; keep the state if several ops continue from it."""
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
