"""What several runs of one contender come to, when each run is a group of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from _fresh_process import Phase

Run = list[dict[str, Phase]]
"""The phases of each rank."""


@dataclass(frozen=True)
class GroupResult:
    """Times are of the slowest rank: median and least over the runs. Memory and bytes read are of the worst rank, up to
    having touched the own parts once, the most of any run; ``host`` is the sum over ranks.
    """

    name: str
    label: str
    error: str | None = None
    seconds: float | None = None
    least_seconds: float | None = None
    touch_seconds: float | None = None
    private: int | None = None
    total: int | None = None
    read: int | None = None
    read_by_rank: tuple[int, ...] = ()
    host: int | None = None
    device: int | None = None
    shard: int | None = None
    on_meta: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    all_seconds: tuple[float, ...] = ()

    @property
    def unfilled(self) -> int | None:
        return None if self.error else len(self.on_meta) + len(self.wrong)


def summarize(name: str, label: str, runs: Sequence[Run], counted: Run) -> GroupResult:
    """A contender that failed once has failed: what its ranks said stands in place of figures.

    ``counted`` is one more run, for nothing but the bytes that it read.
    """
    if error := next(filter(None, map(_error, [*runs, counted])), None):
        return GroupResult(name, label, error=error)
    ready = [max(rank["ready"].seconds for rank in run) for run in runs]
    touch = [max(rank["touch"].seconds for rank in run) for run in runs]
    found = [rank["verify"].value for run in runs for rank in run]
    read = tuple(rank["ready"].read + rank["touch"].read for rank in counted)
    return GroupResult(
        name,
        label,
        seconds=median(ready),
        least_seconds=min(ready),
        touch_seconds=median(touch),
        private=_most(runs, lambda phase: phase.private),
        total=_most(runs, lambda phase: phase.total),
        read=max(read),
        read_by_rank=read,
        host=max(sum(rank["touch"].host for rank in run) for run in runs),
        device=max((value["device"] for value in found if value["device"] is not None), default=None),
        shard=max(value["shard"] for value in found),
        on_meta=tuple(sorted({name for value in found for name in value["on_meta"]})),
        wrong=tuple(sorted({name for value in found for name in value["wrong"]})),
        all_seconds=tuple(ready),
    )


def _most(runs: Sequence[Run], figure: Callable[[Phase], int]) -> int:
    return max(figure(rank[phase]) for run in runs for rank in run for phase in ("ready", "touch"))


def _error(run: Run) -> str | None:
    errors: dict[str, list[int]] = {}
    for number, rank in enumerate(run):
        for phase in rank.values():
            if phase.error and phase.name != "stopped":
                errors.setdefault(phase.error, []).append(number)
    if errors:
        return "; ".join(f"rank {', '.join(map(str, ranks))}: {error}" for error, ranks in errors.items())
    return None if all("verify" in rank for rank in run) else "no result"
