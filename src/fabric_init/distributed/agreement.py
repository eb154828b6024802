"""All ranks do the same, or all raise: nobody goes on alone into a collective that the others never reach."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from fabric_init._interrupts import interrupts_held
from fabric_init.errors import FabricInitError, RanksDisagreeError, RanksLostError

_T = TypeVar("_T")
_Error = TypeVar("_Error", bound=BaseException)


class Agreement(Protocol):
    """How the ranks that fill one model keep in step."""

    def same(self, what: str, make: Callable[[], _T], digest: Callable[[_T], str]) -> _T:
        """``make()``, if it raises on no rank and gives the same ``digest`` on all; else an error on every rank."""
        ...

    def from_rank_zero(self, value: Any) -> Any:
        """Rank 0's ``value``."""
        ...

    def from_all(self, names: Sequence[str]) -> list[str]:
        """The ``names`` of all ranks, each once."""
        ...


class SingleProcess:
    """One process, or one that is not to wait for others."""

    def same(self, what: str, make: Callable[[], _T], digest: Callable[[_T], str]) -> _T:
        return make()

    def from_rank_zero(self, value: Any) -> Any:
        return value

    def from_all(self, names: Sequence[str]) -> list[str]:
        return list(names)


_PATIENCE = timedelta(seconds=30)
"""How long a rank that cannot go on waits for the others to come and hear of it. They may be building still."""

_PATIENCE_OF_USERS = timedelta(seconds=5)
"""The same for one that somebody has pressed Ctrl-C for; most often all ranks have got that."""

_meetings = itertools.count()


class RankGroup:
    """The ranks of torch's default process group. Every rank has to make the same calls in the same order.

    Calls may lie in one another. What goes wrong in the outer one meets the others in whichever they have come to.
    """

    def same(self, what: str, make: Callable[[], _T], digest: Callable[[_T], str]) -> _T:
        try:
            value = make()
            mine = digest(value)
        except RanksLostError:  # nobody is left to tell
            raise
        except (Exception, KeyboardInterrupt) as error:  # whatever it is, the other ranks must not wait for this one
            self._tell(what, error)
            raise
        try:
            digests = self._hear(what, mine)
        except KeyboardInterrupt as error:  # once all had gathered: they hear of it at their next meeting
            self._tell(what, error)
            raise
        _check_same(what, digests)
        return value

    def alike(self, digest: str | None) -> bool:
        """Whether every rank has this digest, and none has ``None``."""
        outcomes = self._hear("comparing the filled models", digest or "")
        return len(set(outcomes)) == 1 and digest is not None

    def from_rank_zero(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def from_all(self, names: Sequence[str]) -> list[str]:
        everyone = self._hear("asking what still waits for values", list(names))
        return list(dict.fromkeys(name for each in everyone for name in each))

    def _hear(self, what: str, mine: Any) -> list[Any]:
        """What every rank says, if all are well."""
        try:
            self._come()
            outcomes = _gather((None, mine))
        except RuntimeError as error:
            raise RanksLostError(
                f"{what}: rank {dist.get_rank()} lost touch with the other ranks; one of them has probably died, and "
                f"its own output says why. ({error})"
            ) from error
        failed = [(rank, failing, text) for rank, (failing, text) in enumerate(outcomes) if failing is not None]
        if failed:
            rank, failing, text = failed[0]
            ranks = ", ".join(str(rank) for rank, _, _ in failed)
            raise _known(FabricInitError(f"{failing} failed on rank {ranks}, so no rank goes on. Rank {rank}: {text}"))
        return [text for _, text in outcomes]

    def _tell(self, what: str, error: BaseException) -> None:
        """Let the other ranks know why this one goes no further."""
        if _is_known(error):
            return
        _known(error)
        with suppress(RuntimeError):  # they do not come, or are no more: this rank's own error is what matters
            store, meeting = self._come()
            patience = _PATIENCE if isinstance(error, Exception) else _PATIENCE_OF_USERS
            store.wait([f"{meeting}/{rank}" for rank in range(dist.get_world_size())], patience)
            _gather((what, f"{type(error).__name__}: {error}"))

    def _come(self) -> tuple[Any, str]:
        """Leave word in the store that this rank is about to gather, so that one that failed knows whom it reaches."""
        store, meeting = dist.distributed_c10d._get_default_store(), f"fabric_init/{next(_meetings)}"
        store.set(f"{meeting}/{dist.get_rank()}", "")
        return store, meeting


def _gather(mine: tuple[str | None, Any]) -> list[tuple[str | None, Any]]:
    """From every rank: what it failed in, or ``None``, and what it has to say."""
    outcomes: list[Any] = [None] * dist.get_world_size()
    with interrupts_held():  # it takes several steps, and who leaves between two of them leaves the others hanging
        dist.all_gather_object(outcomes, mine)
    return outcomes


def _known(error: _Error) -> _Error:
    """Mark an error that no rank has to be told of any more."""
    error.__dict__["_fabric_init_known"] = True
    return error


def _is_known(error: BaseException) -> bool:
    return "_fabric_init_known" in error.__dict__


def _check_same(what: str, digests: Sequence[str]) -> None:
    """Raise :class:`RanksDisagreeError` if the ranks' ``digests`` differ."""
    if len(set(digests)) > 1:
        groups: dict[str, list[int]] = {}
        for rank, digest in enumerate(digests):
            groups.setdefault(digest, []).append(rank)
        listed = "; ".join(f"ranks {ranks}: {digest}" for digest, ranks in groups.items())
        raise _known(RanksDisagreeError(f"{what} is not the same on every rank, so no rank goes on. {listed}"))
