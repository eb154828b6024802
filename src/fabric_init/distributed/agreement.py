"""All ranks do the same, or all raise: no rank enters a collective that the others never reach."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol, TypeVar

import torch.distributed as dist

from fabric_init.distributed.group_state import state_of
from fabric_init.distributed.meeting import AGREED, Word, attend
from fabric_init.errors import FabricInitError, RanksDisagreeError, RanksLostError

_T = TypeVar("_T")

Compared = str | Mapping[str, str]


class Agreement(Protocol):
    """How the ranks that fill one model run its steps together."""

    def run_together(self, what: str, make: Callable[[], _T], digest: Callable[[_T], Compared] | None = None) -> _T:
        """Return ``make()`` if every rank succeeds with the same result; otherwise raise on every rank.

        Args:
            what: The name of the step, for messages.
            make: The step on this rank. It may contain further steps that the ranks run together.
            digest: What results are compared by: a text, or several by name, so that the error says which differ;
                ``None`` compares nothing.

        Raises:
            RanksDisagreeError: The digests differ.
            RanksLostError: A rank is gone.
            FabricInitError: Another rank failed; its message is included.
        """
        ...

    def telling(self, what: str, patience: float = ...) -> AbstractContextManager[None]:
        """Return a context in which whatever is raised, Ctrl-C and ``SystemExit`` too, is an error on every rank.

        The others learn of it in the next step that they run together, which may be after the context.

        Args:
            what: The name of what is done there, for messages.
            patience: Seconds for which a rank that failed waits for the others to hear of it, if nobody could tell
                them once its process has ended.
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

    def run_together(self, what: str, make: Callable[[], _T], digest: Callable[[_T], Compared] | None = None) -> _T:
        return make()

    def telling(self, what: str, patience: float = 0.0) -> AbstractContextManager[None]:
        return nullcontext()

    def alike(self, digest: str | None) -> bool:
        return digest is not None

    def from_rank_zero(self, value: Any) -> Any:
        return value

    def from_all(self, names: Sequence[str]) -> list[str]:
        return list(names)


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

    Calls may be nested. An error in the outer one reaches the other ranks in whichever call they have come to, and an
    error on another rank ends all of them.

    Args:
        group: The group; ``None`` for torch's default one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._state = state_of(group)

    def run_together(self, what: str, make: Callable[[], _T], digest: Callable[[_T], Compared] | None = None) -> _T:
        with self.telling(what):
            value = make()
            compared = "" if digest is None else digest(value)
            try:
                self.meet(Word(what, compared if isinstance(compared, str) else digest_of(compared)))
            except RanksDisagreeError as error:
                if isinstance(compared, str):
                    raise
                raise self._naming(error, compared) from None
            return value

    def _naming(self, error: RanksDisagreeError, lines: Mapping[str, str]) -> RanksDisagreeError:
        """Return an error that names what differs between the ranks, if they have come to the same step."""
        if f" {digest_of(lines)}" not in str(error):
            return error
        theirs = self.from_rank_zero(lines)
        names = self.from_all([name for name in {**theirs, **lines} if theirs.get(name) != lines.get(name)][:5])
        self._state.all_know = True
        which = ", ".join(names[:5]) or "the order of the tensors"
        return RanksDisagreeError(f"{error}. They differ in {which}{' …' if len(names) > 5 else ''}")

    @contextmanager
    def telling(self, what: str, patience: float = 30.0) -> Iterator[None]:
        state = self._state
        if not state.depth:
            state.all_know = False
        state.depth += 1
        try:
            yield
        except BaseException as error:  # whatever it is, the other ranks must not wait for this one
            first = None if state.all_know else state.tell(what, error, patience)
            if first is not None and _is_a_consequence(error, first.text):
                raise _ERRORS[first.kind](f"{first.text} (Here: {error})") from error
            raise
        finally:
            state.depth -= 1

    def meet(self, word: Word) -> int:
        """Return the number of a meeting that all ranks have come to with the same ``word``, but for its value.

        Raises:
            FabricInitError: Another rank failed; its message is included.
            RanksDisagreeError: They have come to different steps, or their digests differ.
            RanksLostError: A rank is gone, or does not come in time.
        """
        state, rank = self._state, dist.get_rank()
        with self.telling(word.step):
            number = state.number
            verdict = state.run(word.step, attend(number, rank, len(state.ranks), word))
            state.number = number + 1
            state.all_know = verdict != AGREED
            if verdict != AGREED:
                state.wait_until_heard(number, _PATIENCE_AFTER_VERDICT)
                raise _ERRORS[verdict.kind](verdict.text)
            return number

    def alike(self, digest: str | None) -> bool:
        outcomes = self._values(Word("comparing the filled models", value=digest))
        return len(set(outcomes)) == 1 and digest is not None

    def from_rank_zero(self, value: Any) -> Any:
        state = self._state
        first = state.ranks[0]
        with self.telling(_ASKING):
            number = self.meet(Word(_ASKING, value=value if dist.get_rank() == first else None))
            return value if dist.get_rank() == first else state.board.word(number, first).value

    def from_all(self, names: Sequence[str]) -> list[str]:
        everyone = self._values(Word("asking all ranks", value=list(names)))
        return list(dict.fromkeys(name for each in everyone for name in each))

    def _values(self, word: Word) -> list[Any]:
        with self.telling(word.step):
            return [word.value for word in self._state.board.words(self.meet(word)).values()]


def _is_a_consequence(error: BaseException, first: str) -> bool:
    """Return whether this may come from a collective to which a rank with another error, ``first``, has not come.

    Gloo has no class of its own for what it raises.
    """
    return (type(error) is RuntimeError or isinstance(error, dist.DistError)) and str(error) not in first


def digest_of(lines: Mapping[str, str]) -> str:
    """Return a short text that is the same for equal ``lines`` in the same order."""
    text = "\n".join(f"{name} {line}" for name, line in lines.items())
    return f"{len(lines)} entries, digest {hashlib.sha256(text.encode()).hexdigest()[:12]}"


_ASKING = "asking the first rank"

_PATIENCE_AFTER_VERDICT = 2.0
"""Seconds for which a rank that failed waits for the others to hear of it, when these are there, or gone."""

_ERRORS: dict[str, type[FabricInitError]] = {
    "failed": FabricInitError,
    "parted": RanksDisagreeError,
    "lost": RanksLostError,
}
