"""Where the ranks of one process group meet, as this rank sees it, and how it tells them of its own error."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from fabric_init._interrupts import interrupts_held
from fabric_init._torch_internals import get_default_store, timeout_of
from fabric_init.distributed.meeting import Request, Verdict, fail
from fabric_init.distributed.store import StoreBoard
from fabric_init.errors import RanksLostError

_T = TypeVar("_T")

_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for one another, if their process group does not say: torch's own default."""

_PATIENCE_AFTER_INTERRUPT = 5.0
"""The most seconds to wait to be heard after Ctrl-C or ``SystemExit``, which usually reaches all ranks."""


class GroupState:
    """The meetings of the ranks of one process group.

    Attributes:
        ranks: Their numbers in torch's default group.
        number: The next meeting.
        depth: How many calls this rank is in.
        all_know: Whether the other ranks have heard of the error that ends these calls.
    """

    def __init__(self, store: Any, name: str, ranks: Sequence[int], timeout: timedelta) -> None:
        self.store = store
        self.ranks = ranks
        self.board = StoreBoard(store, name, ranks, timeout)
        self.number = 0
        self.depth = 0
        self.all_know = False

    def run(self, what: str, steps: Generator[Request, Any, _T]) -> _T:
        """Take the ``steps`` of a meeting on the board, and return what they end with.

        Raises:
            RanksLostError: The process that keeps torch's store is gone.
        """
        try:
            with interrupts_held() as deliver:
                answer = None
                while True:
                    method, arguments = steps.send(answer)
                    answer = getattr(self.board, method)(*arguments)
                    if method == "verdict" and answer is None:
                        deliver()
        except StopIteration as done:
            result: _T = done.value
            return result
        except RuntimeError as error:
            self.all_know = True  # or never will
            raise RanksLostError(
                f"{what}: rank 0 is gone, or the process that keeps torch's store, so all ranks stop. The output of "
                f"what died says why. ({error})"
            ) from error

    def tell(self, what: str, error: BaseException, patience: float) -> Verdict | None:
        """Let the other ranks hear of the error of this one, and wait for ``patience`` seconds until they have.

        Returns:
            What another rank has told before this one, which all have heard instead.
        """
        if isinstance(error, GeneratorExit) and error.__context__ is not None:
            error = error.__context__  # whoever closes a generator does so because of that
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        rank = dist.get_rank()
        verdict = Verdict("failed", f"{what} failed on rank {rank}, so all ranks stop. Rank {rank}: {text}")
        with suppress(RanksLostError, RuntimeError):  # this rank's own error is what matters
            self.number = self.run(what, fail(self.number, verdict))
            self.all_know = True
            patience = patience if isinstance(error, Exception) else min(patience, _PATIENCE_AFTER_INTERRUPT)
            self.wait_until_heard(self.number - 1, patience)
            first = self.board.verdict(self.number - 1)
            return None if first is None or first == verdict else Verdict(*first)
        return None

    def wait_until_heard(self, number: int, patience: float) -> None:
        """Say that this rank knows the verdict; where the store ends with this process, wait for the others."""
        end = time.monotonic() + patience
        with suppress(RuntimeError):
            heard = self.board.hear(number)
            if dist.get_rank() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                return
            while heard < len(self.ranks) and time.monotonic() < end:
                time.sleep(0.02)
                heard = self.board.hear(number, 0)


_states: dict[str, GroupState] = {}
"""By name of the group."""


def state_of(process_group: dist.ProcessGroup | None) -> GroupState:
    """Return the state of a process group; ``None`` for torch's default one."""
    group = process_group or dist.group.WORLD
    assert group is not None
    store = get_default_store()
    state = _states.get(group.group_name)
    if state is None or state.store is not store:  # another one: the ranks have formed their groups anew
        ranks, timeout = dist.get_process_group_ranks(group), timeout_of(group) or _TIMEOUT
        state = _states[group.group_name] = GroupState(store, group.group_name, ranks, timeout)
        with suppress(RuntimeError):
            state.board.announce()
    return state
