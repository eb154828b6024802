"""The protocol of meetings, small enough to let every order of steps happen: two ranks, every fault at every step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from fabric_init.distributed.meeting import AGREED, Request, Verdict, Word, attend, fail

STEPS = ("open", "fill")


@dataclass
class Memory:
    """A board in memory."""

    left: dict[tuple[int, int], Word] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)

    def leave(self, number: int, rank: int, word: Word) -> None:
        self.left[number, rank] = word

    def count(self, number: int) -> int:
        self.counts[number] = self.counts.get(number, 0) + 1
        return self.counts[number]

    def words(self, number: int) -> Mapping[int, Word]:
        return {rank: word for (meeting, rank), word in self.left.items() if meeting == number}

    def decide(self, number: int, verdict: Verdict) -> Verdict:
        return self.verdicts.setdefault(number, verdict)

    def verdict(self, number: int) -> Verdict | None:
        return self.verdicts.get(number)

    def hopeless(self, number: int, step: str) -> str:
        return "a rank is gone" if self.dead else ""


def program(rank: int, fault: str, words: list[Word]) -> Generator[Request, Any, str]:
    """What ``RankGroup`` does in a program of two steps; ``fault`` is thrown into it where the search wants."""
    number = 0
    try:
        for word in words:
            verdict = yield from attend(number, rank, 2, word)
            number += 1
            if verdict != AGREED:
                return verdict.kind
    except KeyboardInterrupt:
        yield from fail(number, Verdict("failed", fault))
        return "raised"
    return "agreed"


@dataclass
class Run:
    """One order of steps: which rank makes each, and after how many of its own the odd one meets its fault."""

    board: Memory
    ranks: dict[int, Generator[Request, Any, str]]
    asked: dict[int, Request | None] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)

    def resume(self, rank: int, advance: Callable[[], Request]) -> None:
        try:
            self.asked[rank] = advance()
        except StopIteration as done:
            self.asked[rank] = None
            self.ended[rank] = done.value

    def step(self, rank: int) -> None:
        request = self.asked[rank]
        assert request is not None
        answer = getattr(self.board, request[0])(*request[1])
        self.resume(rank, lambda: self.ranks[rank].send(answer))

    def waits(self, rank: int) -> bool:
        """Whether another step of this rank would change nothing."""
        request = self.asked[rank]
        if request is None or request[0] not in ("verdict", "hopeless"):
            return False
        return self.board.verdict(request[1][0]) is None and not self.board.dead


def begun(words: Mapping[int, list[Word]], fault: str) -> Run:
    run = Run(Memory(), {rank: program(rank, fault, its) for rank, its in words.items()})
    for rank in run.ranks:
        run.resume(rank, lambda rank=rank: next(run.ranks[rank]))
    return run


def every_order(words: Mapping[int, list[Word]], fault: str) -> Iterator[Run]:
    """All ends that there are: each order of the steps of both ranks, and the fault before any step of rank 1."""
    work: list[tuple[str, ...]] = [()]
    seen: set[str] = set()  # what comes of a state does not depend on how it was reached
    while work:
        order = work.pop()
        run = begun(words, fault)
        struck = False
        for move in order:
            if move == "fault":
                struck = True
                if fault == "dies":
                    run.board.dead.add(1)
                    run.asked[1], run.ended[1] = None, "dead"
                else:
                    run.resume(1, lambda run=run: run.ranks[1].throw(KeyboardInterrupt()))
            else:
                run.step(int(move))
        state = repr((run.asked, run.ended, run.board, struck))
        if state in seen:
            continue
        seen.add(state)
        moves = [str(rank) for rank in run.ranks if run.asked[rank] is not None and not run.waits(rank)]
        if fault and not struck and run.asked[1] is not None:
            moves.append("fault")
        if moves:
            work.extend((*order, move) for move in moves)
        else:
            yield run


SAME = {rank: [Word(step) for step in STEPS] for rank in (0, 1)}


def test_ranks_that_do_the_same_agree_in_every_order() -> None:
    runs = list(every_order(SAME, ""))
    assert runs
    for run in runs:
        assert run.ended == {0: "agreed", 1: "agreed"}


@pytest.mark.parametrize("fault", ["is interrupted", "dies"])
def test_a_fault_at_any_step_ends_both_ranks_and_neither_goes_on_from_a_meeting_that_the_other_failed_in(
    fault: str,
) -> None:
    outcomes = set()
    for run in every_order(SAME, fault):
        assert run.ended.keys() == {0, 1}, "a rank waits for ever"
        outcomes.add((run.ended[0], run.ended[1]))
    # Both may agree: the fault comes after the last step. So may the other alone: it comes after the last verdict.
    ends = ("lost", "dead") if fault == "dies" else ("failed", "raised")
    assert outcomes == {ends, ("agreed", ends[1]), ("agreed", "agreed")}


@pytest.mark.parametrize(
    "other", [[Word("fill")], [Word("open", "another file"), Word("fill")]], ids=["another step", "another digest"]
)
def test_ranks_that_part_both_know(other: list[Word]) -> None:
    for run in every_order({0: [Word("open", "a file"), Word("fill")], 1: other}, ""):
        assert run.ended == {0: "parted", 1: "parted"}


def test_the_search_would_see_a_rank_that_fails_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(number: int, verdict: Verdict) -> Generator[Request, Any, int]:
        return number
        yield

    monkeypatch.setitem(globals(), "fail", silent)
    assert any(run.ended.keys() != {0, 1} for run in every_order(SAME, "is interrupted"))
