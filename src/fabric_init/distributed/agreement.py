"""All ranks do the same, or all raise: no rank enters a collective that the others never reach."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal, Protocol, TypeVar

import torch.distributed as dist

from fabric_init._interrupts import interrupts_held
from fabric_init._torch_internals import get_default_store
from fabric_init.errors import FabricInitError, RanksDisagreeError, RanksLostError

_T = TypeVar("_T")
_Error = TypeVar("_Error", bound=BaseException)


class Agreement(Protocol):
    """How the ranks that fill one model run its steps together."""

    def run_together(self, what: str, make: Callable[[], _T], digest: Callable[[_T], str] | None = None) -> _T:
        """Return ``make()`` if every rank succeeds with the same result; otherwise raise on every rank.

        Args:
            what: The name of the step, for messages.
            make: The step on this rank. It may contain further steps that the ranks run together.
            digest: The text by which results are compared; ``None`` compares nothing.

        Raises:
            RanksDisagreeError: The digests differ.
            RanksLostError: A rank is gone.
            FabricInitError: Another rank failed; its message is included.
        """
        ...

    def alike(self, digest: str | None) -> bool:
        """Return whether every rank has this digest, and none has ``None``."""
        ...

    def from_rank_zero(self, value: Any) -> Any:
        """Return rank 0's ``value``."""
        ...

    def from_all(self, names: Sequence[str]) -> list[str]:
        """Return the ``names`` of all ranks, each once."""
        ...


class SingleProcess:
    """The agreement of one process, or of one that does not depend on others."""

    def run_together(self, what: str, make: Callable[[], _T], digest: Callable[[_T], str] | None = None) -> _T:
        return make()

    def alike(self, digest: str | None) -> bool:
        return digest is not None

    def from_rank_zero(self, value: Any) -> Any:
        return value

    def from_all(self, names: Sequence[str]) -> list[str]:
        return list(names)


_PATIENCE = timedelta(seconds=30)
"""How long a rank that failed waits for the others to arrive and learn of it. They may still be building."""

_PATIENCE_AFTER_INTERRUPT = timedelta(seconds=5)
"""The same after Ctrl-C, which usually reaches all ranks."""

_meetings: dict[str, itertools.count[int]] = defaultdict(itertools.count)
"""By process group: the number of its next meeting."""


def agreement_of(process_group: dist.ProcessGroup | Literal[False] | None) -> Agreement:
    """Return how the ranks of ``process_group`` run their steps together.

    Args:
        process_group: The ranks; ``None`` for those of the default group, if there is one; ``False`` for this process
            alone.

    Raises:
        ValueError: This rank is not in the group.
    """
    if process_group is False or not dist.is_available() or not dist.is_initialized():
        return SingleProcess()
    if process_group is not None and dist.get_rank(process_group) < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in the process_group that it was given")
    return RankGroup(process_group) if dist.get_world_size(process_group) > 1 else SingleProcess()


class RankGroup:
    """The ranks of a process group of torch. Every rank has to make the same calls in the same order.

    Calls may be nested. An error in the outer one reaches the other ranks in whichever call they have come to.

    Args:
        process_group: The group; ``None`` for torch's default one.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._group = process_group

    @property
    def _ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._group)

    def run_together(self, what: str, make: Callable[[], _T], digest: Callable[[_T], str] | None = None) -> _T:
        try:
            value = make()
            mine = "" if digest is None else digest(value)
        except RanksLostError:  # the other ranks know already, or are gone
            raise
        except (Exception, KeyboardInterrupt) as error:  # whatever it is, the other ranks must not wait for this one
            self._send_error(what, error)
            raise
        try:
            digests = self._exchange(what, mine)
        except KeyboardInterrupt as error:  # after all had gathered: the others learn of it in their next call
            self._send_error(what, error)
            raise
        self._check_same(what, digests)
        return value

    def alike(self, digest: str | None) -> bool:
        outcomes = self._exchange("comparing the filled models", digest or "")
        return len(set(outcomes)) == 1 and digest is not None

    def from_rank_zero(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=self._ranks[0], group=self._group)
        return values[0]

    def from_all(self, names: Sequence[str]) -> list[str]:
        everyone = self._exchange("collecting the uninitialized tensors", list(names))
        return list(dict.fromkeys(name for each in everyone for name in each))

    def _exchange(self, what: str, mine: Any) -> list[Any]:
        """Return the values of every rank, if none has failed."""
        try:
            self._announce()
            outcomes = self._gather((None, mine))
        except RuntimeError as error:
            raise RanksLostError(
                f"{what}: rank {dist.get_rank()} lost touch with the other ranks; one of them has probably died, and "
                f"its own output says why. ({error})"
            ) from error
        failed = [
            (rank, failing, text)
            for rank, (failing, text) in zip(self._ranks, outcomes, strict=True)
            if failing is not None
        ]
        if failed:
            rank, failing, text = failed[0]
            ranks = ", ".join(str(rank) for rank, _, _ in failed)
            raise _known(FabricInitError(f"{failing} failed on rank {ranks}, so no rank goes on. Rank {rank}: {text}"))
        return [text for _, text in outcomes]

    def _send_error(self, what: str, error: BaseException) -> None:
        """Send the other ranks the error of this one."""
        if _is_known(error):
            return
        _known(error)
        with suppress(RuntimeError):  # they do not arrive, or are gone: this rank's own error is what matters
            store, meeting = self._announce()
            patience = _PATIENCE if isinstance(error, Exception) else _PATIENCE_AFTER_INTERRUPT
            store.wait([f"{meeting}/{rank}" for rank in self._ranks], patience)
            self._gather((what, f"{type(error).__name__}: {error}"))

    def _announce(self) -> tuple[Any, str]:
        """Announce in the store that this rank is about to gather, so that one that failed knows whom it reaches."""
        ranks = "" if self._group is None else f"{self._group.group_name}/"
        store, meeting = get_default_store(), f"fabric_init/{ranks}{next(_meetings[ranks])}"
        store.set(f"{meeting}/{dist.get_rank()}", "")
        return store, meeting

    def _check_same(self, what: str, digests: Sequence[str]) -> None:
        """Raise :class:`RanksDisagreeError` if the ranks' ``digests`` differ."""
        if len(set(digests)) > 1:
            groups: dict[str, list[int]] = {}
            for rank, digest in zip(self._ranks, digests, strict=True):
                groups.setdefault(digest, []).append(rank)
            listed = "; ".join(f"ranks {ranks}: {digest}" for digest, ranks in groups.items())
            raise _known(RanksDisagreeError(f"{what} is not the same on every rank, so no rank goes on. {listed}"))

    def _gather(self, mine: tuple[str | None, Any]) -> list[tuple[str | None, Any]]:
        """Return from every rank the step that it failed in, or ``None``, and its value or error text."""
        outcomes: list[Any] = [None] * dist.get_world_size(self._group)
        with interrupts_held():  # it takes several steps, and a rank that stops between two of them blocks the others
            dist.all_gather_object(outcomes, mine, group=self._group)
        return outcomes


def _known(error: _Error) -> _Error:
    """Mark an error that the other ranks know of."""
    error.__dict__["_fabric_init_known"] = True
    return error


def _is_known(error: BaseException) -> bool:
    return "_fabric_init_known" in error.__dict__
