"""The board on which ranks meet, in torch's key-value store; see [Note: meetings]."""

from __future__ import annotations

import pickle
import time
import zlib
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from fabric_init.distributed.lifeline import Lifeline, address_here
from fabric_init.distributed.meeting import Verdict, Word

_VALUE_BYTES = 4 << 20
"""So much in one value: torch's store takes 8 MiB."""

_LONGEST_NAP = 0.05
"""Seconds between two looks at the store. A rank that waits is quick at first, and looks seldom later."""

_SECONDS_UNTIL_WATCHED = 0.2


class StoreBoard:
    """A :class:`~fabric_init.distributed.meeting.Board` for the ranks of one process group.

    Args:
        store: The store that they all reach.
        name: The name of the group.
        ranks: Its ranks in torch's default group.
        timeout: How long a rank waits for the others.
    """

    def __init__(self, store: Any, name: str, ranks: Sequence[int], timeout: timedelta) -> None:
        self._store = store
        self._prefix = f"fabric_init/{name}"
        self._ranks = ranks
        self._timeout = timeout.total_seconds()
        self._waits_for, self._since = -1, 0.0
        self._lifeline: Lifeline | None = None

    def leave(self, number: int, rank: int, word: Word) -> None:
        data = zlib.compress(pickle.dumps(word), 1)
        parts = [data[start : start + _VALUE_BYTES] for start in range(0, len(data), _VALUE_BYTES)]
        for index, part in enumerate(parts[1:], 1):
            self._store.set(self._key(number, rank, index), part)
        self._store.set(self._key(number, rank), len(parts).to_bytes(4, "big") + parts[0])

    def count(self, number: int) -> int:
        return int(self._store.add(self._key(number, "count"), 1))

    def words(self, number: int) -> Mapping[int, Word]:
        found = self._store.multi_get([self._key(number, rank) for rank in self._ranks])
        return {rank: self._word(number, rank, data) for rank, data in zip(self._ranks, found, strict=True)}

    def word(self, number: int, rank: int) -> Word:
        """Return what one rank has left in a meeting that has ended."""
        return self._word(number, rank, self._store.get(self._key(number, rank)))

    def decide(self, number: int, verdict: Verdict) -> Verdict:
        stands = self._store.compare_set(self._key(number, "verdict"), "", pickle.dumps(verdict))
        return Verdict(*pickle.loads(stands))

    def verdict(self, number: int) -> Verdict | None:
        key = self._key(number, "verdict")
        if self._store.check([key]):
            return Verdict(*pickle.loads(self._store.get(key)))
        self._nap(number)
        return None

    def has_words(self, number: int, ranks: Collection[int]) -> bool:
        """Return whether all these ranks have left their words."""
        return bool(self._store.check([self._key(number, rank) for rank in ranks]))

    def wait_for(self, number: int, ranks: Collection[int]) -> bool:
        """Return whether all these ranks have left their words in time."""
        while not (found := self.has_words(number, ranks)) and time.monotonic() - self._nap(number) < self._timeout:
            pass
        return found

    def _nap(self, number: int) -> float:
        """Sleep for a moment, and return when this rank has begun to wait for the meeting."""
        if self._waits_for != number:
            self._waits_for, self._since = number, time.monotonic()
        time.sleep(min(_LONGEST_NAP, max(0.0002, (time.monotonic() - self._since) / 4)))
        return self._since

    def hear(self, number: int, ranks: int = 1) -> int:
        """Count so many ranks that know the verdict, and return how many have been."""
        return int(self._store.add(self._key(number, "heard"), ranks))

    def hopeless(self, number: int, step: str) -> str:
        waited = time.monotonic() - self._since
        if waited < _SECONDS_UNTIL_WATCHED:
            return ""
        if self._watch():
            return f"{step}: rank {self._next_rank} is gone, so all ranks stop. The output of what died says why."
        if waited < self._timeout:
            return ""
        missing = [rank for rank in self._ranks if not self._store.check([self._key(number, rank)])]
        return (
            f"{step}: rank {', '.join(map(str, missing))} did not come within {waited:.0f} s, so all ranks stop. "
            "If it is only slow, give the process group more time: timeout= of the strategy or of init_process_group."
        )

    def announce(self) -> None:
        """Let the others know how to see whether this process lives."""
        below = self._store
        while isinstance(below, PrefixStore):
            below = below.underlying_store
        # A store that has no host is of this machine alone.
        address = address_here(getattr(below, "host", None), getattr(below, "port", 0))
        if address is not None:
            self._store.set(self._address(dist.get_rank()), pickle.dumps(address))

    @property
    def _next_rank(self) -> int:
        return self._ranks[(self._ranks.index(dist.get_rank()) + 1) % len(self._ranks)]

    def _watch(self) -> bool:
        """Return whether the next rank is known to be gone."""
        if self._lifeline is None:
            key = self._address(self._next_rank)
            if not self._store.check([key]):
                return False
            self._lifeline = Lifeline(pickle.loads(self._store.get(key)))
        return self._lifeline.is_cut()

    def _address(self, rank: int) -> str:
        return f"fabric_init/address/{rank}"

    def _key(self, number: int, *what: int | str) -> str:
        return "/".join(map(str, (self._prefix, number, *what)))

    def _word(self, number: int, rank: int, data: bytes) -> Word:
        count = int.from_bytes(data[:4], "big")
        rest = [self._store.get(self._key(number, rank, index)) for index in range(1, count)]
        return Word(*pickle.loads(zlib.decompress(b"".join([data[4:], *rest]))))
