"""One seed for all ranks: each computes a part of the same values, whatever its own generator was seeded with."""

from __future__ import annotations

from collections.abc import Iterable

from fabric_init.distributed.agreement import Agreement
from fabric_init.errors import RanksDisagreeError
from fabric_init.recording.tape.tape import Tape


def share_seeds(tapes: Iterable[Tape], agreement: Agreement, *, asked: bool = False) -> None:
    """Let the recorded random ops of ``tapes`` draw, on every rank, what they draw on the first rank of the group.

    Ranks are only asked if they may draw different numbers yet.

    Args:
        tapes: The tapes.
        agreement: How the ranks keep in step.
        asked: Whether other ranks ask, although this one may have no tape.

    Raises:
        RanksDisagreeError: The ranks have recorded different models, or the constructor has read random values that
            are not the same on every rank.
    """
    each_once = {tape.current() for tape in tapes}
    if not asked and all(tape.shares_seed for tape in each_once):
        return
    in_order = sorted(each_once, key=lambda tape: min(tape.streams, default=0))
    mine = [[tape.streams[number] for number in sorted(tape.streams)] for tape in in_order]
    theirs = agreement.from_rank_zero(mine)

    def adopt() -> None:
        if not mine:
            return
        if [len(streams) for streams in mine] != [len(streams) for streams in theirs]:
            raise RanksDisagreeError(
                "the constructor has not drawn from the same random generators on every rank. Build the same model on "
                "each; or, where ranks hold different parts of it, as pipeline stages do, pass process_group=."
            )
        for tape, streams in zip(in_order, theirs, strict=True):
            own = [tape.streams[number] for number in sorted(tape.streams)]
            if tape.sealed_rng is not None and [s.seed for s in own] != [s.seed for s in streams]:
                raise RanksDisagreeError(
                    "the constructor has read random values (through .item() or the like), which differ between ranks. "
                    "Call torch.manual_seed with the same number on every rank before the recorded block."
                )
            tape.streams.update(zip(sorted(tape.streams), streams, strict=True))
            tape.shares_seed = True

    agreement.run_together("sharing the seed", adopt)
