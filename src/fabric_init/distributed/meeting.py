"""The one protocol by which ranks act together: numbered meetings, each of which has one verdict.

[Note: meetings]
Ranks meet in torch's key-value store and not in a collective, so that one that is elsewhere, has failed or is gone
blocks nobody. Each leaves its word, and is counted. Who is counted last reads all words and gives the verdict. Who
fails gives it at once, wherever the others are: they find it when they come. Who waits, and finds a rank gone or the
time over, gives it, too. The store keeps the first verdict (``compare_set``), and all ranks act on that one. So no rank
goes on from a meeting that another has failed in, and none is needed to tell the others: what one rank did not get to
say, others say for it.

A rank::

    leaves its word ── is counted ─┬─ as the last ──▶ judges ──┐
          │               │        └─ waits for the verdict ──┤
          └── fails ──────┴──────────────── fails ────────────┴──▶ the first verdict ──▶ goes on, or raises

:func:`attend` is this and no more: a generator that asks for each step on the board, so that a test can let every order
of steps happen (``tests/distributed/test_every_interleaving.py``).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol


class Word(NamedTuple):
    """What a rank leaves in a meeting."""

    step: str
    """The step that this rank has come to; others have to have come to the same."""
    digest: str = ""
    """The text that has to be the same on all ranks."""
    value: Any = None
    """What the others may want to know."""
    lost: str = ""
    """Why it has lost touch with the others, if a collective on its way here has failed."""


class Verdict(NamedTuple):
    """What all ranks make of a meeting: ``agreed``, or that all ranks stop, and why."""

    kind: Literal["agreed", "failed", "parted", "lost"]
    text: str = ""


AGREED = Verdict("agreed")


class Board(Protocol):
    """The place where ranks meet; each method is one step that no other rank's can divide."""

    def leave(self, number: int, rank: int, word: Word) -> None:
        """Put down the word of a rank for a meeting."""
        ...

    def count(self, number: int) -> int:
        """Count this rank, and return how many have been."""
        ...

    def words(self, number: int) -> Mapping[int, Word]:
        """Return the words of all ranks, by rank."""
        ...

    def decide(self, number: int, verdict: Verdict) -> Verdict:
        """Make this the verdict, if there is none yet, and return the one there is."""
        ...

    def verdict(self, number: int) -> Verdict | None:
        """Return the verdict, if there is one; otherwise after a moment ``None``."""
        ...

    def hopeless(self, number: int, step: str) -> str:
        """Return why waiting longer is useless; the empty text as long as it is not."""
        ...


Request = tuple[str, tuple[Any, ...]]
"""A method of :class:`Board`, and its arguments."""


def attend(number: int, rank: int, ranks: int, word: Word) -> Generator[Request, Any, Verdict]:
    """Ask for the steps of one rank in one meeting, and return the verdict.

    A rank that is interrupted on the way leaves it, and asks for those of :func:`fail` in the same meeting.

    Args:
        number: The number of the meeting.
        rank: This rank.
        ranks: How many there are.
        word: What it has to say.
    """
    verdict: Verdict | None
    yield "leave", (number, rank, word)
    if (yield "count", (number,)) == ranks:
        verdict = yield "decide", (number, judged((yield "words", (number,))))
        assert verdict is not None
        return verdict
    while (verdict := (yield "verdict", (number,))) is None:
        if reason := (yield "hopeless", (number, word.step)):
            verdict = yield "decide", (number, Verdict("lost", reason))
            assert verdict is not None
            return verdict
    return Verdict(*verdict)


def fail(number: int, verdict: Verdict) -> Generator[Request, Any, int]:
    """Ask for the steps of a rank that has failed, and return the number of the meeting that comes next.

    Args:
        number: The meeting that it was in, or would have come to.
        verdict: What the others are to hear.
    """
    stands = yield "decide", (number, verdict)
    if stands != AGREED:
        return number + 1
    yield "decide", (number + 1, verdict)  # it was interrupted when the others had gone on: they are there next
    return number + 2


def judged(words: Mapping[int, Word]) -> Verdict:
    """Return the verdict on the words of all ranks."""
    lost = [word for word in words.values() if word.lost]
    if lost:
        reasons = "; ".join(dict.fromkeys(word.lost for word in lost))
        return Verdict("lost", f"{lost[0].step}: the ranks lost touch with one another, so all ranks stop. ({reasons})")
    if len({word.step for word in words.values()}) > 1:
        steps = _listed(words, [word.step for word in words.values()])
        return Verdict("parted", f"the ranks do not do the same, so all ranks stop. They have come to: {steps}")
    digests = [word.digest for word in words.values()]
    if len(set(digests)) > 1:
        step = next(iter(words.values())).step
        return Verdict("parted", f"{step} is not the same on every rank, so all ranks stop. {_listed(words, digests)}")
    return AGREED


def _listed(words: Mapping[int, Word], texts: Sequence[str]) -> str:
    groups: dict[str, list[int]] = {}
    for rank, text in zip(words, texts, strict=True):
        groups.setdefault(text, []).append(rank)
    return "; ".join(f"ranks {ranks}: {text}" for text, ranks in groups.items())
